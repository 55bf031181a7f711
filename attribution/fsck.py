"""Everything on disk against everything else: what `trailmark fsck` checks and what it may repair.

The checkpoint's signature; that the entries lead to its root; each leaf's form, time and parents; each record against
its leaf's commitment; the store's digests; static tiles, where there are any. What a crash leaves behind (bytes beyond
the checkpoint, private halves of leaves that were never logged, files that never got their name) is told apart from
damage: the next append cuts the first two, `repair` all three. Nothing else is ever changed.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from attribution.bodies import RedactionBody
from attribution.canonical import canonical_json
from attribution.disk import REAL
from attribution.log.fence import Fence, FencedError
from attribution.log.merkle import Tree, hash_leaf
from attribution.log.note import Checkpoint, NoteError, NoteKey, open_checkpoint
from attribution.log.sequencer import CHECKPOINT, ENTRIES, LOCK, LogError, entries_of, file_lock
from attribution.log.tile_check import check_tiles
from attribution.private_records import read_lines, segments
from attribution.records import (
    Leaf,
    Record,
    RecordError,
    commitment_of,
    parse_canonical,
    parse_strict,
    record_from_envelope,
)
from attribution.store import Store, StoreError
from configs.errors import UserError

RESTORE = "restore it from a copy"
OLD_S = 3600  # a nameless file of a living process is younger than this
TRUST_FILE = "trust.json"


class FsckError(UserError):
    """There is nothing here that could be checked."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: where, what, and what to do about it."""

    where: str
    what: str
    remedy: str


@dataclass
class Report:
    """What was checked, what is damaged, and what a crash left behind."""

    checked: Counter[str] = field(default_factory=Counter)
    damage: list[Finding] = field(default_factory=list)
    leftovers: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged; what a crash left behind does no harm."""
        return not self.damage


def check(home: Path, *, with_store: bool = True) -> Report:
    """Check a home folder and return what was found; reads only. FsckError when it holds no log."""
    if not (home / TRUST_FILE).is_file():
        raise FsckError(f"home {home}: holds no trail (no {TRUST_FILE}); set TRAILMARK_HOME")
    return _Check(home).run(with_store=with_store)


def repair(home: Path) -> list[str]:
    """Remove what a crash left behind and return what was done; the log's lock is held meanwhile.

    Raises what opening and locking the log raises: of a damaged log nothing is touched.
    """
    from attribution.trail import Trail

    before, num_bytes = _Check(home).checkpoint(), (home / "log" / ENTRIES).stat().st_size
    size = 0 if before is None else before.size
    trail, done = Trail.open(home, create=False), []
    with trail.log.exclusive():
        if trail.log.size > size:
            done.append(f"published {trail.log.size - size} entries that were durable but under no checkpoint yet")
        if (num_cut := num_bytes - (home / "log" / ENTRIES).stat().st_size) > 0:
            done.append(f"cut {num_cut} bytes of a torn entry off {ENTRIES}")
        if num_cut := trail.private.trim(lambda leaf_hash: trail.log.index_of(leaf_hash) is not None):
            done.append(f"cut {num_cut} bytes of records that were never logged")
        for path in nameless_files(home):
            REAL.unlink(path)
            done.append(f"removed {path.relative_to(home)}, which never got its name")
    return done


def nameless_files(home: Path) -> list[Path]:
    """Return files that a dead process left before it could name them."""
    folders = [home, home / "log", home / "records", home / "store" / "blobs"]
    found = [path for folder in folders if folder.is_dir() for path in folder.glob(".*-*") if path.is_file()]
    within_log = {home / "log", home / "records"}  # written under the lock that the caller holds
    return [path for path in found if path.parent in within_log or time.time() - path.stat().st_mtime > OLD_S]


class _Check:
    """One run over a home."""

    def __init__(self, home: Path) -> None:
        self._home, self._log, self.report = home, home / "log", Report()
        self._leaves: list[Leaf] = []
        self._index_of: dict[str, int] = {}
        self._tree = Tree()

    def run(self, *, with_store: bool) -> Report:
        """Check log, records, store and tiles in turn."""
        checkpoint = self.checkpoint()
        self._fence()
        if checkpoint is not None:
            with self._lock():  # no append under way: what lies beyond the checkpoint is a crash's
                segment_sizes = {path: path.stat().st_size for path in segments(self._home / "records")}
                checkpoint = self.checkpoint() or checkpoint
                num_bytes = (self._log / ENTRIES).stat().st_size
                leftovers = nameless_files(self._home)
            for path in leftovers:
                self._leftover(path, "never got its name", "run `trailmark fsck --repair`")
            self._entries(checkpoint, num_bytes)
            if self.report.is_sound:  # damaged entries cannot say which record is whose
                self._records(segment_sizes)
                for where, what in check_tiles(self._home / "tiles", self._tree, self._leaf_bytes):
                    self._damage(self._home / "tiles" / where, what, "delete the file: the publisher writes it again")
        if with_store:
            self._store()
        return self.report

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The log's lock, or nothing on a disk that cannot be written: then nobody appends either."""
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(file_lock(self._log / LOCK))
            yield

    def checkpoint(self) -> Checkpoint | None:
        """Return the signed tree head, None when it is damaged."""
        path = self._log / CHECKPOINT
        try:
            trust = parse_strict((self._home / TRUST_FILE).read_bytes(), TRUST_FILE)
            former = [item["log"] for item in trust.get("former", []) if item["role"] == "log"]
            keys = [NoteKey.parse(text) for text in (trust["log"], *former)]
            return open_checkpoint(path.read_text(encoding="utf-8"), *keys)
        except OSError as error:
            self._damage(path, str(error.strerror), f"{RESTORE}; a new one could contradict one signed before")
        except (NoteError, RecordError, UnicodeDecodeError, KeyError, TypeError) as error:
            self._damage(path, str(error), RESTORE)
        return None

    def _fence(self) -> None:
        try:
            Fence(self._log).read()
        except FencedError as error:
            self._damage(self._log / "writer.json", str(error), RESTORE)

    def _entries(self, checkpoint: Checkpoint, num_bytes: int) -> None:
        """Check the leaves under the checkpoint and tell what follows them."""
        path, end, last_time_us = self._log / ENTRIES, 0, 0
        try:
            for index, data in enumerate(entries_of(path, checkpoint.size)):
                self._tree.append(hash_leaf(data))
                self._index_of[hash_leaf(data).hex()] = index
                end += 2 + len(data)
                last_time_us = self._leaf(index, data, last_time_us)
        except LogError as error:
            self._damage(path, str(error), RESTORE)
            return
        if self._tree.root() != checkpoint.root:
            what = f"the {checkpoint.size} leaves do not lead to the root of the signed checkpoint: one was altered"
            self._damage(path, what, RESTORE)
        if num_bytes > end:
            what = f"{num_bytes - end} bytes beyond the checkpoint, of an append that was cut off"
            self._leftover(
                path, what, "the next append or `trailmark fsck --repair` keeps what is whole, cuts the rest"
            )

    def _leaf(self, index: int, data: bytes, last_time_us: int) -> int:
        """Check one leaf; return its time."""
        self.report.checked["entries"] += 1
        where = self._log / f"{ENTRIES} leaf {index}"
        try:
            leaf = Leaf.from_bytes(data)
        except RecordError as error:
            self._damage(where, str(error), RESTORE)
            leaf = Leaf("approval", last_time_us, (), (), "0" * 64)
        self._leaves.append(leaf)
        if leaf.time_us < last_time_us:
            self._damage(
                where, "is older than the leaf before it", "tell whoever runs the log: it was not we who wrote it"
            )
        for parent in leaf.parents:
            if self._index_of.get(parent, index) >= index:
                self._damage(where, f"its parent {parent} is no earlier entry", "tell whoever runs the log")
        return max(leaf.time_us, last_time_us)

    def _records(self, segment_sizes: dict[Path, int]) -> None:
        """Check each private half against its leaf, and that what is missing was erased on purpose."""
        found: set[str] = set()
        redacted: set[str] = set()
        newest = max(segment_sizes, default=None)
        for path, size in segment_sizes.items():
            lines = read_lines(path, size)
            logged = [number for number, (leaf_hash, _) in enumerate(lines) if leaf_hash in self._index_of]
            for number, (leaf_hash, private) in enumerate(lines):
                if leaf_hash in self._index_of:
                    self._record(path, leaf_hash, private, found, redacted)
                elif path != newest or number < max(logged, default=-1):
                    self._damage(path, f"line {number + 1} belongs to no entry of the log", RESTORE)
            whole = sum(len(private) + 66 for _, private in lines[: max(logged, default=-1) + 1])
            if path == newest and size > whole:
                remedy = "the next append or `trailmark fsck --repair` cuts them off"
                self._leftover(path, f"{size - whole} bytes of records that were never logged", remedy)
        for path in sorted((self._home / "records").glob("*.json")):
            if path.stem in self._index_of:
                self._record(path, path.stem, path.read_bytes(), found, redacted)
            else:
                self._leftover(path, "belongs to no entry of the log", "remove it when no newer copy of the log exists")
        for leaf_hash, index in self._index_of.items():
            if leaf_hash not in found and leaf_hash not in redacted:
                what = f"the record of entry {index} ({self._leaves[index].kind}) is gone, and no redaction says why"
                self._damage(self._home / "records" / leaf_hash, what, f"{RESTORE}, or record its redaction")
        self.report.checked["erased records"] = len(self._index_of) - len(found)

    def _record(self, path: Path, leaf_hash: str, private: bytes, found: set[str], redacted: set[str]) -> None:
        found.add(leaf_hash)
        self.report.checked["records"] += 1
        try:
            record = record_of_private(private, self._leaves[self._index_of[leaf_hash]])
        except (RecordError, KeyError, TypeError, ValueError) as error:
            self._damage(path, f"the record of leaf {leaf_hash}: {error}", RESTORE)
            return
        if isinstance(record.body, RedactionBody):
            redacted.add(record.body.leaf)

    def _store(self) -> None:
        """Hash every blob and every file of every directory again."""
        store = Store(self._home / "store")
        for path in sorted((store.root / "blobs").glob("??/*")):
            self.report.checked["blobs"] += 1
            with path.open("rb") as file:
                hasher = sha256()
                while piece := file.read(1 << 20):
                    hasher.update(piece)
            if hasher.hexdigest() != path.name:
                self._damage(
                    path, f"its bytes have the digest {hasher.hexdigest()}", f"{RESTORE}, or put the blob again"
                )
        for path in sorted((store.root / "dirs").glob("[0-9a-f]*")):
            self.report.checked["directories"] += 1
            try:
                store.get_directory(f"sha256:{path.name}")
            except StoreError as error:
                self._damage(path, str(error), RESTORE)

    def _leaf_bytes(self) -> Iterator[bytes]:
        return entries_of(self._log / ENTRIES, self._tree.size)

    def _damage(self, path: Path, what: str, remedy: str) -> None:
        finding = Finding(str(path), what, remedy)
        if finding not in self.report.damage:
            self.report.damage.append(finding)

    def _leftover(self, path: Path, what: str, remedy: str) -> None:
        self.report.leftovers.append(Finding(str(path), what, remedy))


def record_of_private(private: bytes, leaf: Leaf) -> Record:
    """Return the record of a private half; RecordError, KeyError, TypeError or ValueError when it is not the leaf's."""
    value = parse_canonical(private, "private record")
    envelope = canonical_json(value["envelope"])
    if commitment_of(bytes.fromhex(value["salt"]), envelope) != leaf.commitment:
        raise RecordError("it does not match the commitment in the log")
    return record_from_envelope(envelope)
