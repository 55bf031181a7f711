"""Whom a reader trusts: trust.json, which an operator hands out and a reader keeps.

{"version": 1, "log": verifier key, "keys": {key id: public key in hex}} and, once keys have changed,
"former": [{"role": "operator", "key_id", "public_key", "until_us"} or {"role": "log", "log", "last_size"}],
"revoked": [{"key_id", "from_us", "reason"}], each with the signed "record" of the log that it repeats (files of older
versions lack that). With these, receipts of the time before a rotation verify too.
"policy": tlog-policy text, when witnesses must have cosigned the checkpoint.

The file is what a reader starts from, so no signature can vouch for all of it. What can be checked is: it has one
form, byte by byte; ids are those of their keys; entries say what the records in them and in a proof's notices say.
The rest is for its digest, which a reader may demand.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from attribution.bodies import KeyRevocationBody, KeyRotationBody
from attribution.keys import PUBLIC_KEY_BYTES, key_id_of
from attribution.log.key_history import KeyHistory, KnownKey, LogKey, Revocation
from attribution.log.note import NoteKey
from attribution.log.policy import LOCAL_MARK, Policy, PolicyError, plain_text
from attribution.log.proved import ProvedRecord, VerifyError
from attribution.records import Record, RecordError, canonical_bytes, parse_strict, record_from_envelope, signers_of

TRUST_VERSION = 1
TRUST_FIELDS = ("former", "keys", "log", "policy", "revoked", "version")
FORMER_FIELDS = {"operator": {"role", "key_id", "public_key", "until_us"}, "log": {"role", "log", "last_size"}}
REVOKED_FIELDS = {"key_id", "from_us", "reason"}


@dataclass(frozen=True)
class Trust:
    """The log's key for checkpoints, the operator's keys (id -> 32 bytes) for records; those before them, and when.

    `policy`, when there is one, names the witnesses and how many of them must have cosigned the checkpoint; `digest` is
    that of the file.
    """

    log: NoteKey
    keys: Mapping[str, bytes]
    former_logs: tuple[LogKey, ...] = ()
    former_keys: tuple[KnownKey, ...] = ()
    revocations: tuple[tuple[str, Revocation], ...] = ()
    policy: Policy | None = None
    digest: str = ""

    @classmethod
    def load(cls, path: Path, *, digest: str | None = None) -> "Trust":
        """Return the trust of a file; VerifyError says what is wrong with it, or that `digest` is another file's."""
        try:
            data = path.read_bytes()
            value = parse_strict(data, "trust")
        except FileNotFoundError as error:
            raise VerifyError("keys", f"{path}: not found; give the log's trust.json with --keys FILE") from error
        except RecordError as error:
            raise VerifyError("keys", f"{path}: {error}") from error
        found = f"sha256:{sha256(data).hexdigest()}"
        if digest is not None and found.removeprefix("sha256:") != digest.removeprefix("sha256:"):
            raise VerifyError("trust digest", f"{path}: has the digest {found}, not {digest}")
        if not isinstance(value, dict) or value.get("version") != TRUST_VERSION:
            raise VerifyError("keys", f"{path}: must be a trust file of version {TRUST_VERSION}")
        unknown = sorted(value.keys() - set(TRUST_FIELDS))
        if unknown:
            raise VerifyError("keys", f"{path}: unknown fields {', '.join(unknown)}; known: {', '.join(TRUST_FIELDS)}")
        try:
            trust = replace(cls.of(value), digest=found)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise VerifyError("keys", f"{path}: must hold 'log' and 'keys' ({error})") from error
        try:
            _require_records(value, trust)
        except (KeyError, AttributeError, TypeError, ValueError, RecordError) as error:
            raise VerifyError("keys", f"{path}: 'former' or 'revoked' was changed ({error})") from error
        if trust_bytes(value) != data:
            raise VerifyError("keys", f"{path}: was laid out anew; take the file again as the log's operator gave it")
        return trust if "policy" not in value else trust._under_own(value["policy"], str(path))

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Trust":
        """Return the trust of a parsed file. ValueError, KeyError, TypeError or AttributeError for what is none."""
        former, revoked = value.get("former", []), value.get("revoked", [])
        for entry in former:
            _require_fields(entry, FORMER_FIELDS[entry["role"]], "former")
        for entry in revoked:
            _require_fields(entry, REVOKED_FIELDS, "revoked")
        keys = {key_id: _public_key(key_id, public_hex) for key_id, public_hex in value["keys"].items()}
        return cls(
            NoteKey.parse(value["log"]),
            keys,
            tuple(
                LogKey(NoteKey.parse(key["log"]), _whole(key["last_size"])) for key in former if key["role"] == "log"
            ),
            tuple(
                KnownKey(
                    key["key_id"],
                    _public_key(key["key_id"], key["public_key"]),
                    "operator",
                    until_us=_whole(key["until_us"]),
                )
                for key in former
                if key["role"] == "operator"
            ),
            tuple((_key_id(key["key_id"]), Revocation(_whole(key["from_us"]), str(key["reason"]))) for key in revoked),
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

    def _under_own(self, policy: Any, source: str) -> "Trust":
        """As `under`, of the policy in the file itself, where nothing may stand that no check would miss."""
        trust = self.under(policy, source)
        if plain_text(policy) != policy.removeprefix(f"{LOCAL_MARK}\n"):
            raise VerifyError("policy", f"{source}: comments and spare spaces go into a file of one's own (--policy)")
        assert trust.policy is not None
        needed = {trust.policy.quorum, *(name for group in trust.policy.groups for name in group.members)}
        for witness in trust.policy.witnesses:  # a name that is needed cannot be another unseen
            own = witness.key.name.removeprefix(f"{self.log.name}/")
            if own != witness.key.name and witness.name not in (own, f"{own}-ml-dsa-44", *needed):
                raise VerifyError("policy", f"{source}: witness {witness.name!r}: its key is that of {own!r}")
        return trust

    def history(self) -> KeyHistory:
        """Return the keys as they are known before any record was read."""
        operator = [KnownKey(key_id, public_bytes, "operator") for key_id, public_bytes in self.keys.items()]
        history = KeyHistory([*operator, *self.former_keys], [LogKey(self.log), *self.former_logs])
        for key_id, revocation in self.revocations:
            history.revoke(key_id, revocation)
        return history

    def require_agreement(self, notices: Iterable[ProvedRecord]) -> None:
        """Raise VerifyError when this file says of a key what the log's own records, proven and signed, do not.

        Either may be older than the other and know of fewer changes.
        """
        until = {key.key_id: key.until_us for key in self.former_keys}
        until |= {key.key_id: key.last_size for key in self.former_logs}
        proven: dict[str, set[Revocation]] = {}
        for notice in notices:
            body = notice.record.body if notice.record is not None else None
            if isinstance(body, KeyRevocationBody):
                proven.setdefault(body.key_id, set()).add(Revocation(body.from_us, body.reason))
            elif isinstance(body, KeyRotationBody):
                end = notice.index + 1 if body.role == "log" else notice.leaf.time_us
                if until.get(body.old_key_id, end) != end:
                    raise _disagreement("end", body.old_key_id)
        for key_id, revocations in proven.items():
            told = {revocation for known, revocation in self.revocations if known == key_id}
            if not (told <= revocations or revocations <= told):
                raise _disagreement("revocation", key_id)


def trust_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the one form of a trust file: JSON in ASCII, indented by two; fields in the order they came to be."""
    return json.dumps(value, indent=2).encode() + b"\n"


def _require_records(value: Mapping[str, Any], trust: Trust) -> None:
    """Each entry that has its record says what that says, and a key of this file signed that.

    Raises:
        ValueError: one does not.
    """
    operators = {**trust.keys, **{key.key_id: key.public_bytes for key in trust.former_keys}}
    logs = {key.key_id for key in (LogKey(trust.log), *trust.former_logs)}
    for entry in (*value.get("former", []), *value.get("revoked", [])):
        if "record" not in entry:
            continue
        envelope = canonical_bytes(entry["record"], "record")
        record = record_from_envelope(envelope)
        if any(entry.get(name) != found for name, found in _told_by(record, trust.log.name).items()):
            raise ValueError("an entry does not say what its record says")
        body, keys = record.body, dict(operators)
        if isinstance(body, KeyRotationBody):
            if body.key_id not in (logs if body.role == "log" else operators):
                raise ValueError(f"key {body.key_id[:16]}, which took the place of another, is missing")
            pair = {body.key_id: body.public_key, body.old_key_id: body.old_public_key}
            keys |= {key_id: bytes.fromhex(public_hex) for key_id, public_hex in pair.items()}
            if body.key_id not in signers_of(envelope, keys):
                raise ValueError(f"key {body.key_id[:16]} did not sign that it took the place of another")
        signers_of(envelope, keys)


def _told_by(record: Record, log_name: str) -> dict[str, Any]:
    """What an entry must say of a key record. ValueError for a record of anything else."""
    body = record.body
    match body:
        case KeyRevocationBody():
            return {"key_id": body.key_id, "from_us": body.from_us, "reason": body.reason}
        case KeyRotationBody() if body.role == "log":
            return {"role": "log", "log": str(NoteKey(log_name, bytes.fromhex(body.old_public_key)))}
        case KeyRotationBody() if body.role == "operator":
            old = {"key_id": body.old_key_id, "public_key": body.old_public_key}
            return {"role": "operator", **old, "until_us": record.time_us}
    raise ValueError(f"a {record.kind} record changes no key of this file")


def _disagreement(what: str, key_id: str) -> VerifyError:
    reason = f"what it says of the {what} of key {key_id[:16]} is not what the log's own signed record says"
    return VerifyError("trust file", f"{reason}; take the log's trust.json again")


def _require_fields(entry: Mapping[str, Any], names: set[str], what: str) -> None:
    if wrong := (entry.keys() ^ names) - {"record"}:
        raise ValueError(f"{what}: missing or unknown fields {', '.join(sorted(wrong))}")


def _public_key(key_id: str, public_hex: str) -> bytes:
    public_bytes = _plain_hex(public_hex)
    if len(public_bytes) != PUBLIC_KEY_BYTES or key_id_of(public_bytes) != key_id:
        raise ValueError(f"key {key_id} does not match its public key")
    return public_bytes


def _key_id(text: str) -> str:
    if len(_plain_hex(text)) != sha256().digest_size:
        raise ValueError(f"{text!r} is no key id")
    return text


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no whole number")
    return number


def _plain_hex(text: str) -> bytes:
    """The bytes of hex without capitals or spaces. ValueError for any other text."""
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("hex with capitals or spaces")
    return data
