"""Signed notes and checkpoints: the text a log signs.

Sources: c2sp.org/signed-note@v1.0.0 (Ed25519, signature type 0x01) and c2sp.org/tlog-checkpoint@v1.0.0.
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


class Verifies(Protocol):
    """What a note needs of a key that somebody trusts."""

    @property
    def name(self) -> str: ...

    @property
    def hash_bytes(self) -> bytes: ...

    def verifies(self, text: str, signature: bytes) -> bool: ...


def decode_base64(text: str, *, what: str) -> bytes:
    """Decode standard base64, refusing any text that encoding the result would not give back (stray bits, spaces)."""
    try:
        data = b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoteError(f"{what}: not base64") from error
    if b64encode(data).decode() != text:
        raise NoteError(f"{what}: base64 is not canonical")
    return data


def is_decimal(text: str) -> bool:
    """Whether a text is an ASCII decimal number without leading zeroes, of at most 19 digits (63 bits)."""
    return text.isascii() and text.isdigit() and len(text) <= 19 and (text == "0" or text[0] != "0")


def key_hash(name: str, typed_key: bytes) -> bytes:
    """Return the 4-byte key id of a name and a key, the key led by its signature type byte."""
    return sha256(name.encode() + b"\n" + typed_key).digest()[:4]


def is_key_name(name: str) -> bool:
    """Whether a text may be a key's name: not empty, and without spaces, control characters and plus."""
    return bool(name) and "+" not in name and not any(char.isspace() or ord(char) < 32 for char in name)


def format_verifier_key(name: str, typed_key: bytes) -> str:
    """Return NAME+HASH+BASE64(type || public key)."""
    return f"{name}+{key_hash(name, typed_key).hex()}+{b64encode(typed_key).decode()}"


def split_verifier_key(text: str) -> tuple[str, bytes]:
    """Return the name and the typed key (type || public key) of a verifier key; NoteError when its parts disagree."""
    name, _, rest = text.partition("+")
    hash_hex, _, encoded = rest.partition("+")
    typed_key = decode_base64(encoded, what="verifier key")
    if not is_key_name(name) or len(typed_key) < 2:
        raise NoteError("verifier key: must be NAME+HASH+BASE64, the name without spaces")
    if key_hash(name, typed_key).hex() != hash_hex:
        raise NoteError(f"verifier key {name}: its hash {hash_hex} does not match its key")
    return name, typed_key


def signature_line(key: Verifies, signature: bytes) -> str:
    """Return the line, newline included, by which `key` signs a note with `signature`."""
    return f"{SIGNATURE_PREFIX}{key.name} {b64encode(key.hash_bytes + signature).decode()}\n"


@dataclass(frozen=True)
class NoteKey:
    """A public key that may sign notes: a name without spaces or plus, and 32 bytes of Ed25519."""

    name: str
    public_bytes: bytes

    def __post_init__(self) -> None:
        if not is_key_name(self.name):
            raise NoteError(f"key name {self.name!r}: must be non-empty, without spaces and without '+'")
        if len(self.public_bytes) != 32:
            raise NoteError(f"key {self.name}: an Ed25519 public key has 32 bytes, not {len(self.public_bytes)}")

    @property
    def hash_bytes(self) -> bytes:
        """The 4-byte key id of the specification."""
        return key_hash(self.name, ED25519_TYPE + self.public_bytes)

    def __str__(self) -> str:
        """The verifier key: NAME+HASH+BASE64(0x01 || public key)."""
        return format_verifier_key(self.name, ED25519_TYPE + self.public_bytes)

    def verifies(self, text: str, signature: bytes) -> bool:
        """Whether `signature` (64 bytes) is this key's over the note's text."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_bytes).verify(signature, text.encode())
        except InvalidSignature:
            return False
        return True

    @classmethod
    def parse(cls, text: str) -> "NoteKey":
        """Return the key of a verifier-key string; NoteError when the parts disagree."""
        name, typed_key = split_verifier_key(text)
        if typed_key[:1] != ED25519_TYPE:
            raise NoteError("verifier key: only Ed25519 (type 0x01) is supported")
        return cls(name, typed_key[1:])


def sign_note(text: str, *, name: str, signer: Signs) -> str:
    """Return `text` (which ends in a newline) followed by a blank line and one signature line."""
    if not text.endswith("\n"):
        raise NoteError("note text must end in a newline")
    return f"{text}\n{signature_line(NoteKey(name, signer.public_bytes), signer.sign(text.encode()))}"


def open_note(note: str, trusted: Iterable[Verifies]) -> str:
    """Return the text of a note that at least one trusted key signed; NoteError as `verified_signatures`."""
    keys = list(trusted)
    text, signatures = verified_signatures(note, keys)
    if not signatures:
        names = ", ".join(sorted(key.name for key in keys)) or "none"
        raise NoteError(f"note: no signature by a trusted key (trusted: {names})")
    return text


def verified_signatures(note: str, trusted: Iterable[Verifies]) -> tuple[str, dict[str, bytes]]:
    """Return the text and, by `str(key)`, the signatures of those trusted keys that signed.

    Signatures of unknown keys are ignored; a bad signature by a known key condemns the note (NoteError).
    """
    text, lines = split_note(note)
    keys = {(key.name, key.hash_bytes): key for key in trusted}
    found: dict[str, bytes] = {}
    for line in lines:
        name, signature = parse_signature_line(line)
        key = keys.get((name, signature[:4]))
        if key is None:
            continue
        if not key.verifies(text, signature[4:]):
            raise NoteError(f"note: the signature of {name} is wrong")
        found[str(key)] = signature[4:]
    return text, found


def split_note(note: str) -> tuple[str, list[str]]:
    """Return the text and the signature lines, parted by the last empty line."""
    if any(ord(char) < 32 and char != "\n" for char in note):
        raise NoteError("note: holds a control character")
    head, separator, tail = note.rpartition("\n\n")
    if not separator or not tail.endswith("\n"):
        raise NoteError("note: no blank line before the signatures, or no newline at the end")
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise NoteError(f"note: more than {MAX_SIGNATURES} signatures")
    return head + "\n", lines


def parse_signature_line(line: str) -> tuple[str, bytes]:
    """Return the name and the bytes (key id of 4, then the signature) of a signature line; NoteError for any other."""
    name, _, encoded = line.removeprefix(SIGNATURE_PREFIX).partition(" ")
    if not line.startswith(SIGNATURE_PREFIX) or not is_key_name(name) or not encoded:
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
    def parse(cls, text: str, *, with_extensions: bool = False) -> "Checkpoint":
        """Return the checkpoint of a note's text.

        Extension lines are refused, for no monitor could audit them; a witness, which cosigns for other people's logs,
        takes them and leaves them out.
        """
        lines = text.split("\n")
        is_whole = len(lines) == 4 or (with_extensions and len(lines) > 4 and all(lines[:-1]))
        if not is_whole or lines[-1]:
            raise NoteError("checkpoint: must have exactly three lines: origin, size, root")
        if not is_decimal(lines[1]):
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
