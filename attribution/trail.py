"""The one facade over a home folder: keys, store, log, registry, and the records between them.

Cheap to open and safe from many processes and threads: every append takes the log's lock, catches up, writes the
private records, fsyncs them, appends their leaves (see log/sequencer.py) and returns only when all of it is durable.
Threads that append at once share one such commit.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attribution.bodies import NOTICE_KINDS, Body, RedactionBody
from attribution.canonical import canonical_json
from attribution.disk import REAL, Disk, make_directory, write_atomically
from attribution.group_commit import GroupCommit
from attribution.key_changes import finish_rotations
from attribution.keys import KeyRing, SigningKey
from attribution.log.note import NoteKey, Signs
from attribution.log.published import TILES, published_proofs
from attribution.log.sequencer import Appender, Log, OutcomeUnknown, file_lock, refusing
from attribution.log.trust import trust_bytes
from attribution.private_records import PrivateRecords
from attribution.provenance import environment_digest, environment_manifest
from attribution.records import (
    Artefact,
    Leaf,
    Party,
    Record,
    RecordError,
    canonical_bytes,
    commitment_of,
    parse_canonical,
    record_from_envelope,
)
from attribution.registry import Registry
from attribution.staging import (
    ALIAS_KINDS,
    UNINDEXED_KINDS,
    Draft,
    Group,
    Makers,
    Staged,
    TrailError,
    now_us,
    record_of,
)
from attribution.store import Store
from attribution.trust_file import LOG_KEY, OPERATOR, TRUST_FILE, TRUST_VERSION, TrustFile
from configs.env import home as default_home

if TYPE_CHECKING:
    import pyarrow

MAX_GROUP = 512  # callers whose records share one commit

__all__ = ["Draft", "Entry", "Erasure", "Trail", "TrailError", "is_leaf", "now_us", "record_of"]


class Configuration(Protocol):
    """What `run_config` needs of a pydantic model."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Erasure:
    """Why a record, or rows of its tables, are gone: the redaction that says so."""

    leaf_hash: str
    time_us: int
    reason: str


@dataclass(frozen=True)
class Entry:
    """One leaf of the log and, unless it was erased, the record behind it."""

    index: int
    leaf_hash: str
    leaf: Leaf
    record: Record | None
    envelope: bytes | None
    salt: bytes | None
    erasure: Erasure | None = None


class Trail:
    """A home folder's records; open one with `Trail.open`."""

    def __init__(self, home: Path, log: Log, *, disk: Disk = REAL) -> None:
        self.home = home
        self.keys = KeyRing(home)
        self.store = Store(home / "store", disk=disk)
        self.log = log
        self.mutex = threading.RLock()  # taken before the log's own, never after; who holds it must not record
        self.registry = Registry(self)
        self.private = PrivateRecords(home / "records", disk=disk)
        self._commits = GroupCommit(self._commit, max_requests=MAX_GROUP)
        self._leaves: list[Leaf] = []
        self._makers = Makers()
        self._indexed = 0
        self._has_environment = False
        self._notices: list[int] = []  # indices of what bears on earlier records
        self._erasures: dict[str, Erasure] = {}
        self._num_notices_read = 0

    @classmethod
    def open(
        cls, home: Path | None = None, *, create: bool = True, log_signer: Signs | None = None, disk: Disk = REAL
    ) -> "Trail":
        """Open the trail of a home folder (configs.env.home() by default); the first open makes keys and log.

        `log_signer` signs checkpoints in place of the key in the home, with the same key kept elsewhere.

        Raises:
            TrailError: there is none and `create` is False.
            LogError: the log does not match its signed checkpoint.
            LogDiskError: a new home cannot be written.
        """
        home = Path(home) if home is not None else default_home()
        if not (home / TRUST_FILE).is_file():
            if not create:
                raise TrailError(f"home {home}: holds no trail; set TRAILMARK_HOME, or contribute rows to start one")
            with refusing(home):
                _create(home, disk)
        trust = TrustFile(home, log_signer=log_signer)
        keys = trust.log_keys()
        log = Log(home / "log", keys.key, signer=keys.signer, is_leaf=is_leaf, keys=trust.log_keys, disk=disk)
        trail = cls(home, log, disk=disk)
        finish_rotations(trail)
        return trail

    def record(
        self,
        kind: str,
        body: Body,
        *,
        inputs: Sequence[Artefact] = (),
        outputs: Sequence[Artefact] = (),
        contributors: Sequence[Party] = (),
        parents: Sequence[str] | None = None,
        signer: SigningKey | None = None,
        config: str | None = None,
        seed: int = 0,
        attempt: int = 1,
        parent_attempt: str | None = None,
        time_us: int | None = None,
    ) -> Entry:
        """Sign a record, append it and return its entry, durable.

        `parents` default to the records that made the inputs (newest for each digest) and, when a contributor signs,
        that contributor's record. `signer` defaults to the operator. Time in the log never runs backwards: `time_us`
        (default now) is raised to the last entry's when it is earlier.

        Raises:
            RecordError: a field of the wrong type, or a record over 64 KB.
            RegistryError: a publication whose name@version is taken.
            LogDiskError: the disk is full, read-only or failing; nothing was recorded.
            OutcomeUnknown: the disk failed so late that the record may be in the log.
            FencedError: another writer took the log over.
        """
        draft = Draft(
            kind, body, inputs, outputs, contributors, parents, signer, config, seed, attempt, parent_attempt, time_us
        )
        return self.record_many([draft])[0]

    def record_many(self, drafts: Sequence[Draft], *, then: Callable[[Appender], None] | None = None) -> list[Entry]:
        """Append several records, all or none, and return their entries; they share a commit with other threads'.

        With `then` they have one of their own: it runs once they are durable, before anybody else may append.
        """
        if not drafts:
            return []
        finish_rotations(self)
        if then is None:
            return self._commits.submit(tuple(drafts))
        with self.mutex, self.log.exclusive() as appender:
            (outcome,) = self._append_group(appender, [drafts])
            if isinstance(outcome, Exception):
                raise outcome
            try:
                then(appender)
            except OSError as error:
                raise OutcomeUnknown(
                    f"home {self.home}: {error}; the records are in the log, but what follows from them is not done yet"
                ) from error
            return outcome

    def record_each(self, requests: Sequence[Sequence[Draft]]) -> list[list[Entry] | Exception]:
        """Append several callers' drafts; return each one's entries, or the error that is its own.

        They share a commit with each other and with other threads'.
        """
        finish_rotations(self)
        return self._commits.submit_each([tuple(drafts) for drafts in requests])

    def delete_record(self, leaf_hash: str) -> bool:
        """Remove a record and its salt for good; return whether they were there. Its leaf and all proofs stay.

        For `erasure`, after the redaction.
        """
        with self.mutex, self.log.exclusive():
            return self.private.erase(self.entry_index(leaf_hash), leaf_hash)

    def refresh(self) -> None:
        """Catch up with other processes' appends."""
        self.log.refresh()

    def entries(self, *, start: int = 0, kind: str | None = None) -> Iterator[Entry]:
        """Yield entries from index `start`, of one kind if given, as of now."""
        for index in range(start, self._read_leaves()):
            if kind is None or self._leaves[index].kind == kind:
                yield self._entry(index)

    def leaves(self, *, start: int = 0) -> Iterator[tuple[int, str, Leaf]]:
        """Yield (index, leaf hash, leaf) from `start`, as of now, without reading any record."""
        for index in range(start, self._read_leaves()):
            yield index, self.log.leaf_hash(index), self._leaves[index]

    def entry(self, position: str | int) -> Entry:
        """Return the entry of a leaf hash or index; TrailError when there is none."""
        size = self._read_leaves()
        index = self.log.index_of(position) if isinstance(position, str) else position
        if index is None or not 0 <= index < size:
            raise TrailError(f"leaf {position}: not in the log of {self.home}, which has {size} entries")
        return self._entry(index)

    def find(self, digest: str) -> Entry | None:
        """Return the newest record that made the artefact `digest` (a publication only names one), or None."""
        with self.mutex:
            self._index()
            leaf_hash = self._makers.newest_output.get(digest)
            if leaf_hash is not None and self.entry(leaf_hash).record is None:  # erased since: an older maker may stand
                self._makers.newest_output.clear()
                self._indexed = 0
                self._index()
                leaf_hash = self._makers.newest_output.get(digest)
        return None if leaf_hash is None else self.entry(leaf_hash)

    def notices(self) -> list[Entry]:
        """Return the records that bear on earlier ones: keys rotated or revoked, records or rows erased."""
        self._read_leaves()
        return [self._entry(index) for index in list(self._notices)]

    def erasures(self) -> dict[str, Erasure]:
        """Return what was erased: leaf hash -> the redaction that says why."""
        self._read_leaves()
        with self.mutex:
            while self._num_notices_read < len(self._notices):
                index = self._notices[self._num_notices_read]
                self._num_notices_read += 1  # first: a redaction that is gone itself asks here why
                entry = self._entry(index) if self._leaves[index].kind == "redaction" else None
                if entry is not None and entry.record is not None and isinstance(entry.record.body, RedactionBody):
                    body = entry.record.body
                    self._erasures.setdefault(body.leaf, Erasure(entry.leaf_hash, entry.leaf.time_us, body.reason))
            return dict(self._erasures)

    def entry_index(self, leaf_hash: str) -> int:
        """Return the index of a leaf hash; TrailError when it is not in the log."""
        index = self.log.index_of(leaf_hash)
        return self.entry(leaf_hash).index if index is None else index

    def leaf_hash(self, text: str) -> str:
        """Return the leaf hash that a user means by a hash, its beginning (6 digits or more) or an index."""
        size = self._read_leaves()
        if text.isdigit() and len(text) < 6:
            return self.entry(int(text)).leaf_hash
        found = (
            [leaf for leaf in map(self.log.leaf_hash, range(size)) if leaf.startswith(text)] if len(text) > 5 else []
        )
        if len(found) == 1:
            return found[0]
        problem = (
            "several leaves begin so, give more of it" if found else "no such leaf; `trailmark log show` lists them"
        )
        raise TrailError(f"leaf {text!r}: {problem}")

    def proof(self, leaf_hash: str) -> dict[str, Any]:
        """Return the offline proof of one record: {"envelope", "salt", "leaf", "proof"}; two None if erased."""
        return self.proofs([leaf_hash])[0]

    def proofs(self, leaf_hashes: Sequence[str]) -> list[dict[str, Any]]:
        """Return the proofs of several records, all under one checkpoint, the witnesses' when it covers them."""
        entries = [self.entry(leaf_hash) for leaf_hash in leaf_hashes]
        texts = published_proofs(self.home / TILES, self.log, [entry.index for entry in entries])
        return [
            {
                "envelope": None if entry.envelope is None else json.loads(entry.envelope),
                "salt": None if entry.salt is None else entry.salt.hex(),
                "leaf": entry.leaf.to_json(),
                "proof": text,
            }
            for entry, text in zip(entries, texts, strict=True)
        ]

    def put_json(self, value: object) -> str:
        """Store canonical JSON as a blob and return its digest."""
        return self.store.put_blob(canonical_bytes(value, "value"))

    def get_json(self, digest: str) -> Any:
        """Return the JSON value of a stored blob."""
        return json.loads(self.store.get_blob(digest))

    def put_table(self, table: "pyarrow.Table") -> str:
        """Store a table as a Parquet blob and return its digest."""
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        return self.store.put_blob(sink.getvalue().to_pybytes())

    def get_table(self, digest: str) -> "pyarrow.Table":
        """Return the table of a stored Parquet blob."""
        import pyarrow
        import pyarrow.parquet

        return pyarrow.parquet.read_table(pyarrow.BufferReader(self.store.get_blob(digest)))

    def run_config(self, configuration: Configuration) -> str:
        """Store a resolved configuration as canonical JSON, floats as their repr, and return its digest."""
        return self.put_json(_without_floats(configuration.model_dump(mode="json")))

    def _commit(self, requests: Sequence[Sequence[Draft]]) -> list[list[Entry] | Exception]:
        """Append the records of several callers as one group; what one of them cannot record fails alone."""
        with self.mutex, self.log.exclusive() as appender:
            return self._append_group(appender, requests)

    def _append_group(self, appender: Appender, requests: Sequence[Sequence[Draft]]) -> list[list[Entry] | Exception]:
        self._store_environment()
        self._index()
        group = Group(
            self._makers,
            last_time_us=self._leaves[-1].time_us if self._leaves else 0,
            operator=lambda: self.keys.get(OPERATOR),
            is_logged=self._is_logged,
            require_free=self.registry.require_free,
        )
        staged = [_outcome(group, drafts) for drafts in requests]
        entries = iter(self._append(appender, group.staged))
        return [item if isinstance(item, Exception) else [next(entries) for _ in item] for item in staged]

    def _append(self, appender: Appender, staged: Sequence[Staged]) -> list[Entry]:
        """Write the private halves, then the leaves; return the entries, durable."""
        if not staged:
            return []
        first = self.log.size
        self.private.append(first, [(item.leaf_hash, item.private) for item in staged], is_logged=self._is_logged)
        try:
            appender.append([item.leaf_bytes for item in staged])
        except BaseException as error:
            self.private.distrust()
            if isinstance(error, OSError):  # nothing was recorded, so nothing private stays behind
                with suppress(OSError):
                    self.private.trim(self._is_logged)
            raise
        for item in staged:
            self._makers.add(item.record, item.leaf_hash)
            self._take_leaf(item.leaf)
        self._indexed = len(self._leaves)
        return [
            Entry(first + offset, item.leaf_hash, item.leaf, item.record, item.envelope, item.salt)
            for offset, item in enumerate(staged)
        ]

    def _is_logged(self, leaf_hash: str) -> bool:
        return self.log.index_of(leaf_hash) is not None

    def _read_leaves(self) -> int:
        """Catch up with the log and return the number of leaves."""
        with self.mutex:
            self.log.refresh()
            for data in self.log.leaves(len(self._leaves), self.log.size):
                self._take_leaf(Leaf.from_json(json.loads(data)))
            return len(self._leaves)

    def _take_leaf(self, leaf: Leaf) -> None:
        if leaf.kind in NOTICE_KINDS:
            self._notices.append(len(self._leaves))
        self._leaves.append(leaf)

    def _index(self) -> None:
        """Take new records into the maps that find parents."""
        size = self._read_leaves()
        for index in range(self._indexed, size):
            self._indexed = index + 1
            kind = self._leaves[index].kind
            if kind in UNINDEXED_KINDS or kind in ALIAS_KINDS:
                continue
            entry = self._entry(index)
            if entry.record is not None:
                self._makers.add(entry.record, entry.leaf_hash)

    def _entry(self, index: int) -> Entry:
        """Read the record behind a leaf and check it against the leaf's commitment."""
        self._read_leaves()
        leaf, leaf_hash = self._leaves[index], self.log.leaf_hash(index)
        private = self.private.read(index, leaf_hash)
        if private is None:
            return Entry(index, leaf_hash, leaf, None, None, None, self.erasures().get(leaf_hash))
        try:
            value = parse_canonical(private, "private record")
            envelope, salt = canonical_json(value["envelope"]), bytes.fromhex(value["salt"])
            if commitment_of(salt, envelope) != leaf.commitment:
                raise RecordError("it does not match the commitment in the log")
            record = record_from_envelope(envelope)
        except (RecordError, KeyError, TypeError, ValueError) as error:
            raise TrailError(
                f"record {leaf_hash} in {self.home / 'records'}: altered on disk: {error}; restore it from a copy"
            ) from error
        return Entry(index, leaf_hash, leaf, record, envelope, salt)

    def _store_environment(self) -> None:
        if not self._has_environment and not self.store.has(environment_digest()):
            self.store.put_blob(environment_manifest())
        self._has_environment = True


def _outcome(group: Group, drafts: Sequence[Draft]) -> Sequence[Staged] | Exception:
    """What staging one caller's drafts gives: the records, or the error that is that caller's alone."""
    try:
        return group.add(drafts)
    except Exception as error:
        return error


def _create(home: Path, disk: Disk) -> None:
    """Make folders, keys, an empty log and trust.json; safe when several processes do so at once."""
    make_directory(home.parent, disk=disk)
    make_directory(home, 0o700, disk=disk)
    for name in ("log", "records", "store", "keys", "views", "run"):
        make_directory(home / name, 0o700, disk=disk)
    with file_lock(home / "log" / "lock"):
        if (home / TRUST_FILE).is_file():
            return
        keys = KeyRing(home)
        operator, log_key = (keys.get(name) if keys.has(name) else keys.create(name) for name in (OPERATOR, LOG_KEY))
        origin = f"trailmark.local/{log_key.key_id[:16]}"
        Log.create(home / "log", origin, log_key, disk=disk)
        trust = {
            "version": TRUST_VERSION,
            "log": str(NoteKey(origin, log_key.public_bytes)),
            "keys": {operator.key_id: operator.public_hex},
        }
        write_atomically(home / TRUST_FILE, trust_bytes(trust), disk=disk)


def is_leaf(data: bytes) -> bool:
    """Return whether bytes are a leaf of this log: whole and canonical."""
    try:
        Leaf.from_bytes(data)
    except RecordError:
        return False
    return True


def _without_floats(value: Any) -> Any:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {key: _without_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(item) for item in value]
    return value
