"""ML-DSA-44 (FIPS 204) keys of witnesses, where the installed `cryptography` offers them (47 or newer, OpenSSL 3.5)."""

import os
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey, MLDSA44PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from attribution.keys import SigningKeyError


class MlDsaKey:
    """An ML-DSA-44 private key; immutable."""

    def __init__(self, private_key: MLDSA44PrivateKey) -> None:
        self._private_key = private_key

    @classmethod
    def generate(cls) -> "MlDsaKey":
        """Return a fresh key; SigningKeyError where this build of `cryptography` has no ML-DSA."""
        try:
            return cls(MLDSA44PrivateKey.generate())
        except UnsupportedAlgorithm as error:
            raise SigningKeyError("ML-DSA-44: not in this build of cryptography; leave --ml-dsa out") from error

    @classmethod
    def from_seed(cls, seed: bytes) -> "MlDsaKey":
        """Return the key of a 32-byte seed: for tests."""
        return cls(MLDSA44PrivateKey.from_seed_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> "MlDsaKey":
        """Return the key of a PKCS8 PEM file; refused when anyone but the owner may read it."""
        mode = path.stat().st_mode
        if mode & 0o077:
            raise SigningKeyError(f"key file {path}: mode {mode & 0o777:o} lets others read it; run chmod 600 {path}")
        try:
            private_key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SigningKeyError(f"key file {path}: not an unencrypted ML-DSA private key") from error
        if not isinstance(private_key, MLDSA44PrivateKey):
            raise SigningKeyError(f"key file {path}: holds no ML-DSA-44 key")
        return cls(private_key)

    def save(self, path: Path) -> None:
        """Write PKCS8 PEM with mode 0600, durable on return; never overwrites a key."""
        pem = self._private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())

    @cached_property
    def public_bytes(self) -> bytes:
        """The public key, 1,312 bytes."""
        return self._private_key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the signature of `message` under an empty context, 2,420 bytes; it differs from call to call."""
        return self._private_key.sign(message)


def verify_ml_dsa(public_bytes: bytes, signature: bytes, message: bytes) -> None:
    """Raise InvalidSignature unless `signature` over `message` is by the key of `public_bytes`."""
    MLDSA44PublicKey.from_public_bytes(public_bytes).verify(signature, message)
