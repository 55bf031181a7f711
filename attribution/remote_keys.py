"""Keys that live elsewhere, named by a URI of securesystemslib: a file on another disk, HashiCorp Vault.

HOME/keys/NAME.uri is {"uri", "public_key"}. Everything Trailmark signs is Ed25519, so of securesystemslib 1.6's schemes
only those whose signers can be Ed25519 are taken: `file2:PATH` (an unencrypted PEM) and `hv:NAME/VERSION` (Vault's
transit engine, settings in VAULT_ADDR and VAULT_TOKEN). Importing securesystemslib takes about 150 ms, on first use.
"""

import json
from pathlib import Path
from typing import Any

from attribution.keys import PUBLIC_KEY_BYTES, SigningKey, SigningKeyError, key_id_of, verify_signature
from attribution.store import write_atomically

ED25519_SCHEMES = ("file2", "hv")
PROBE = b"trailmark key check"


class RemoteKey(SigningKey):
    """A key whose private half is behind a URI; nothing is opened before it signs."""

    def __init__(self, name: str, uri: str, public_bytes: bytes) -> None:
        self.name = name
        self.uri = uri
        self.__dict__["public_bytes"] = public_bytes  # what SigningKey computes from its private half
        self._signer: Any = None

    @classmethod
    def read(cls, path: Path) -> "RemoteKey":
        """Return the key of a NAME.uri file."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(path.stem, str(value["uri"]), public_key_of(value["public_key"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SigningKeyError(f"key file {path}: must be {{'uri', 'public_key'}} in JSON ({error})") from error

    def write(self, path: Path) -> None:
        """Write NAME.uri; the key must sign first, so that a wrong URI or public key is told now."""
        if not verify_signature(self.public_bytes, self.sign(PROBE), PROBE):
            raise SigningKeyError(f"key {self.uri}: what it signs does not match the public key {self.public_hex}")
        value = {"uri": self.uri, "public_key": self.public_hex}
        write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`; SigningKeyError says what the key's keeper said."""
        if self._signer is None:
            self._signer = _open(self.uri, self.public_bytes)
        try:
            return bytes.fromhex(self._signer.sign(message).signature)
        except Exception as error:  # each keeper raises its own: network, token, device
            raise SigningKeyError(f"key {self.name!r} ({self.uri}): it did not sign: {error}") from error


def public_key_of(text: str) -> bytes:
    """Return the 32 bytes of a public key in hex."""
    try:
        public_bytes = bytes.fromhex(text.strip())
    except ValueError:
        public_bytes = b""
    if len(public_bytes) != PUBLIC_KEY_BYTES:
        raise SigningKeyError(f"public key {text!r}: an Ed25519 public key is 64 hex digits")
    return public_bytes


def require_scheme(uri: str) -> None:
    """Raise SigningKeyError unless keys of a URI's scheme can be Ed25519."""
    scheme = uri.partition(":")[0]
    if scheme not in ED25519_SCHEMES:
        raise SigningKeyError(
            f"key URI {uri!r}: Trailmark signs with Ed25519, which securesystemslib offers for "
            f"{' and '.join(name + ':' for name in ED25519_SCHEMES)} only (gcpkms, awskms, azurekms and hsm sign with "
            "ECDSA or RSA)"
        )


def _open(uri: str, public_bytes: bytes) -> Any:
    require_scheme(uri)
    try:
        from securesystemslib.signer import Signer, SSlibKey
    except ImportError as error:
        raise SigningKeyError("key URIs need securesystemslib: pip install 'trailmark[keys]'") from error
    public_key = SSlibKey(key_id_of(public_bytes), "ed25519", "ed25519", {"public": public_bytes.hex()})
    try:
        return Signer.from_priv_key_uri(uri, public_key)
    except Exception as error:  # a missing file or library, an unreachable server: whatever its keeper raises
        raise SigningKeyError(f"key {uri}: cannot be opened: {error}") from error
