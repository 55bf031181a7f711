"""The private halves of the records: envelope and salt, durable before their leaves, erasable one by one.

RECORDS/000000001200.records   lines `LEAF_HASH {"envelope":...,"salt":...}` of the log's entries from number 1200 on
RECORDS/<leaf hash>.json       one record, as homes had them before there were segments: read and erased, not written

A group of records is one write and one fsync at the end of the newest segment; about a megabyte fills one. Lines are
found by leaf hash, so that what a crash left behind a segment's last logged record is never mistaken for anything: the
next append cuts it off. Whoever appends, trims or erases holds the log's lock; readers take none.
"""

import os
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.disk import REAL, Disk, write_atomically
from configs.errors import UserError

SUFFIX = ".records"
SEGMENT_BYTES = 1 << 20
NUM_TABLES = 16
HASH_DIGITS = 64

IsLogged = Callable[[str], bool]


class RecordsError(UserError):
    """The private records on disk do not belong to the log beside them."""


@dataclass(frozen=True)
class _Table:
    """Where the lines of a segment lie, as of one state of its file (inode, size, time of change in ns)."""

    state: tuple[int, int, int]
    places: dict[str, tuple[int, int]]  # leaf hash -> offset and bytes of the private half
    end: int
    last: str  # the leaf hash of the last line

    def is_prefix_of(self, descriptor: int) -> bool:
        """Whether the file still begins with these lines; it does not when its tail was cut and written anew."""
        if not self.end or os.fstat(descriptor).st_ino != self.state[0]:
            return False
        return os.pread(descriptor, HASH_DIGITS, self.places[self.last][0] - HASH_DIGITS - 1) == self.last.encode()


class PrivateRecords:
    """HOME/records."""

    def __init__(self, directory: Path, *, disk: Disk = REAL, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory, self._disk, self._segment_bytes = directory, disk, segment_bytes
        self._starts: list[int] = []
        self._tables: OrderedDict[Path, _Table] = OrderedDict()
        self._glimpsed: deque[Path] = deque(maxlen=NUM_TABLES)
        self._end: tuple[Path, int, int] | None = None  # newest segment, inode, size: as this process left it

    def append(self, start: int, items: Sequence[tuple[str, bytes]], *, is_logged: IsLogged) -> None:
        """Write the private halves (leaf hash, bytes) of entries `start` and on; durable on return.

        OSError when they do not fit: then nothing of them is kept, or the next append cuts it off.
        """
        path, size = self._newest(start, is_logged)
        data = _to_bytes(items)
        self._end = None
        descriptor = self._disk.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            try:
                self._disk.write(descriptor, data, offset=size)
                self._disk.fsync(descriptor)
                if not size:  # new, or made by an append that failed before its name was durable
                    self._disk.sync_directory(self._directory)
            except OSError:
                self._disk.truncate(descriptor, size)
                raise
            self._end = (path, os.fstat(descriptor).st_ino, size + len(data))
        finally:
            self._disk.close(descriptor)

    def read(self, index: int, leaf_hash: str) -> bytes | None:
        """Return the private half of entry `index`, None when it was erased."""
        found = self._find(index, leaf_hash)
        if found is None and self._list():  # another process may have begun a segment since
            found = self._find(index, leaf_hash)
        if found is not None:
            return found
        try:
            return self._single(leaf_hash).read_bytes()
        except FileNotFoundError:
            return None

    def erase(self, index: int, leaf_hash: str) -> bool:
        """Remove the private half of entry `index` for good; return whether it was there. The rest stays readable.

        The bytes leave the file system; whether a disk or a backup keeps them is for whoever runs it.
        """
        self._list()
        path, single = self._segment_of(index), self._single(leaf_hash)
        lines = read_lines(path) if path else []
        kept = [line for line in lines if line[0] != leaf_hash]
        if path and len(kept) < len(lines):
            write_atomically(path, _to_bytes(kept), disk=self._disk)
        was_single = single.exists()
        if was_single:
            self._disk.unlink(single)
            self._disk.sync_directory(self._directory)
        return was_single or len(kept) < len(lines)

    def distrust(self) -> None:
        """Have the next append look at the whole segment: the leaves of the last one may not have been logged."""
        self._end = None

    def trim(self, is_logged: IsLogged) -> int:
        """Cut what a crash or a failed append left behind the last logged line; return how many bytes that were."""
        found = segments(self._directory)
        if not found:
            return 0
        self._end = None
        size = found[-1].stat().st_size
        return size - self._logged_size(found[-1], is_logged)

    def _logged_size(self, path: Path, is_logged: IsLogged) -> int:
        """Cut a segment behind its last logged line and return its size; only what others added is read."""
        stat, begin = path.stat(), 0
        if self._end is not None and self._end[:2] == (path, stat.st_ino) and stat.st_size >= self._end[2]:
            begin = self._end[2]
        end = logged_bytes(path, is_logged, begin=begin)
        if end < stat.st_size:
            self._cut(path, end)
        return end

    def _newest(self, start: int, is_logged: IsLogged) -> tuple[Path, int]:
        """The segment to append to, which may be a new one, and its size. Cuts what was never logged."""
        if self._end is not None and self._is_as_left(*self._end):
            path, _, size = self._end
        else:
            found = segments(self._directory)
            if not found:
                return self._segment(start), 0
            path = found[-1]
            if start_of(path) > start:
                raise RecordsError(
                    f"records {path}: hold entries from number {start_of(path)} on, but the log has only {start}; "
                    "it was rolled back: restore its newer copy"
                )
            size = self._logged_size(path, is_logged)
        return (path, size) if size < self._segment_bytes else (self._segment(start), 0)

    def _is_as_left(self, path: Path, inode: int, size: int) -> bool:
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        return (stat.st_ino, stat.st_size) == (inode, size)

    def _cut(self, path: Path, size: int) -> None:
        descriptor = self._disk.open(path, os.O_WRONLY)
        try:
            self._disk.truncate(descriptor, size)
            self._disk.fsync(descriptor)
        finally:
            self._disk.close(descriptor)

    def _list(self) -> bool:
        """Look which segments there are; return whether that is news."""
        starts = [start_of(path) for path in segments(self._directory)]
        is_news, self._starts = starts != self._starts, starts
        return is_news

    def _find(self, index: int, leaf_hash: str) -> bytes | None:
        path = self._segment_of(index)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                place = self._place(path, file.fileno(), leaf_hash)
                return None if place is None else os.pread(file.fileno(), place[1], place[0])
        except FileNotFoundError:
            return None

    def _place(self, path: Path, descriptor: int, leaf_hash: str) -> tuple[int, int] | None:
        """Where a private half lies: offset and bytes. What is new in the segment since the last look is read.

        A segment that is read once is searched, which takes a tenth of the time of making its table.
        """
        stat = os.fstat(descriptor)
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        table = self._tables.get(path)
        if table is None and path not in self._glimpsed:
            self._glimpsed.append(path)
            return _search(os.pread(descriptor, stat.st_size, 0), leaf_hash)
        if table is None or table.state != state:
            begin = table.end if table is not None and table.is_prefix_of(descriptor) else 0
            known = table.places if table is not None and begin else {}
            table = _table(os.pread(descriptor, stat.st_size - begin, begin), begin, state, known)
            self._tables[path] = table
            while len(self._tables) > NUM_TABLES:
                self._tables.popitem(last=False)
        return table.places.get(leaf_hash)

    def _segment_of(self, index: int) -> Path | None:
        position = bisect_right(self._starts, index)
        return self._segment(self._starts[position - 1]) if position else None

    def _segment(self, start: int) -> Path:
        return self._directory / f"{start:012d}{SUFFIX}"

    def _single(self, leaf_hash: str) -> Path:
        return self._directory / f"{leaf_hash}.json"


def segments(directory: Path) -> list[Path]:
    """Return the segments of a folder of records, in the order of their entries."""
    return sorted(directory.glob(f"*{SUFFIX}"))


def start_of(path: Path) -> int:
    """Return the number of the first entry whose record may be in a segment."""
    return int(path.name.removesuffix(SUFFIX))


def read_lines(path: Path, num_bytes: int | None = None) -> list[tuple[str, bytes]]:
    """Return the whole lines in the first bytes of a segment (all by default): leaf hash and private half."""
    data = path.read_bytes()[:num_bytes]
    return [(_hash_of(line), line[HASH_DIGITS + 1 :]) for line in data.split(b"\n")[:-1]]


def logged_bytes(path: Path, is_logged: IsLogged, *, begin: int = 0) -> int:
    """Return up to where a segment holds lines of the log: what follows its last logged line is a crash's.

    The lines before `begin` are known to be the log's; when no line begins there any more, all are looked at.
    """
    with path.open("rb") as file:
        file.seek(max(0, begin - 1))
        if begin and file.read(1) != b"\n":
            begin = 0
            file.seek(0)
        lines = file.read().split(b"\n")[:-1]
    end = offset = begin
    for line in lines:
        offset += len(line) + 1
        if is_logged(_hash_of(line)):
            end = offset
    return end


def _to_bytes(items: Sequence[tuple[str, bytes]]) -> bytes:
    return b"".join(b"%b %b\n" % (leaf_hash.encode(), private) for leaf_hash, private in items)


def _hash_of(line: bytes) -> str:
    return line[:HASH_DIGITS].decode("ascii", "replace")


def _search(data: bytes, leaf_hash: str) -> tuple[int, int] | None:
    """Where the private half of the last whole line of a leaf hash lies in a segment: offset and bytes."""
    end = data.rfind(b"\n")
    begin = data.rfind(b"\n%b " % leaf_hash.encode(), 0, end + 1) + 1
    if not data.startswith(b"%b " % leaf_hash.encode(), begin) or end < 0:
        return None
    begin += HASH_DIGITS + 1
    return begin, data.index(b"\n", begin) - begin


def _table(data: bytes, begin: int, state: tuple[int, int, int], known: dict[str, tuple[int, int]]) -> _Table:
    """The table of a segment whose lines before offset `begin` are known and whose other bytes are `data`."""
    places, offset, last = dict(known), begin, next(reversed(known), "") if known else ""
    for line in data.split(b"\n")[:-1]:
        last = _hash_of(line)
        places[last] = (offset + HASH_DIGITS + 1, len(line) - HASH_DIGITS - 1)
        offset += len(line) + 1
    return _Table(state, places, offset, last)
