"""Ed25519 signing keys of the operator, the log and the contributors, in files only their owner may read.

A key id is securesystemslib's: the SHA-256 of the public key's canonical JSON. A file may be under a passphrase (see
key_pem.py) or name a key kept elsewhere (see remote_keys.py); either is opened when it first signs.
"""

import getpass
import os
import re
from collections.abc import Iterator
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

from configs import env
from configs.errors import UserError

KEY_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9])?")
PUBLIC_KEY_BYTES = 32
KEY_ENDING, PUBLIC_ENDING, URI_ENDING = ".key", ".pub", ".uri"
FORMER_FOLDER = "former"  # keys that were rotated out: they sign nothing any more
NEXT_FOLDER = "next"  # keys about to take another's place
ENCRYPTED_MARK = b"ENCRYPTED PRIVATE KEY"


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
        """Return the key of a PKCS8 PEM file; refused when anyone but the owner may read it.

        A file under a passphrase is opened when the key first signs, if its public half lies beside it.
        """
        pem = _read_private(path)
        if ENCRYPTED_MARK in pem:
            return LockedKey(path)
        try:
            private_key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise SigningKeyError(f"key file {path}: not a PEM private key") from error
        if not isinstance(private_key, Ed25519PrivateKey):
            raise SigningKeyError(f"key file {path}: holds no Ed25519 key; Trailmark signs with Ed25519")
        return cls(path.name.removesuffix(KEY_ENDING), private_key)

    def save(self, path: Path, *, passphrase: str | None = None) -> None:
        """Write PKCS8 PEM with mode 0600 and the public key in hex beside it (.pub); never overwrites a key."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise SigningKeyError(f"key file {path}: exists already; a key is never overwritten") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.pem(passphrase))
            file.flush()
            os.fsync(file.fileno())
        path.with_name(path.name.removesuffix(KEY_ENDING) + PUBLIC_ENDING).write_text(f"{self.public_hex}\n")

    def pem(self, passphrase: str | None = None) -> bytes:
        """Return the private key as PKCS8 PEM, under `passphrase` if one is given."""
        if passphrase is None:
            return self._private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        from attribution.key_pem import encrypt_pkcs8

        der = self._private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return encrypt_pkcs8(der, passphrase.encode())

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


class LockedKey(SigningKey):
    """A key in a file under a passphrase: known by its public half, unlocked when it first signs."""

    def __init__(self, path: Path) -> None:
        self.name = path.name.removesuffix(KEY_ENDING)
        self._path = path
        public_file = path.with_name(self.name + PUBLIC_ENDING)
        try:
            self.__dict__["public_bytes"] = bytes.fromhex(public_file.read_text().strip())
        except (OSError, ValueError) as error:
            raise SigningKeyError(f"key file {public_file}: must hold the public key of {path.name} in hex") from error

    @cached_property
    def _private_key(self) -> Ed25519PrivateKey:  # type: ignore[override]
        passphrase = passphrase_for(self.name)
        try:
            private_key = load_pem_private_key(_read_private(self._path), password=passphrase.encode())
        except (ValueError, TypeError) as error:
            raise SigningKeyError(f"key {self.name!r}: the passphrase does not open {self._path}") from error
        if not isinstance(private_key, Ed25519PrivateKey):
            raise SigningKeyError(f"key file {self._path}: holds no Ed25519 key; Trailmark signs with Ed25519")
        if private_key.public_key().public_bytes_raw() != self.public_bytes:
            raise SigningKeyError(
                f"key file {self._path}: its public half is not the one in {self.name}{PUBLIC_ENDING}"
            )
        return private_key


def passphrase_for(name: str) -> str:
    """Return the passphrase of a key: $TRAILMARK_KEY_PASSPHRASE, else what the user types."""
    passphrase = env.key_passphrase()
    if passphrase is not None:
        return passphrase
    if not env.is_interactive():
        raise SigningKeyError(
            f"key {name!r}: it is under a passphrase; set TRAILMARK_KEY_PASSPHRASE, there is no terminal to ask at"
        )
    return getpass.getpass(f"Passphrase of key {name}: ")


class KeyRing:
    """The keys of one home folder, by name: HOME/keys/NAME.key and NAME.pub, or NAME.uri for one kept elsewhere."""

    def __init__(self, home: Path, directory: Path | None = None) -> None:
        self.directory = directory or home / "keys"
        self._loaded: dict[str, tuple[tuple[str, int, int], SigningKey]] = {}

    def create(self, name: str) -> SigningKey:
        """Create, save and return a key; refused when the name is taken or cannot be a file name."""
        path = self._path(name)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        SigningKey.generate(name).save(path)
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return self.get(name)

    def get(self, name: str) -> SigningKey:
        """Return the key of `name`, read again when its file was replaced; SigningKeyError lists the known names."""
        path = self.file_of(name)
        if path is None:
            known = ", ".join(self.list()) or "none"
            raise SigningKeyError(f"key {name!r}: not in {self.directory}; known keys: {known}")
        found = path.stat()
        stamp = (path.name, found.st_mtime_ns, found.st_ino)
        if name not in self._loaded or self._loaded[name][0] != stamp:
            self._loaded[name] = (stamp, self._read(path))
        return self._loaded[name][1]

    def has(self, name: str) -> bool:
        """Return whether there is a private key of that name, here or elsewhere."""
        return self.file_of(name) is not None

    def list(self) -> list[str]:
        """Return the names of all keys, sorted."""
        endings = (KEY_ENDING, URI_ENDING)
        return sorted({path.name.removesuffix(path.suffix) for ending in endings for path in self._files(ending)})

    def file_of(self, name: str) -> Path | None:
        """Return the file of a key, NAME.uri or NAME.key, None when there is none."""
        path = self._path(name)
        choices = (path.with_name(name + URI_ENDING), path)
        return next((file for file in choices if file.is_file()), None)

    def _files(self, ending: str) -> Iterator[Path]:
        return self.directory.glob(f"*{ending}")

    @staticmethod
    def _read(path: Path) -> SigningKey:
        if path.suffix != URI_ENDING:
            return SigningKey.load(path)
        from attribution.remote_keys import RemoteKey

        return RemoteKey.read(path)

    def _path(self, name: str) -> Path:
        if not KEY_NAME.fullmatch(name):
            raise SigningKeyError(
                f"key name {name!r}: 1 to 64 letters, digits, spaces, '.', '_' or '-', a letter or digit at both ends"
            )
        return self.directory / f"{name}{KEY_ENDING}"


def encrypt_key_file(keys: KeyRing, name: str, passphrase: str) -> None:
    """Put a key's file under a passphrase, whole or not at all.

    Raises:
        SigningKeyError: no such key, one that is encrypted or elsewhere, or an empty passphrase.
    """
    from attribution.store import write_atomically

    if not passphrase:
        raise SigningKeyError("passphrase: empty; choose one of several words")
    key, path = keys.get(name), keys.file_of(name)
    assert path is not None, "a key that was read has a file"
    if path.suffix != KEY_ENDING or isinstance(key, LockedKey):
        raise SigningKeyError(f"key {name!r}: {path.name} holds no private key in the open; nothing to encrypt")
    path.with_name(name + PUBLIC_ENDING).write_text(f"{key.public_hex}\n")
    write_atomically(path, key.pem(passphrase))


def _read_private(path: Path) -> bytes:
    """The bytes of a private key file that only its owner may read."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise SigningKeyError(f"key file {path}: not found; create the key first") from error
    if mode & 0o077:
        raise SigningKeyError(f"key file {path}: mode {mode & 0o777:o} lets others read it; run chmod 600 {path}")
    return data
