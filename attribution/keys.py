"""Ed25519 signing keys of the operator, the log and the contributors, in files only their owner may read.

A key id is securesystemslib's: the SHA-256 of the public key's canonical JSON.
"""

import os
import re
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from configs.errors import UserError

KEY_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9])?")
PUBLIC_KEY_BYTES = 32


class SigningKeyError(UserError):
    """A key that is missing, readable by others, or already there."""


def key_id_of(public_bytes: bytes) -> str:
    """Return the key id (64 hex digits) of an Ed25519 public key of 32 bytes."""
    description: Any = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public_bytes.hex()}}
    return sha256(rfc8785.dumps(description)).hexdigest()


def verify_signature(public_bytes: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether `signature` over `message` was made with the private half of `public_bytes`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_bytes).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class SigningKey:
    """A named Ed25519 private key; immutable."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey) -> None:
        self.name = name
        self._private_key = private_key

    @classmethod
    def generate(cls, name: str) -> "SigningKey":
        """Return a fresh key from the system's randomness."""
        return cls(name, Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, name: str, seed: bytes) -> "SigningKey":
        """Return the key of a 32-byte seed (RFC 8032): for keys kept elsewhere, and for tests."""
        return cls(name, Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Return the key of a PKCS8 PEM file; refused when anyone but the owner may read it."""
        try:
            mode = path.stat().st_mode
            pem = path.read_bytes()
        except FileNotFoundError as error:
            raise SigningKeyError(f"key file {path}: not found; create the key first") from error
        if mode & 0o077:
            raise SigningKeyError(f"key file {path}: mode {mode & 0o777:o} lets others read it; run chmod 600 {path}")
        try:
            private_key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise SigningKeyError(f"key file {path}: not an unencrypted PEM private key") from error
        if not isinstance(private_key, Ed25519PrivateKey):
            raise SigningKeyError(f"key file {path}: holds no Ed25519 key; Trailmark signs with Ed25519")
        return cls(path.name.removesuffix(".key"), private_key)

    def save(self, path: Path) -> None:
        """Write PKCS8 PEM with mode 0600 and the public key in hex beside it (.pub); never overwrites a key."""
        pem = self._private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise SigningKeyError(f"key file {path}: exists already; a key is never overwritten") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        path.with_name(path.name.removesuffix(".key") + ".pub").write_text(f"{self.public_hex}\n")

    @cached_property
    def public_bytes(self) -> bytes:
        """The public key, 32 bytes."""
        return self._private_key.public_key().public_bytes_raw()

    @property
    def public_hex(self) -> str:
        """The public key, 64 hex digits."""
        return self.public_bytes.hex()

    @cached_property
    def key_id(self) -> str:
        """The key id, 64 hex digits."""
        return key_id_of(self.public_bytes)

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`, 64 bytes."""
        return self._private_key.sign(message)


class KeyRing:
    """The keys of one home folder, by name: HOME/keys/NAME.key and NAME.pub."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "keys"
        self._loaded: dict[str, SigningKey] = {}

    def create(self, name: str) -> SigningKey:
        """Create, save and return a key; refused when the name is taken or cannot be a file name."""
        path = self._path(name)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = SigningKey.generate(name)
        key.save(path)
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._loaded[name] = key
        return key

    def get(self, name: str) -> SigningKey:
        """Return the key of `name`; SigningKeyError lists the names there are."""
        if name not in self._loaded:
            path = self._path(name)
            if not path.is_file():
                known = ", ".join(self.list()) or "none"
                raise SigningKeyError(f"key {name!r}: not in {self.directory}; known keys: {known}")
            self._loaded[name] = SigningKey.load(path)
        return self._loaded[name]

    def has(self, name: str) -> bool:
        """Return whether there is a private key of that name."""
        return self._path(name).is_file()

    def list(self) -> list[str]:
        """Return the names of all private keys, sorted."""
        return sorted(path.name.removesuffix(".key") for path in self.directory.glob("*.key"))

    def _path(self, name: str) -> Path:
        if not KEY_NAME.fullmatch(name):
            raise SigningKeyError(
                f"key name {name!r}: 1 to 64 letters, digits, spaces, '.', '_' or '-', a letter or digit at both ends"
            )
        return self.directory / f"{name}.key"
