"""API keys: who may call the gateway, and as which tenant.

The file keeps SHA-256 of each key, never the key. A key has 256 random bits, so a plain hash is enough: there is
nothing to guess.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs.errors import UserError

KEY_PREFIX = "tmk_"
FILE_NAME = "api_keys.json"


@dataclass(frozen=True)
class Principal:
    """Who is calling: their tenant, and whether they may see every tenant's receipts."""

    tenant: str
    is_operator: bool = False

    def may_see(self, tenant: str) -> bool:
        """Whether receipts of `tenant` are this caller's to read."""
        return self.is_operator or tenant == self.tenant


ANONYMOUS = Principal("anonymous")


@dataclass(frozen=True)
class ApiKey:
    """One key as it is kept: `sha256` hex of the secret, creation time in microseconds since 1970."""

    key_id: str
    name: str
    tenant: str
    is_operator: bool
    sha256: str
    created_us: int


Keys = list[ApiKey]


def keys_path(home: Path) -> Path:
    """Return where the keys of `home` lie."""
    return home / "run" / FILE_NAME


class ApiKeys:
    """The key file, read again when it changes; safe to change from another process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def create(self, name: str, *, tenant: str | None = None, is_operator: bool = False) -> str:
        """Add a key and return the secret: the only time it is seen. UserError when the name is taken or empty."""
        if not name.strip():
            raise UserError("apikey name '' is empty: give the key a name, for example the service that will use it")
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        key = ApiKey(f"key_{digest[:12]}", name, tenant or name, is_operator, digest, time.time_ns() // 1000)
        with self._changing() as keys:
            if any(other.name == name for other in keys):
                raise UserError(
                    f"apikey name {name!r} is taken: choose another or run `trailmark apikey revoke {name}` first"
                )
            keys.append(key)
        return secret

    def revoke(self, name_or_id: str) -> ApiKey:
        """Remove one key by its name or id; it stops working at the next request. UserError when there is none."""
        with self._changing() as keys:
            for key in keys:
                if name_or_id in (key.name, key.key_id):
                    keys.remove(key)
                    return key
        known = ", ".join(key.name for key in self.list()) or "none"
        raise UserError(f"apikey {name_or_id!r} is unknown (known: {known}): run `trailmark apikey list`")

    def list(self) -> tuple[ApiKey, ...]:
        """Return every key, oldest first."""
        self._reload()
        return self._keys

    def authenticate(self, secret: str) -> Principal | None:
        """Return who holds `secret`, or None; the time taken does not tell which key matches, nor whether any does."""
        self._reload()
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found: Principal | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = Principal(key.tenant, key.is_operator)
        return found

    def _reload(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, ()
            return
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp != self._stamp:
            self._keys = tuple(ApiKey(**entry) for entry in json.loads(self._path.read_text())["keys"])
            self._stamp = stamp

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Keys]:
        """Lock, read, let the caller change the list, then replace the file in one step, readable by its owner only."""
        for folder in (self._path.parent.parent, self._path.parent):  # a parent made in passing would get 0755
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._reload()
            keys = [replace(key) for key in self._keys]
            yield keys
            self._write(keys)
        finally:
            os.close(descriptor)

    def _write(self, keys: Keys) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"v": 1, "keys": [asdict(key) for key in keys]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
