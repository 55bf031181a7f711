"""Whose key was good when: rotations and revocations, as the records of the log tell them, in log order.

        introduced          rotated (record i)          revoked, `from_us` = t
  ----------|------- signs -------|----- nothing more ------|-----
                                  new key signs             what the key signed at time t or later does not count

A key is known because the reader trusts it, because its contributor's own record brought it, or because a rotation
passed the trust on: signed with the new key, and with the old one or the operator's. What passed it on under a revoked
key passed on the revocation with it: whoever had the key may have made that rotation. Such a record is void, no
fault of the log: it brings a key, and what that key signed from the revocation on is the fault. So is a contributor's
own record from a time that the revocation reaches.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from attribution.bodies import ContributorBody, KeyRevocationBody, KeyRotationBody
from attribution.keys import key_id_of
from attribution.log.note import Checkpoint, NoteError, NoteKey, open_checkpoint
from attribution.log.proved import VerifyError
from attribution.records import Record, RecordError, signers_of

CONTRIBUTOR_KINDS = frozenset(
    {"contributor", "dataset", "prompt", "retrieval", "workflow_patch", "approval", "key_rotation"}
)


@dataclass(frozen=True)
class Revocation:
    """From when on a key's signatures do not count, and why."""

    from_us: int
    reason: str


@dataclass(frozen=True)
class KnownKey:
    """A key that may sign records, up to record `last_index` (which rotated it) or time `until_us`."""

    key_id: str
    public_bytes: bytes
    role: str
    name: str = ""
    last_index: int | None = None
    until_us: int | None = None
    replaced_us: int | None = None
    voucher: str = ""  # the key that passed the trust on, at since_us; '' where nobody had to
    since_us: int = 0


@dataclass(frozen=True)
class LogKey:
    """A key that may sign checkpoints, up to `last_size` entries when it was rotated."""

    key: NoteKey
    last_size: int | None = None

    @property
    def key_id(self) -> str:
        """The id by which key records name it."""
        return key_id_of(self.key.public_bytes)


class VoidKeyRecord(VerifyError):
    """A record that a revoked key signed to bring a key: taken on, but the key it brings is as revoked."""


class KeyHistory:
    """The keys known so far; `check` takes the records in log order."""

    def __init__(
        self, keys: Iterable[KnownKey], log_keys: Iterable[LogKey], revoked: Mapping[str, Revocation] | None = None
    ) -> None:
        self.keys = {key.key_id: key for key in keys}
        self.log_keys = {key.key_id: key for key in log_keys}
        self.revoked = dict(revoked or {})
        self.uses: list[tuple[int, int, str, str]] = []  # (index, time, key id, what) of every signature that held

    def open_checkpoint(self, note: str) -> tuple[Checkpoint, LogKey]:
        """Return the checkpoint and the log key that signed it; NoteError: none did, VerifyError: out of its time."""
        problem: NoteError | None = None
        for key in self.log_keys.values():
            try:
                checkpoint = open_checkpoint(note, key.key)
            except NoteError as error:
                problem = problem or error
                continue
            self._require_log_key(key, checkpoint)
            return checkpoint, key
        raise problem or NoteError("checkpoint: no log key is trusted")

    def _require_log_key(self, key: LogKey, checkpoint: Checkpoint) -> None:
        revoked = self.revoked.get(key.key_id)
        if revoked is not None:
            raise VerifyError(
                "revoked key",
                f"the checkpoint is signed by log key {key.key_id[:16]}, which was revoked: {revoked.reason}; "
                "ask the log for the proof anew",
            )
        if key.last_size is not None and checkpoint.size > key.last_size:
            raise VerifyError(
                "rotated key",
                f"log key {key.key_id[:16]} signed checkpoints up to {key.last_size} entries, not {checkpoint.size}",
            )

    def learn(self, index: int, record: Record, envelope: bytes) -> None:
        """Take on what a key record of the operator or the log says before any checkpoint can be opened.

        Such a record needs no place in the log to be believed: a key that is trusted signed it.
        """
        body = record.body
        if isinstance(body, KeyRevocationBody) or (isinstance(body, KeyRotationBody) and body.role != "contributor"):
            with suppress(VoidKeyRecord):  # what the new key signed is refused at its place
                self.check(index, record, envelope, record.kind.replace("_", " "))

    def check(self, index: int, record: Record, envelope: bytes, what: str) -> tuple[str, ...]:
        """Return the key ids that signed record `index`, all known and good at its time; then learn from it.

        Raises:
            VoidKeyRecord: the record brings a key, and a revoked one signed it.
            VerifyError: a signature that does not hold, an unknown key, one that was rotated out or revoked.
        """
        if isinstance(record.body, KeyRotationBody):
            return self._check_rotation(index, record, envelope, what)
        keys = {key.key_id: key.public_bytes for key in self.keys.values() if self._may_sign(key, record)}
        if isinstance(record.body, ContributorBody):
            own = bytes.fromhex(record.body.public_key)
            if key_id_of(own) != record.body.key_id:
                raise VerifyError("contributor key", f"{what}: its key id is not that of its public key")
            keys[record.body.key_id] = own
        signers = self._signers(envelope, keys, what)
        if isinstance(record.body, ContributorBody):
            if record.body.key_id not in signers:
                raise VerifyError("contributor key", f"{what}: not signed with the key it introduces")
            own_key = KnownKey(record.body.key_id, own, "contributor", record.body.name)
            self.keys.setdefault(record.body.key_id, own_key)
        try:
            for key_id in signers:
                self._use(index, record.time_us, key_id, what)
        except VerifyError as error:
            if error.check == "revoked key" and isinstance(record.body, ContributorBody):
                raise VoidKeyRecord(error.check, error.reason) from error
            raise
        if isinstance(record.body, KeyRevocationBody):
            self.revoke(record.body.key_id, Revocation(record.body.from_us, record.body.reason))
        return signers

    def revoke(self, key_id: str, revocation: Revocation) -> None:
        """Take note of a revocation; of several, the earliest time counts."""
        known = self.revoked.get(key_id)
        if known is None or revocation.from_us < known.from_us:
            self.revoked[key_id] = revocation

    def revocation_of(self, key_id: str) -> Revocation | None:
        """Return from when on a key's signatures do not count: its own revocation, or that of what vouched for it."""
        own, key = self.revoked.get(key_id), self.keys.get(key_id)
        above = self.revocation_of(key.voucher) if key is not None and key.voucher else None
        if key is None or above is None or key.since_us < above.from_us:
            return own
        return above if own is None or above.from_us < own.from_us else own

    def require_unrevoked(self) -> None:
        """Raise VerifyError when a record checked so far was signed at or after its key's revocation."""
        for _, error in self.revoked_uses():
            raise error

    def revoked_uses(self) -> Iterator[tuple[int, VerifyError]]:
        """Yield the index of each record checked so far whose key was revoked at its time, with what is wrong."""
        for index, time_us, key_id, what in self.uses:
            try:
                self._require_unrevoked(key_id, time_us, what)
            except VerifyError as error:
                yield index, error

    def require_unrevoked_by(self, other: "KeyHistory") -> None:
        """As `require_unrevoked`, of what another file's records revoke."""
        for key_id, revocation in other.revoked.items():
            self.revoke(key_id, revocation)
        self.require_unrevoked()

    def _may_sign(self, key: KnownKey, record: Record) -> bool:
        return key.role == "operator" or (key.role == "contributor" and record.kind in CONTRIBUTOR_KINDS)

    @staticmethod
    def _signers(envelope: bytes, keys: Mapping[str, bytes], what: str) -> tuple[str, ...]:
        try:
            return signers_of(envelope, keys)
        except RecordError as error:
            raise VerifyError("signature", f"{what}: {error}") from error

    def _use(self, index: int, time_us: int, key_id: str, what: str) -> None:
        """Check that a key was still in use at a record, and not revoked at its time."""
        self._require_in_use(index, time_us, key_id, what)
        self._require_unrevoked(key_id, time_us, what)
        self.uses.append((index, time_us, key_id, what))

    def _require_in_use(self, index: int, time_us: int, key_id: str, what: str) -> None:
        key = self.keys[key_id]
        is_late = key.last_index is not None and index > key.last_index
        if is_late or (key.until_us is not None and time_us > key.until_us):
            raise VerifyError("rotated key", f"{what}: signed with key {key_id[:16]} after another had taken its place")

    def _require_unrevoked(self, key_id: str, time_us: int, what: str) -> None:
        revoked = self.revocation_of(key_id)
        if revoked is not None and time_us >= revoked.from_us:
            raise VerifyError(
                "revoked key", f"{what}: signed with key {key_id[:16]} at or after its revocation: {revoked.reason}"
            )

    def _check_rotation(self, index: int, record: Record, envelope: bytes, what: str) -> tuple[str, ...]:
        """Check a rotation and pass the trust on, from the old key to the new or, for an older log, back."""
        body = record.body
        assert isinstance(body, KeyRotationBody)
        pair = {
            body.key_id: bytes.fromhex(body.public_key),
            body.old_key_id: bytes.fromhex(body.old_public_key),
        }
        if any(key_id_of(public_bytes) != key_id for key_id, public_bytes in pair.items()):
            raise VerifyError("key rotation", f"{what}: a key id is not that of its public key")
        operators = {key.key_id: key.public_bytes for key in self.keys.values() if key.role == "operator"}
        signers = self._signers(envelope, {**operators, **pair}, what)
        if body.key_id not in signers:
            raise VerifyError("key rotation", f"{what}: not signed with the new key")
        may_vouch = {body.old_key_id} | (operators.keys() - pair.keys())
        vouchers = [key_id for key_id in signers if key_id in may_vouch]
        if not vouchers or not self._is_known(body):
            raise VerifyError("key rotation", f"{what}: neither the old key nor the operator's vouches for the new one")
        used = [key_id for key_id in signers if key_id in self.keys and key_id != body.key_id]
        for key_id in used:
            self._require_in_use(index, record.time_us, key_id, what)
        self._rotate(index, record.time_us, body, vouchers[0])
        try:
            for key_id in used:
                self._use(index, record.time_us, key_id, what)
        except VerifyError as error:
            raise VoidKeyRecord(error.check, error.reason) from error
        return signers

    def _is_known(self, body: KeyRotationBody) -> bool:
        if body.role == "log":
            return body.old_key_id in self.log_keys or body.key_id in self.log_keys
        known = {key_id for key_id, key in self.keys.items() if key.role == body.role}
        return body.old_key_id in known or body.key_id in known

    def _rotate(self, index: int, time_us: int, body: KeyRotationBody, voucher: str) -> None:
        old_bytes, new_bytes = bytes.fromhex(body.old_public_key), bytes.fromhex(body.public_key)
        if body.role == "log":
            origin = next(iter(self.log_keys.values())).key.name
            old = self.log_keys.get(body.old_key_id, LogKey(NoteKey(origin, old_bytes)))
            # Its size when it was written is the least at which the new key can have signed; the reader's own
            # trust file may know that the old one signed a little longer.
            self.log_keys[body.old_key_id] = replace(old, last_size=old.last_size or index + 1)
            self.log_keys.setdefault(body.key_id, LogKey(NoteKey(origin, new_bytes)))
            return
        backwards = KnownKey(body.old_key_id, old_bytes, body.role, body.name, voucher=body.key_id, since_us=time_us)
        old_key = self.keys.get(body.old_key_id, backwards)
        self.keys[body.old_key_id] = replace(old_key, last_index=index, replaced_us=time_us)
        new_key = KnownKey(body.key_id, new_bytes, body.role, old_key.name, voucher=voucher, since_us=time_us)
        self.keys.setdefault(body.key_id, new_key)
