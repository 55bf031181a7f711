"""Whom a reader trusts: trust.json, which an operator hands out and a reader keeps.

{"version": 1, "log": verifier key, "keys": {key id: public key in hex}} and, once keys have changed,
"former": [{"role": "operator", "key_id", "public_key", "until_us"} or {"role": "log", "log", "last_size"}],
"revoked": [{"key_id", "from_us", "reason"}]. With these, receipts of the time before a rotation verify too.
"policy": tlog-policy text, when witnesses must have cosigned the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attribution.keys import PUBLIC_KEY_BYTES, key_id_of
from attribution.log.key_history import KeyHistory, KnownKey, LogKey, Revocation
from attribution.log.note import NoteKey
from attribution.log.policy import Policy, PolicyError
from attribution.log.proved import VerifyError
from attribution.records import RecordError, parse_strict

TRUST_VERSION = 1
TRUST_FIELDS = ("former", "keys", "log", "policy", "revoked", "version")


@dataclass(frozen=True)
class Trust:
    """The log's key for checkpoints, the operator's keys (id -> 32 bytes) for records; those before them, and when.

    `policy`, when there is one, names the witnesses and how many of them must have cosigned the checkpoint.
    """

    log: NoteKey
    keys: Mapping[str, bytes]
    former_logs: tuple[LogKey, ...] = ()
    former_keys: tuple[KnownKey, ...] = ()
    revoked: Mapping[str, Revocation] = field(default_factory=dict)
    policy: Policy | None = None

    @classmethod
    def load(cls, path: Path) -> "Trust":
        """Return the trust of a file; VerifyError says what is wrong with it."""
        try:
            value = parse_strict(path.read_bytes(), "trust")
        except FileNotFoundError as error:
            raise VerifyError("keys", f"{path}: not found; give the log's trust.json with --keys FILE") from error
        except RecordError as error:
            raise VerifyError("keys", f"{path}: {error}") from error
        if not isinstance(value, dict) or value.get("version") != TRUST_VERSION:
            raise VerifyError("keys", f"{path}: must be a trust file of version {TRUST_VERSION}")
        unknown = sorted(value.keys() - set(TRUST_FIELDS))
        if unknown:
            raise VerifyError("keys", f"{path}: unknown fields {', '.join(unknown)}; known: {', '.join(TRUST_FIELDS)}")
        try:
            trust = cls.of(value)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise VerifyError("keys", f"{path}: must hold 'log' and 'keys' ({error})") from error
        former = {key.key_id: key.public_bytes for key in trust.former_keys}
        for key_id, public_bytes in [*trust.keys.items(), *former.items()]:
            if len(public_bytes) != PUBLIC_KEY_BYTES or key_id_of(public_bytes) != key_id:
                raise VerifyError("keys", f"{path}: key {key_id} does not match its public key")
        return trust if "policy" not in value else trust.under(value["policy"], str(path))

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Trust":
        """Return the trust of a parsed file."""
        former, revoked = value.get("former", []), value.get("revoked", [])
        return cls(
            NoteKey.parse(value["log"]),
            {key_id: _plain_hex(public_hex) for key_id, public_hex in value["keys"].items()},
            tuple(LogKey(NoteKey.parse(key["log"]), key["last_size"]) for key in former if key["role"] == "log"),
            tuple(
                KnownKey(key["key_id"], _plain_hex(key["public_key"]), "operator", until_us=key["until_us"])
                for key in former
                if key["role"] == "operator"
            ),
            {key["key_id"]: Revocation(key["from_us"], key["reason"]) for key in revoked},
        )

    def with_policy_of(self, path: Path) -> "Trust":
        """Return this trust with the policy of a tlog-policy file."""
        try:
            return self.under(path.read_text(encoding="utf-8", errors="surrogateescape"), str(path))
        except OSError as error:
            raise VerifyError("policy", f"{path}: cannot be read: {error.strerror}") from error

    def under(self, policy: Any, source: str) -> "Trust":
        """Return this trust with a policy's text in the place of its own; its logs, if it names any, must be ours."""
        try:
            parsed = Policy.parse(policy.encode(errors="surrogateescape"))
        except (PolicyError, AttributeError, UnicodeError) as error:
            raise VerifyError("policy", f"{source}: {error}") from error
        ours = {str(key) for key in (self.log, *(former.key for former in self.former_logs))}
        if parsed.logs and ours.isdisjoint(str(log.key) for log in parsed.logs):
            raise VerifyError("policy", f"{source}: is for other logs than {self.log.name}")
        return replace(self, policy=parsed)

    def history(self) -> KeyHistory:
        """Return the keys as they are known before any record was read."""
        operator = [KnownKey(key_id, public_bytes, "operator") for key_id, public_bytes in self.keys.items()]
        return KeyHistory([*operator, *self.former_keys], [LogKey(self.log), *self.former_logs], self.revoked)


def _plain_hex(text: str) -> bytes:
    """The bytes of hex without capitals or spaces. ValueError for any other text."""
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("hex with capitals or spaces")
    return data
