"""Keys change: one is rotated, one is revoked. Both are records of the log; then files and trust.json follow.

A rotation first lays the new key in keys/next, then appends its record, and only then puts the new key in the place of
the old one, all before another process may append. Whoever opens the trail after a crash in between finishes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attribution.bodies import Body, ContributorBody, KeyRevocationBody, KeyRotationBody
from attribution.disk import REAL
from attribution.keys import (
    ENCRYPTED_MARK,
    FORMER_FOLDER,
    KEY_ENDING,
    NEXT_FOLDER,
    PUBLIC_ENDING,
    URI_ENDING,
    KeyRing,
    SigningKey,
    SigningKeyError,
    key_id_of,
    passphrase_for,
)
from attribution.log.facts import utc
from attribution.log.key_history import Revocation
from attribution.log.note import NoteKey
from attribution.records import Party, key_ids_of
from attribution.trust_file import LOG_KEY, OPERATOR, TrustFile

if TYPE_CHECKING:
    from attribution.log.sequencer import Appender
    from attribution.remote_keys import RemoteKey
    from attribution.trail import Entry, Trail

Role = Literal["operator", "log", "contributor"]


class KeyChanges:
    """Which keys may sign no more, as far as the records taken in say."""

    def __init__(self) -> None:
        self._replaced: dict[str, KeyRotationBody] = {}
        self._revoked: dict[str, tuple[str, Revocation]] = {}

    def take_in(self, body: Body) -> None:
        """Learn from the body of a record."""
        if isinstance(body, KeyRotationBody):
            self._replaced[body.old_key_id] = body
        elif isinstance(body, KeyRevocationBody):
            known = self._revoked.get(body.key_id)
            if known is None or body.from_us < known[1].from_us:
                self._revoked[body.key_id] = (body.name, Revocation(body.from_us, body.reason))

    def require_usable(self, key: SigningKey, kind: str, time_us: int) -> None:
        """Raise SigningKeyError when `key` may not sign a record of this time."""
        name, revoked = self._revoked.get(key.key_id, ("", None))
        if revoked is not None and time_us >= revoked.from_us:
            raise SigningKeyError(
                f"key {key.key_id[:16]} of {name}: revoked from {utc(revoked.from_us)} on ({revoked.reason}), so it "
                f"signs no {kind} record; `trailmark key rotate {name!r} --lost` gives them a new key"
            )
        if (rotation := self._replaced.get(key.key_id)) is not None:
            raise SigningKeyError(
                f"key {key.key_id[:16]} of {rotation.name}: key {rotation.key_id[:16]} has taken its place"
            )


@dataclass(frozen=True)
class CurrentKey:
    """The key that a name signs with now."""

    name: str
    role: Role
    public_hex: str
    leaf_hash: str | None = None  # of the record that brought it

    @property
    def key_id(self) -> str:
        """The key id, 64 hex digits."""
        return key_id_of(bytes.fromhex(self.public_hex))


def current_key(trail: "Trail", name: str) -> CurrentKey:
    """Return the key a name signs with now, by the log; SigningKeyError when it stands for nobody."""
    if name == LOG_KEY:
        return CurrentKey(name, "log", trail.log.key.public_bytes.hex())
    if name == OPERATOR:
        return CurrentKey(name, "operator", next(iter(TrustFile(trail.home).read()["keys"].values())))
    found: CurrentKey | None = None
    for entry in trail.entries():
        if entry.leaf.kind not in ("contributor", "key_rotation") or entry.record is None:
            continue
        body = entry.record.body
        joined = isinstance(body, ContributorBody) and body.name == name
        follows = isinstance(body, KeyRotationBody) and found is not None and body.old_key_id == found.key_id
        if joined or follows:
            assert isinstance(body, ContributorBody | KeyRotationBody)
            found = CurrentKey(name, "contributor", body.public_key, entry.leaf_hash)
    if found is None:
        raise SigningKeyError(f"key {name!r}: no contributor of that name; `trailmark key list` shows every key")
    return found


def rotate(trail: "Trail", name: str, *, lost: bool = False, replacement: "RemoteKey | None" = None) -> "Entry":
    """Give `name` (a contributor, `operator` or `log`) a new key, and return the record; the old key vouches for it.

    With `lost` the operator's key does. A new key is under the passphrase of the old one, if that had one;
    `replacement` is a key kept elsewhere.

    Raises:
        SigningKeyError: nobody of that name, or the old key cannot sign and `lost` is not set.
    """
    old = current_key(trail, name)
    if lost and name == OPERATOR:
        raise SigningKeyError(
            "key 'operator': nobody stands above it to vouch for a new one; give readers a new trust.json"
        )
    voucher = trail.keys.get(OPERATOR if lost else name)
    new = _next_key(trail, name, replacement)
    body = KeyRotationBody(name, old.role, old.key_id, old.public_hex, new.key_id, new.public_hex)
    from attribution.trail import Draft

    draft = Draft(
        "key_rotation",
        body,
        contributors=[Party(voucher.key_id, "operator" if lost else old.role), Party(new.key_id, old.role)],
        signer=voucher,
        cosigners=[new],
    )
    return trail.record_many([draft], then=_installing(trail))[0]


def revoke(
    trail: "Trail", name: str, *, reason: str, from_us: int | None = None, key_id: str | None = None
) -> "list[Entry]":
    """Record that what `name` signed from `from_us` (default: now) on does not count; return the records.

    This reaches every key of theirs in force then or later (see `keys_reached`); `key_id` names one alone. The log and
    the operator never go without a key: theirs is rotated first.

    Raises:
        SigningKeyError: nobody of that name, a key that is not theirs, or a time to come.
    """
    from attribution.trail import Draft, now_us

    current = current_key(trail, name)
    if key_id is not None and key_id not in key_ids_of_name(trail, name):
        raise SigningKeyError(f"key {key_id[:16]}: not one of {name!r}; `trailmark key history {name!r}` lists theirs")
    if from_us is not None and from_us > now_us():
        raise SigningKeyError(f"from {utc(from_us)}: lies ahead; a key is revoked from now or from an earlier time")
    reached = keys_reached(trail, name, from_us=now_us() if from_us is None else from_us, key_id=key_id)
    entries = []
    if current.role != "contributor" and current.key_id in reached:
        entries.append(rotate(trail, name, lost=current.role == "log"))
    operator, moment = trail.keys.get(OPERATOR), now_us() if from_us is None else from_us
    drafts = [
        Draft(
            "key_revocation",
            KeyRevocationBody(name, current.role, reached_id, moment, reason),
            contributors=[Party(operator.key_id, "operator")],
        )
        for reached_id in reached
    ]

    def note(_: "Appender") -> None:
        for index in range(trail.log.size - len(drafts), trail.log.size):
            entry = trail.entry(index)
            assert entry.record is not None and isinstance(entry.record.body, KeyRevocationBody) and entry.envelope
            TrustFile(trail.home).revoke(entry.record.body, record=entry.envelope)

    return entries + trail.record_many(drafts, then=note)


def keys_reached(trail: "Trail", name: str, *, from_us: int, key_id: str | None = None) -> list[str]:
    """Return the ids of the keys of a name that a revocation from a time on reaches, oldest first.

    They are all that were in force then or later. With `key_id` they are that one and, of a contributor, each later one
    for which it, or another of them, has vouched since: such a rotation may be the thief's. For an operator's or a
    log's, trust.json vouches.
    """
    rotations: list[tuple[int, KeyRotationBody, tuple[str, ...]]] = []
    for entry in trail.notices():
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, KeyRotationBody) and body.name == name and entry.envelope is not None:
            rotations.append((entry.leaf.time_us, body, key_ids_of(entry.envelope)))
    if key_id is None:
        over = {body.old_key_id for time_us, body, _ in rotations if time_us < from_us}
        return [each for each in key_ids_of_name(trail, name) if each not in over]
    reached = [key_id]
    for time_us, body, signers in rotations:
        is_vouched = body.old_key_id in reached and body.old_key_id in signers
        if body.role == "contributor" and time_us >= from_us and is_vouched:
            reached.append(body.key_id)
    return reached


def key_ids_of_name(trail: "Trail", name: str) -> list[str]:
    """Return the ids of every key that a name has had, oldest first."""
    found = dict.fromkeys([] if name not in (OPERATOR, LOG_KEY) else [_first_key_id(trail, name)])
    for entry in trail.entries():
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, ContributorBody | KeyRotationBody) and body.name == name:
            found[body.key_id] = None
    return list(found)


def _first_key_id(trail: "Trail", name: str) -> str:
    for entry in trail.notices():
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, KeyRotationBody) and body.name == name:
            return body.old_key_id
    return current_key(trail, name).key_id


def finish_rotations(trail: "Trail") -> None:
    """Put new keys in their places whose records are in the log already: a process ended between the two."""
    folder = trail.keys.directory / NEXT_FOLDER
    if not folder.is_dir():
        return
    waiting = {path.read_text().strip() for path in folder.glob(f"*{PUBLIC_ENDING}")}
    for entry in trail.notices():
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, KeyRotationBody) and body.public_key in waiting:
            with trail.log.locked():
                _install(trail, body, entry)


def _installing(trail: "Trail") -> "Callable[[Appender], None]":
    def install(appender: "Appender") -> None:
        entry = trail.entry(trail.log.size - 1)
        assert entry.record is not None and isinstance(entry.record.body, KeyRotationBody)
        _install(trail, entry.record.body, entry)
        if entry.record.body.role == "log":
            appender.sign_anew()

    return install


def _install(trail: "Trail", body: KeyRotationBody, entry: "Entry") -> None:
    """Tell trust.json, then move the files: as long as keys/next holds the key, this can be done again."""
    from attribution.log.publisher import follow_log_key

    trust = TrustFile(trail.home)
    assert entry.envelope is not None
    if body.role == "log":
        trust.rotate_log(bytes.fromhex(body.public_key), last_size=entry.index + 1, record=entry.envelope)
        follow_log_key(trail.home, NoteKey(trail.log.key.name, bytes.fromhex(body.public_key)))
    elif body.role == "operator":
        trust.rotate_operator(body, time_us=entry.leaf.time_us, record=entry.envelope)
    _move_files(trail.keys.directory, body)


def _move_files(keys: Path, body: KeyRotationBody) -> None:
    """Old files to keys/former, new ones from keys/next; what keys/next still holds says how far this has come."""
    source, former = keys / NEXT_FOLDER, keys / FORMER_FOLDER
    if not source.is_dir():
        return  # another process has finished it
    former.mkdir(mode=0o700, exist_ok=True)
    for endings in ((KEY_ENDING, URI_ENDING), (PUBLIC_ENDING,)):
        new = [file for ending in endings if (file := source / f"{body.name}{ending}").is_file()]
        old = [file for ending in endings if (file := keys / f"{body.name}{ending}").is_file()]
        for file in old if new else []:
            file.replace(former / f"{body.name}-{body.old_key_id[:16]}{file.suffix}")
        for file in new:
            file.replace(keys / file.name)
        REAL.sync_directory(keys)
    if not any(source.iterdir()):
        source.rmdir()


def _next_key(trail: "Trail", name: str, replacement: "RemoteKey | None") -> SigningKey:
    """The new key, laid down in keys/next; one that an interrupted rotation left there is taken up again."""
    folder = trail.keys.directory / NEXT_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    if replacement is not None:
        for path in folder.glob(f"{name}.*"):
            path.unlink()
        replacement.write(folder / f"{name}{URI_ENDING}")
        (folder / f"{name}{PUBLIC_ENDING}").write_text(f"{replacement.public_hex}\n")
        return replacement
    ring = KeyRing(trail.home, folder)
    if not ring.has(name):
        old_file = trail.keys.file_of(name)
        is_locked = old_file is not None and ENCRYPTED_MARK in old_file.read_bytes()
        SigningKey.generate(name).save(
            folder / f"{name}{KEY_ENDING}", passphrase=passphrase_for(name) if is_locked else None
        )
        REAL.sync_directory(folder)
    return ring.get(name)
