"""A private key under a passphrase: PKCS8 with PBES2, scrypt and AES-256-CBC, as OpenSSL and `cryptography` read it.

`cryptography` 50 reads this form but writes PKCS8 with 2,048 rounds of PBKDF2, which a passphrase does not survive; so
the ASN.1 around its scrypt and AES is written here, through its own encoder.

Sources: RFC 5958 section 3 (EncryptedPrivateKeyInfo), RFC 8018 appendix A.4 (PBES2), RFC 7914 section 7 (scrypt).
"""

import os
from base64 import b64encode
from textwrap import wrap

from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.x509 import ObjectIdentifier

LABEL = "ENCRYPTED PRIVATE KEY"
PBES2 = ObjectIdentifier("1.2.840.113549.1.5.13")
SCRYPT = ObjectIdentifier("1.3.6.1.4.1.11591.4.11")
AES_256_CBC = ObjectIdentifier("2.16.840.1.101.3.4.1.42")
# OWASP's password storage advice gives N=2^14, r=8, p=5 (16 MiB, about 0.2 s a guess) as one of its equal choices; a
# larger N would pass OpenSSL's memory limit of 32 MiB.
COST, BLOCK_SIZE, PARALLELISM = 1 << 14, 8, 5
KEY_BYTES, SALT_BYTES, IV_BYTES, IV_BITS = 32, 16, 16, 128


@asn1.sequence
class ScryptParams:
    """scrypt-params of RFC 7914."""

    salt: bytes
    cost: int
    block_size: int
    parallelism: int


@asn1.sequence
class KeyDerivation:
    """AlgorithmIdentifier of scrypt."""

    algorithm: ObjectIdentifier
    parameters: ScryptParams


@asn1.sequence
class Encryption:
    """AlgorithmIdentifier of AES-256-CBC: its parameter is the initialisation vector."""

    algorithm: ObjectIdentifier
    parameters: bytes


@asn1.sequence
class Pbes2Params:
    """PBES2-params of RFC 8018."""

    key_derivation: KeyDerivation
    encryption: Encryption


@asn1.sequence
class EncryptionAlgorithm:
    """AlgorithmIdentifier of PBES2."""

    algorithm: ObjectIdentifier
    parameters: Pbes2Params


@asn1.sequence
class EncryptedPrivateKeyInfo:
    """What the PEM holds."""

    algorithm: EncryptionAlgorithm
    encrypted: bytes


def encrypt_pkcs8(der: bytes, passphrase: bytes) -> bytes:
    """Return the encrypted PEM of a PKCS8 private key in DER."""
    salt, iv = os.urandom(SALT_BYTES), os.urandom(IV_BYTES)
    key = Scrypt(salt, KEY_BYTES, COST, BLOCK_SIZE, PARALLELISM).derive(passphrase)
    padder, encryptor = PKCS7(IV_BITS).padder(), Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    encrypted = encryptor.update(padder.update(der) + padder.finalize()) + encryptor.finalize()
    scrypt = ScryptParams(salt=salt, cost=COST, block_size=BLOCK_SIZE, parallelism=PARALLELISM)
    parameters = Pbes2Params(
        key_derivation=KeyDerivation(algorithm=SCRYPT, parameters=scrypt),
        encryption=Encryption(algorithm=AES_256_CBC, parameters=iv),
    )
    info = EncryptedPrivateKeyInfo(
        algorithm=EncryptionAlgorithm(algorithm=PBES2, parameters=parameters), encrypted=encrypted
    )
    lines = wrap(b64encode(asn1.encode_der(info)).decode(), 64)
    return "\n".join([f"-----BEGIN {LABEL}-----", *lines, f"-----END {LABEL}-----", ""]).encode()
