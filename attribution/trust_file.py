"""HOME/trust.json as the operator's own programs keep it: which key signs the log now, and what came before.

Its form, and what a reader makes of it, is log/trust.py's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attribution.bodies import KeyRevocationBody, KeyRotationBody
from attribution.disk import write_atomically
from attribution.keys import KeyRing
from attribution.log.note import NoteKey, Signs
from attribution.log.policy import with_log_key
from attribution.log.sequencer import LogKeys
from attribution.log.trust import trust_bytes

OPERATOR, LOG_KEY = "operator", "log"
TRUST_FILE = "trust.json"
TRUST_VERSION = 1


class TrustFile:
    """One home's trust.json, read again whenever it was replaced.

    `log_signer` signs in place of the log key in the home, with the same key kept elsewhere.
    """

    def __init__(self, home: Path, *, log_signer: Signs | None = None) -> None:
        self._log_signer = log_signer
        self._path = home / TRUST_FILE
        self._keys = KeyRing(home)
        self._stamp: tuple[int, int] | None = None
        self._log_keys: LogKeys | None = None

    def log_keys(self) -> LogKeys:
        """Return the keys of the log: one `stat` unless the file is new."""
        found = self._path.stat()
        stamp = (found.st_mtime_ns, found.st_ino)
        if self._log_keys is None or stamp != self._stamp:
            value = self.read()
            key = NoteKey.parse(value["log"])
            signer = self._log_signer or (self._keys.get(LOG_KEY) if self._keys.has(LOG_KEY) else None)
            if signer is not None and signer.public_bytes != key.public_bytes:
                signer = None  # a rotation was cut off between file and file; `finish_rotations` ends it
            self._log_keys, self._stamp = LogKeys(key, signer, _former_logs(value)), None if signer is None else stamp
        return self._log_keys

    def known_keys(self) -> tuple[NoteKey, ...]:
        """Return the log's key and those it had before, newest first, without asking for any private half."""
        value = self.read()
        return (NoteKey.parse(value["log"]), *_former_logs(value))

    def read(self) -> dict[str, Any]:
        """Return the file's JSON."""
        value: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return value

    def rotate_log(self, public_bytes: bytes, *, last_size: int, record: bytes) -> None:
        """Put a new log key in the place of the old one, which signed up to `last_size` entries. Safe to repeat."""
        value = self.read()
        old = NoteKey.parse(value["log"])
        if old.public_bytes == public_bytes:
            return
        new = NoteKey(old.name, public_bytes)
        value["log"] = str(new)
        if "policy" in value:
            value["policy"] = with_log_key(value["policy"], new)
        self._add(value, "former", {"role": "log", "log": str(old), "last_size": last_size}, record)

    def rotate_operator(self, body: KeyRotationBody, *, time_us: int, record: bytes) -> None:
        """Put a new operator key in the place of the old one. Safe to repeat."""
        value = self.read()
        old_public = value["keys"].pop(body.old_key_id, None)
        if old_public is None:
            return
        value["keys"][body.key_id] = body.public_key
        former = {"role": "operator", "key_id": body.old_key_id, "public_key": old_public, "until_us": time_us}
        self._add(value, "former", former, record)

    def revoke(self, body: KeyRevocationBody, *, record: bytes) -> None:
        """Note that a key's signatures do not count from a time on."""
        entry = {"key_id": body.key_id, "from_us": body.from_us, "reason": body.reason}
        self._add(self.read(), "revoked", entry, record)

    def _add(self, value: dict[str, Any], name: str, entry: dict[str, Any], record: bytes) -> None:
        """Add an entry with the signed record (an envelope's bytes) that it comes from."""
        value[name] = [{**entry, "record": json.loads(record)}, *value.get(name, [])]
        write_atomically(self._path, trust_bytes(value))


def _former_logs(value: Mapping[str, Any]) -> tuple[NoteKey, ...]:
    return tuple(NoteKey.parse(key["log"]) for key in value.get("former", []) if key["role"] == "log")
