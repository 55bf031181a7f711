"""Signed notes and checkpoints: the text a log signs.

Sources: c2sp.org/signed-note@v1.0.0 (Ed25519, signature type 0x01) and c2sp.org/tlog-checkpoint.
"""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ED25519_TYPE = b"\x01"
SIGNATURE_PREFIX = "\u2014 "
MAX_SIGNATURES = 64


class NoteError(ValueError):
    """A note or checkpoint that is malformed, or that no trusted key signed."""


class Signs(Protocol):
    """What a note needs of a key."""

    @property
    def public_bytes(self) -> bytes: ...

    def sign(self, message: bytes) -> bytes: ...


def decode_base64(text: str, *, what: str) -> bytes:
    """Decode standard base64, refusing any text that encoding the result would not give back (stray bits, spaces)."""
    try:
        data = b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoteError(f"{what}: not base64") from error
    if b64encode(data).decode() != text:
        raise NoteError(f"{what}: base64 is not canonical")
    return data


def _key_hash(name: str, public_bytes: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + ED25519_TYPE + public_bytes).digest()[:4]


@dataclass(frozen=True)
class NoteKey:
    """A public key that may sign notes: a name without spaces or plus, and 32 bytes of Ed25519."""

    name: str
    public_bytes: bytes

    def __post_init__(self) -> None:
        if not self.name or "+" in self.name or any(char.isspace() or ord(char) < 32 for char in self.name):
            raise NoteError(f"key name {self.name!r}: must be non-empty, without spaces and without '+'")
        if len(self.public_bytes) != 32:
            raise NoteError(f"key {self.name}: an Ed25519 public key has 32 bytes, not {len(self.public_bytes)}")

    @property
    def hash_bytes(self) -> bytes:
        """The 4-byte key id of the specification."""
        return _key_hash(self.name, self.public_bytes)

    def __str__(self) -> str:
        """The verifier key: NAME+HASH+BASE64(0x01 || public key)."""
        return f"{self.name}+{self.hash_bytes.hex()}+{b64encode(ED25519_TYPE + self.public_bytes).decode()}"

    @classmethod
    def parse(cls, text: str) -> "NoteKey":
        """Return the key of a verifier-key string; NoteError when the parts disagree."""
        name, _, rest = text.partition("+")
        hash_hex, _, encoded = rest.partition("+")
        data = decode_base64(encoded, what="verifier key")
        if data[:1] != ED25519_TYPE:
            raise NoteError("verifier key: only Ed25519 (type 0x01) is supported")
        key = cls(name, data[1:])
        if key.hash_bytes.hex() != hash_hex:
            raise NoteError(f"verifier key {name}: its hash {hash_hex} does not match its key")
        return key


def sign_note(text: str, *, name: str, signer: Signs) -> str:
    """Return `text` (which ends in a newline) followed by a blank line and one signature line."""
    if not text.endswith("\n"):
        raise NoteError("note text must end in a newline")
    signature = _key_hash(name, signer.public_bytes) + signer.sign(text.encode())
    return f"{text}\n{SIGNATURE_PREFIX}{name} {b64encode(signature).decode()}\n"


def open_note(note: str, trusted: Iterable[NoteKey]) -> str:
    """Return the text of a note that at least one trusted key signed.

    Signatures of unknown keys are ignored; a bad signature by a known key condemns the note.
    """
    text, lines = _split_note(note)
    keys = {(key.name, key.hash_bytes): key for key in trusted}
    verified = False
    for line in lines:
        name, signature = _parse_signature(line)
        key = keys.get((name, signature[:4]))
        if key is None:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(key.public_bytes).verify(signature[4:], text.encode())
        except InvalidSignature as error:
            raise NoteError(f"note: the signature of {name} is wrong") from error
        verified = True
    if not verified:
        names = ", ".join(sorted(name for name, _ in keys)) or "none"
        raise NoteError(f"note: no signature by a trusted key (trusted: {names})")
    return text


def _split_note(note: str) -> tuple[str, list[str]]:
    """The text and the signature lines, parted by the last empty line."""
    if any(ord(char) < 32 and char != "\n" for char in note):
        raise NoteError("note: holds a control character")
    head, separator, tail = note.rpartition("\n\n")
    if not separator or not tail.endswith("\n"):
        raise NoteError("note: no blank line before the signatures, or no newline at the end")
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise NoteError(f"note: more than {MAX_SIGNATURES} signatures")
    return head + "\n", lines


def _parse_signature(line: str) -> tuple[str, bytes]:
    name, _, encoded = line.removeprefix(SIGNATURE_PREFIX).partition(" ")
    if not line.startswith(SIGNATURE_PREFIX) or not name or not encoded:
        raise NoteError("note: malformed signature line")
    signature = decode_base64(encoded, what=f"signature of {name}")
    if len(signature) < 5:
        raise NoteError(f"note: the signature of {name} is too short")
    return name, signature


@dataclass(frozen=True)
class Checkpoint:
    """A log's tree head: who, how many leaves, which root (32 bytes)."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> "Checkpoint":
        """Return the checkpoint of a note's text; extension lines are refused, for no monitor could audit them."""
        lines = text.split("\n")
        if len(lines) != 4 or lines[3]:
            raise NoteError("checkpoint: must have exactly three lines: origin, size, root")
        if not (lines[1].isascii() and lines[1].isdigit()) or str(int(lines[1])) != lines[1]:
            raise NoteError(f"checkpoint: tree size {lines[1]!r} is not a plain decimal number")
        root = decode_base64(lines[2], what="checkpoint root")
        if not lines[0] or len(root) != 32:
            raise NoteError("checkpoint: empty origin, or a root that is not 32 bytes")
        return cls(lines[0], int(lines[1]), root)


def sign_checkpoint(checkpoint: Checkpoint, signer: Signs) -> str:
    """Return the checkpoint as a note signed under the log's origin."""
    return sign_note(checkpoint.text(), name=checkpoint.origin, signer=signer)


def open_checkpoint(note: str, key: NoteKey, *former: NoteKey) -> Checkpoint:
    """Return the checkpoint of a note signed by the log `key`, or one it had before; the origin is the key's name."""
    checkpoint = Checkpoint.parse(open_note(note, [key, *former]))
    if checkpoint.origin != key.name:
        raise NoteError(f"checkpoint: origin {checkpoint.origin!r} is not the trusted log {key.name!r}")
    return checkpoint
