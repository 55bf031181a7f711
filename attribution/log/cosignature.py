"""Cosignatures: a witness's statement that a checkpoint is the largest consistent tree it saw of a log, and when.

Source: c2sp.org/tlog-cosignature. Ed25519 (signature type 0x04) signs "cosignature/v1", the time and the note's text;
ML-DSA-44 (type 0x06) signs a structure that also names the cosigner. Both are a timestamp of 8 bytes, big-endian, in
seconds since 1970, followed by the signature.
"""

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attribution.log.note import (
    Checkpoint,
    NoteError,
    Signs,
    format_verifier_key,
    is_key_name,
    key_hash,
    signature_line,
    split_note,
    split_verifier_key,
)

ED25519_COSIGNATURE, ML_DSA_44_COSIGNATURE = 0x04, 0x06
ALGORITHMS = {ED25519_COSIGNATURE: "Ed25519", ML_DSA_44_COSIGNATURE: "ML-DSA-44"}
KEY_BYTES = {ED25519_COSIGNATURE: 32, ML_DSA_44_COSIGNATURE: 1312}
SIGNATURE_BYTES = {ED25519_COSIGNATURE: 64, ML_DSA_44_COSIGNATURE: 2420}
TIME_BYTES = 8
MAX_TIME = 2**63 - 1
SUBTREE_LABEL = b"subtree/v1\n\0"
MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class CosignerKey:
    """A public key that may cosign checkpoints: name, signature type (0x04 or 0x06), key of 32 or 1,312 bytes."""

    name: str
    algorithm: int
    public_bytes: bytes

    def __post_init__(self) -> None:
        if not is_key_name(self.name):
            raise NoteError(f"cosigner name {self.name!r}: must be non-empty, without spaces and without '+'")
        if self.algorithm not in ALGORITHMS:
            raise NoteError(f"cosigner key {self.name}: type {self.algorithm:#04x} is neither 0x04 nor 0x06")
        if len(self.public_bytes) != KEY_BYTES[self.algorithm]:
            wanted = f"{ALGORITHMS[self.algorithm]} public key has {KEY_BYTES[self.algorithm]} bytes"
            raise NoteError(f"cosigner key {self.name}: an {wanted}, not {len(self.public_bytes)}")

    @property
    def hash_bytes(self) -> bytes:
        """The 4-byte key id."""
        return key_hash(self.name, self._typed)

    @property
    def _typed(self) -> bytes:
        return bytes([self.algorithm]) + self.public_bytes

    def __str__(self) -> str:
        """The verifier key."""
        return format_verifier_key(self.name, self._typed)

    @classmethod
    def parse(cls, text: str) -> "CosignerKey":
        """Return the key of a verifier-key string; NoteError when the parts disagree or it is no cosigner's."""
        name, typed_key = split_verifier_key(text)
        return cls(name, typed_key[0], typed_key[1:])

    def verifies(self, text: str, signature: bytes) -> bool:
        """Whether `signature` (timestamp and signature) is this cosigner's over a checkpoint's text."""
        if len(signature) != TIME_BYTES + SIGNATURE_BYTES[self.algorithm]:
            return False
        time_s = cosigned_at(signature)
        if time_s > MAX_TIME:
            return False
        try:
            message = _message(self, text, time_s)
        except NoteError:
            return False
        return _verifies(self, signature[TIME_BYTES:], message)


def cosigned_at(signature: bytes) -> int:
    """Return the time of a cosignature in seconds since 1970; 0 where a log cosigned itself without one."""
    return int.from_bytes(signature[:TIME_BYTES], "big")


class Cosigner:
    """A private key that cosigns under a name; `signer` is an Ed25519 key or an `MlDsaKey` (see mldsa.py)."""

    def __init__(self, name: str, signer: Signs) -> None:
        by_length = {length: algorithm for algorithm, length in KEY_BYTES.items()}
        self.key = CosignerKey(name, by_length[len(signer.public_bytes)], signer.public_bytes)
        self._signer = signer

    def cosign(self, note: str, time_s: int) -> str:
        """Return the signature line, newline included, over the text of a checkpoint at a time above 0.

        NoteError for extension lines under ML-DSA-44, whose message has no place for them.
        """
        if not 0 < time_s <= MAX_TIME:
            raise NoteError(f"cosignature time {time_s}: must be seconds since 1970, above 0")
        text, _ = split_note(note)
        signature = self._signer.sign(_message(self.key, text, time_s))
        return signature_line(self.key, time_s.to_bytes(TIME_BYTES, "big") + signature)


def _message(key: CosignerKey, text: str, time_s: int) -> bytes:
    """The bytes that are signed."""
    if key.algorithm == ED25519_COSIGNATURE:
        return f"cosignature/v1\ntime {time_s}\n{text}".encode()
    checkpoint = Checkpoint.parse(text)
    return b"".join(
        [
            SUBTREE_LABEL,
            _short(key.name, "cosigner name"),
            time_s.to_bytes(8, "big"),
            _short(checkpoint.origin, "log origin"),
            (0).to_bytes(8, "big"),  # the subtree starts at leaf 0: it is the whole tree
            checkpoint.size.to_bytes(8, "big"),
            checkpoint.root,
        ]
    )


def _short(text: str, what: str) -> bytes:
    """A text led by its length in one byte."""
    data = text.encode()
    if not 0 < len(data) <= MAX_NAME_BYTES:
        raise NoteError(f"{what} {text[:40]!r}: has {len(data)} bytes, ML-DSA-44 cosignatures allow 1 to 255")
    return bytes([len(data)]) + data


def _verifies(key: CosignerKey, signature: bytes, message: bytes) -> bool:
    try:
        if key.algorithm == ED25519_COSIGNATURE:
            Ed25519PublicKey.from_public_bytes(key.public_bytes).verify(signature, message)
        else:
            from attribution.log.mldsa import verify_ml_dsa

            verify_ml_dsa(key.public_bytes, signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
