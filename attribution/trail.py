"""The one facade over a home folder: keys, store, log, registry, and the records between them.

Cheap to open and safe from many processes and threads: every append takes the log's lock, catches up, writes the
private record, fsyncs it, appends its leaf (see log/sequencer.py) and returns only when all of it is durable.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import rfc8785

from attribution.bodies import NOTICE_KINDS, ContributorBody, KeyRotationBody, PublicationBody, RedactionBody
from attribution.key_changes import KeyChanges, finish_rotations
from attribution.keys import KeyRing, SigningKey
from attribution.log.note import NoteKey
from attribution.log.sequencer import Appender, Log, file_lock
from attribution.provenance import code_identity, environment_digest, environment_manifest
from attribution.records import (
    SALT_BYTES,
    Artefact,
    Body,
    Leaf,
    Party,
    Record,
    RecordError,
    build_leaf,
    canonical_bytes,
    commitment_of,
    parse_canonical,
    record_from_envelope,
    record_to_envelope,
)
from attribution.registry import Registry
from attribution.store import Store, sync_directory, write_atomically
from attribution.trust_file import LOG_KEY, OPERATOR, TRUST_FILE, TRUST_VERSION, TrustFile
from configs.env import home as default_home
from configs.errors import UserError

if TYPE_CHECKING:
    import pyarrow

UNINDEXED_KINDS = frozenset({"completions", "adapter_loaded"})  # many per minute; nothing is made from their outputs
ALIAS_KINDS = frozenset({"publication"})  # name an artefact that another record made


class TrailError(UserError):
    """No trail here, a leaf hash that is not in it, or a record altered on disk."""


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


@dataclass(frozen=True)
class Draft:
    """What a caller says of a record; the trail adds time, code, environment, parents, salt and signature."""

    kind: str
    body: Body
    inputs: Sequence[Artefact] = ()
    outputs: Sequence[Artefact] = ()
    contributors: Sequence[Party] = ()
    parents: Sequence[str] | None = None
    signer: SigningKey | None = None
    config: str | None = None
    seed: int = 0
    attempt: int = 1
    parent_attempt: str | None = None
    time_us: int | None = None
    cosigners: Sequence[SigningKey] = ()


@dataclass(frozen=True)
class _Staged:
    """A record ready to be written: its leaf and the private half."""

    leaf: bytes
    leaf_hash: str
    private: bytes


class Trail:
    """A home folder's records; open one with `Trail.open`."""

    def __init__(self, home: Path, log: Log) -> None:
        self.home = home
        self.keys = KeyRing(home)
        self.store = Store(home / "store")
        self.log = log
        self.mutex = threading.RLock()  # taken before the log's own, never after
        self.registry = Registry(self)
        self._records = home / "records"
        self._leaves: list[Leaf] = []
        self._newest_output: dict[str, str] = {}  # artefact digest -> leaf hash of the newest record that made it
        self._contributor: dict[str, str] = {}  # key id -> leaf hash of its contributor record
        self._indexed = 0
        self._notices: list[int] = []  # indices of what bears on earlier records
        self._erasures: dict[str, Erasure] = {}
        self._num_notices_read = 0
        self._key_changes = KeyChanges()

    @classmethod
    def open(cls, home: Path | None = None, *, create: bool = True) -> "Trail":
        """Open the trail of a home folder (configs.env.home() by default); the first open makes keys and log.

        Raises:
            TrailError: there is none and `create` is False.
            LogError: the log does not match its signed checkpoint.
        """
        home = Path(home) if home is not None else default_home()
        if not (home / TRUST_FILE).is_file():
            if not create:
                raise TrailError(f"home {home}: holds no trail; set TRAILMARK_HOME, or contribute rows to start one")
            _create(home)
        trust = TrustFile(home)
        keys = trust.log_keys()
        log = Log(home / "log", keys.key, signer=keys.signer, is_leaf=_is_leaf, keys=trust.log_keys)
        trail = cls(home, log)
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
        """
        draft = Draft(
            kind, body, inputs, outputs, contributors, parents, signer, config, seed, attempt, parent_attempt, time_us
        )
        return self.record_many([draft])[0]

    def record_many(self, drafts: Sequence[Draft], *, then: Callable[[Appender], None] | None = None) -> list[Entry]:
        """Append several records as one group (one fsync of the log, one checkpoint) and return their entries.

        `then` runs once they are durable, before any other process may append.
        """
        if not drafts:
            return []
        self._store_environment()
        finish_rotations(self)
        with self.mutex, self.log.exclusive() as appender:
            self._index()
            first = self.log.size
            staged = self._stage_all(drafts)
            self._write_private(staged)
            appender.append([item.leaf for item in staged])
            if then is not None:
                then(appender)
            return [self._entry(index) for index in range(first, self.log.size)]

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
            leaf_hash = self._newest_output.get(digest)
            if leaf_hash is not None and self.entry(leaf_hash).record is None:  # erased since: an older maker may stand
                self._newest_output.clear()
                self._indexed = 0
                self._index()
                leaf_hash = self._newest_output.get(digest)
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

    def delete_record(self, leaf_hash: str) -> None:
        """Remove a record and its salt for good; its leaf and all proofs stay. For `erasure`, after the redaction."""
        (self._records / f"{leaf_hash}.json").unlink(missing_ok=True)
        sync_directory(self._records)

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
        """Return the proofs of several records, all under one checkpoint."""
        entries = [self.entry(leaf_hash) for leaf_hash in leaf_hashes]
        texts = self.log.proofs([entry.index for entry in entries])
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

    def _stage_all(self, drafts: Sequence[Draft]) -> list[_Staged]:
        """Build each record in turn, so that a later one of the group finds its parents among the earlier ones."""
        staged: list[_Staged] = []
        made: dict[str, str] = {}
        last_time_us = self._leaves[-1].time_us if self._leaves else 0
        for draft in drafts:
            wanted_us = now_us() if draft.time_us is None else draft.time_us
            last_time_us = max(last_time_us, wanted_us)
            item = self._stage(draft, last_time_us, made)
            staged.append(item)
            if draft.kind not in ALIAS_KINDS:
                made.update({output.digest: item.leaf_hash for output in draft.outputs})
        return staged

    def _stage(self, draft: Draft, time_us: int, made: Mapping[str, str]) -> _Staged:
        if isinstance(draft.body, PublicationBody):
            self.registry.require_free(draft.body.name, draft.body.version)
        signer = draft.signer or self.keys.get(OPERATOR)
        record = record_of(draft, time_us=time_us)
        for key in (signer, *draft.cosigners):
            self._key_changes.require_usable(key, draft.kind, time_us)
        envelope = record_to_envelope(record, signer, *draft.cosigners)
        salt = secrets.token_bytes(SALT_BYTES)
        parents = self._parents(draft, signer, made) if draft.parents is None else tuple(draft.parents)
        for parent in parents:
            if self.log.index_of(parent) is None and parent not in made.values():
                raise TrailError(
                    f"parent {parent}: not in the log of {self.home}; a parent is recorded before its child"
                )
        leaf = build_leaf(record, envelope, salt=salt, parents=parents)
        private = rfc8785.dumps({"salt": salt.hex(), "envelope": json.loads(envelope)})
        return _Staged(leaf.to_bytes(), leaf.leaf_hash, private)

    def _parents(self, draft: Draft, signer: SigningKey, made: Mapping[str, str]) -> tuple[str, ...]:
        """The records that made the inputs, then the contributor record of the signing key, each once."""
        known = {**self._newest_output, **made}
        found = [known[artefact.digest] for artefact in draft.inputs if artefact.digest in known]
        if draft.kind != "contributor" and signer.key_id in self._contributor:
            found.append(self._contributor[signer.key_id])
        return tuple(dict.fromkeys(found))

    def _write_private(self, staged: Sequence[_Staged]) -> None:
        descriptors = []
        try:
            for item in staged:
                path = self._records / f"{item.leaf_hash}.json"
                descriptors.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
                with os.fdopen(os.dup(descriptors[-1]), "wb") as file:
                    file.write(item.private)
            for descriptor in descriptors:
                os.fsync(descriptor)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        sync_directory(self._records)

    def _read_leaves(self) -> int:
        """Catch up with the log and return the number of leaves."""
        with self.mutex:
            self.log.refresh()
            for data in self.log.leaves(len(self._leaves), self.log.size):
                leaf = Leaf.from_json(json.loads(data))
                if leaf.kind in NOTICE_KINDS:
                    self._notices.append(len(self._leaves))
                self._leaves.append(leaf)
            return len(self._leaves)

    def _index(self) -> None:
        """Take new records into the maps that find parents."""
        size = self._read_leaves()
        for index in range(self._indexed, size):
            self._indexed = index + 1
            kind = self._leaves[index].kind
            if kind in UNINDEXED_KINDS or kind in ALIAS_KINDS:
                continue
            entry = self._entry(index)
            if entry.record is None:
                continue
            body = entry.record.body
            if isinstance(body, ContributorBody):
                self._contributor[body.key_id] = entry.leaf_hash
            elif isinstance(body, KeyRotationBody) and body.old_key_id in self._contributor:
                self._contributor[body.key_id] = self._contributor[body.old_key_id]
            self._key_changes.take_in(body)
            self._newest_output.update({output.digest: entry.leaf_hash for output in entry.record.outputs})

    def _entry(self, index: int) -> Entry:
        """Read the record behind a leaf and check it against the leaf's commitment."""
        self._read_leaves()
        leaf, leaf_hash = self._leaves[index], self.log.leaf_hash(index)
        path = self._records / f"{leaf_hash}.json"
        try:
            private = path.read_bytes()
        except FileNotFoundError:
            return Entry(index, leaf_hash, leaf, None, None, None, self.erasures().get(leaf_hash))
        try:
            value = parse_canonical(private, "private record")
            envelope, salt = rfc8785.dumps(value["envelope"]), bytes.fromhex(value["salt"])
            if commitment_of(salt, envelope) != leaf.commitment:
                raise RecordError("it does not match the commitment in the log")
            record = record_from_envelope(envelope)
        except (RecordError, KeyError, TypeError, ValueError) as error:
            raise TrailError(f"record {path}: altered on disk: {error}; restore it from a copy") from error
        return Entry(index, leaf_hash, leaf, record, envelope, salt)

    def _store_environment(self) -> None:
        if not self.store.has(environment_digest()):
            self.store.put_blob(environment_manifest())


def now_us() -> int:
    """Return the time in microseconds since 1970."""
    return time.time_ns() // 1000


def record_of(draft: Draft, *, time_us: int) -> Record:
    """Return the record of a draft, with the code and environment of this process."""
    return Record(
        kind=draft.kind,
        contributors=tuple(draft.contributors),
        inputs=tuple(draft.inputs),
        outputs=tuple(draft.outputs),
        code=code_identity(),
        environment=environment_digest(),
        config=draft.config,
        seed=draft.seed,
        attempt=draft.attempt,
        parent_attempt=draft.parent_attempt,
        time_us=time_us,
        body=draft.body,
    )


def _create(home: Path) -> None:
    """Make folders, keys, an empty log and trust.json; safe when several processes do so at once."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("log", "records", "store", "keys", "views", "run"):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    with file_lock(home / "log" / "lock"):
        if (home / TRUST_FILE).is_file():
            return
        keys = KeyRing(home)
        operator, log_key = (keys.get(name) if keys.has(name) else keys.create(name) for name in (OPERATOR, LOG_KEY))
        origin = f"trailmark.local/{log_key.key_id[:16]}"
        Log.create(home / "log", origin, log_key)
        trust = {
            "version": TRUST_VERSION,
            "log": str(NoteKey(origin, log_key.public_bytes)),
            "keys": {operator.key_id: operator.public_hex},
        }
        write_atomically(home / TRUST_FILE, json.dumps(trust, indent=2).encode() + b"\n")
        sync_directory(home)


def _is_leaf(data: bytes) -> bool:
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
