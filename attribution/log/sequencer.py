"""The log on disk: one file of leaves, one signed checkpoint, one lock.

LOG/entries.bin   leaves in order, each a big-endian uint16 length and its bytes (as in a tlog-tiles entry bundle)
LOG/checkpoint    the newest signed tree head; replaced atomically
LOG/lock          flock'ed by the one process that appends
LOG/writer.json   who may append (see fence.py)

An append is: lock, catch up, write leaves, fsync, take the room of a checkpoint, sign and replace it, fsync the
directory, unlock; only then does it return. So the checkpoint never covers a leaf that is not durable, and an
acknowledged one is under it. Up to the signature a failing disk is answered by cutting the leaves off again: nothing
was recorded. From the signature on they stay, whatever fails, for a tree that was signed once must be the only one of
its size. Readers take no lock: they read the checkpoint, then exactly as many leaves as it covers. After a crash the
file may be longer than the checkpoint says: the next writer keeps the whole, valid leaves there (one may have been
acknowledged if the file system lost the newer checkpoint) and cuts the torn rest.
"""

import errno
import fcntl
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from attribution.disk import REAL, Disk, NewFile, write_atomically
from attribution.log.fence import Fence, FencedError
from attribution.log.merkle import Frontier, Tree, hash_leaf
from attribution.log.note import Checkpoint, NoteError, NoteKey, Signs, open_checkpoint, sign_checkpoint
from attribution.log.proof import format_proof
from configs.errors import UserError

ENTRIES, CHECKPOINT, LOCK = "entries.bin", "checkpoint", "lock"
LENGTH_BYTES = 2
MAX_ENTRY_BYTES = 65_535
CHECKPOINT_ROOM = 4096  # bytes taken on the disk before signing; origin, size, root and a signature need about 250


class LogError(UserError):
    """The log on disk is missing, damaged, rolled back or may not be written."""


class LogDiskError(LogError):
    """The disk refused an append: full, read-only or failing. Nothing was recorded."""


class OutcomeUnknown(LogError):
    """The disk or the signer failed after the leaves were durable: the log will have them, or has them already."""


@contextmanager
def refusing(directory: Path) -> Iterator[None]:
    """Turn what the operating system says of a disk into a LogDiskError that names the remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "look at the disk, then try again")
        raise LogDiskError(f"{directory}: {error.strerror or error}; nothing was recorded; {remedy}") from error


REMEDIES = {
    errno.ENOSPC: "free some space, then try again",
    errno.EDQUOT: "raise the quota or free some space, then try again",
    errno.EROFS: "the disk is read-only: mount it for writing, then try again",
    errno.EACCES: "append as the owner of this home",
}


@dataclass(frozen=True)
class LogKeys:
    """The log's key, its private half if this home has it, and the keys it had before (newest first)."""

    key: NoteKey
    signer: Signs | None
    former: tuple[NoteKey, ...] = ()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on a file, which is made when missing.

    Each call opens the file anew: threads, and children that inherited a descriptor, exclude each other too.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # closing releases the lock


class Log:
    """One transparency log: catches up with other processes' appends, appends its own, proves inclusion.

    All leaf hashes are kept in memory (about 150 bytes a leaf with the tree and the index); leaves stay on disk.
    `is_leaf` tells whole leaves from garbage when a crash left bytes beyond the checkpoint. `keys` is asked at each
    look at the log, for another process may have rotated its key; without it, `key` and `signer` stand.
    """

    def __init__(
        self,
        directory: Path,
        key: NoteKey,
        *,
        signer: Signs | None,
        is_leaf: Callable[[bytes], bool],
        keys: Callable[[], LogKeys] | None = None,
        disk: Disk = REAL,
    ) -> None:
        self.directory = directory
        self._keys = keys or (lambda: LogKeys(key, signer))
        self._take_keys()
        self._is_leaf = is_leaf
        self._disk = disk
        self._fence = Fence(directory, disk=disk)
        self._mutex = threading.RLock()
        self._tree = Tree()
        self._offsets = array("Q", [0])  # leaf i occupies [offsets[i], offsets[i + 1]) of entries.bin
        self._index_of: dict[str, int] = {}
        self._note = ""
        self.refresh()
        if self._signer is not None and self._entries_bytes() > self._offsets[-1]:
            with suppress(LogError, FencedError), self.exclusive():  # what cannot be written can be read all the same
                pass

    @staticmethod
    def create(directory: Path, origin: str, signer: Signs, *, disk: Disk = REAL) -> None:
        """Write an empty log; the caller holds the lock. Does nothing when there is a checkpoint already."""
        if (directory / CHECKPOINT).exists():
            return
        if (directory / ENTRIES).exists() and (directory / ENTRIES).stat().st_size:
            raise LogError(_without_checkpoint(directory))
        disk.close(disk.open(directory / ENTRIES, os.O_WRONLY | os.O_CREAT))
        note = sign_checkpoint(Checkpoint(origin, 0, Tree().root()), signer)
        write_atomically(directory / CHECKPOINT, note.encode(), disk=disk)

    @property
    def size(self) -> int:
        """Number of leaves known so far (see `refresh`)."""
        return self._tree.size

    @property
    def checkpoint(self) -> str:
        """The signed note over the leaves known so far."""
        return self._note

    @property
    def known_keys(self) -> tuple[NoteKey, ...]:
        """The log's key and those it had before, newest first."""
        return (self.key, *self._former)

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first `size` leaves (all by default)."""
        return self._tree.root(size)

    def inclusion_path(self, index: int, size: int | None = None) -> list[bytes]:
        """Return the path of leaf `index` to the root of the first `size` leaves."""
        return self._tree.inclusion_path(index, size)

    def consistency_path(self, old_size: int, size: int | None = None) -> list[bytes]:
        """Return the proof that the tree of `old_size` leaves is a prefix of the one of `size`."""
        return self._tree.consistency_path(old_size, size)

    def leaf_hash(self, index: int) -> str:
        """Return the hash of leaf `index` in hex."""
        return self._tree.leaf(index).hex()

    def index_of(self, leaf_hash: str) -> int | None:
        """Return the index of a leaf hash, None when it is not in the log."""
        return self._index_of.get(leaf_hash)

    def leaf(self, index: int) -> bytes:
        """Return the bytes of leaf `index`."""
        return next(self.leaves(index, index + 1))

    def leaves(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of leaves [start, stop), each checked against its hash in the tree."""
        with (self.directory / ENTRIES).open("rb") as file:
            file.seek(self._offsets[start])
            for index in range(start, stop):
                data = file.read(self._offsets[index + 1] - self._offsets[index])[LENGTH_BYTES:]
                if hash_leaf(data) != self._tree.leaf(index):
                    raise LogError(f"log {self.directory}: leaf {index} was altered; restore {ENTRIES} from a copy")
                yield data

    def proofs(self, indices: Sequence[int]) -> list[str]:
        """Return the tlog-proof text of each leaf, all under the newest checkpoint read so far."""
        with self._mutex:
            return [format_proof(index, self._tree.inclusion_path(index), checkpoint=self._note) for index in indices]

    def refresh(self) -> None:
        """Catch up with the checkpoint on disk.

        Raises:
            LogError: it is missing, not signed by this log's key, or not an extension of what was read before.
        """
        with self._mutex:
            note = self._read_checkpoint()
            if note == self._note:
                return
            self._take_keys()
            try:
                checkpoint = open_checkpoint(note, *self.known_keys)
            except NoteError as error:
                raise LogError(f"log {self.directory}: {error}; the checkpoint is not this log's") from error
            if checkpoint.size < self.size:
                raise LogError(
                    f"log {self.directory}: rolled back from {self.size} to {checkpoint.size} leaves; "
                    "restore the newer copy"
                )
            leaves = self._read_leaves(checkpoint.size - self.size)
            self._extend(leaves, checkpoint, note)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from appending for the time of the block, without appending oneself."""
        with self._mutex, refusing(self.directory), file_lock(self.directory / LOCK):
            yield

    @contextmanager
    def exclusive(self) -> Iterator["Appender"]:
        """Hold the log for writing, caught up and clear of any torn tail; yield what appends to it.

        Raises:
            LogError: no key to sign with, or what `refresh` raises.
            FencedError: another writer took over since this one did, or one on another machine holds the log.
            LogDiskError: the disk is full, read-only or failing.
        """
        with self._mutex, refusing(self.directory), file_lock(self.directory / LOCK):
            self._fence.check()
            self.refresh()
            self._take_keys()
            if self._signer is None:
                raise LogError(f"log {self.directory}: no log key in this home, so it can only be read")
            appender = Appender(self, self._signer)
            if self._entries_bytes() > self._offsets[-1]:
                self._recover(appender)
            yield appender

    def take_over(self) -> int:
        """Become the log's writer, the one before fenced off, and return the number of this take-over."""
        with self._mutex, refusing(self.directory), file_lock(self.directory / LOCK):
            return self._fence.take_over()

    def release(self) -> None:
        """Give up what `take_over` took, so that any machine may append again. FencedError when it was lost."""
        with self._mutex, refusing(self.directory), file_lock(self.directory / LOCK):
            self._fence.release()

    def _take_keys(self) -> None:
        keys = self._keys()
        self.key, self._signer, self._former = keys.key, keys.signer, keys.former

    def _recover(self, appender: "Appender") -> None:
        """Keep the whole leaves that a crash left beyond the checkpoint, cut the rest."""
        kept = []
        with (self.directory / ENTRIES).open("rb") as file:
            file.seek(self._offsets[-1])
            while (leaf := _read_leaf(file)) is not None and self._is_leaf(leaf):
                kept.append(leaf)
        self._cut_entries(self._offsets[-1] + sum(LENGTH_BYTES + len(leaf) for leaf in kept))
        if kept:
            appender.publish(kept)

    def _cut_entries(self, size: int) -> None:
        descriptor = self._disk.open(self.directory / ENTRIES, os.O_WRONLY)
        try:
            self._disk.truncate(descriptor, size)
            self._disk.fsync(descriptor)
        finally:
            self._disk.close(descriptor)

    def _write_entries(self, framed: bytes) -> None:
        descriptor = self._disk.open(self.directory / ENTRIES, os.O_WRONLY)
        try:
            self._disk.write(descriptor, framed, offset=self._offsets[-1])
            self._disk.fsync(descriptor)
        finally:
            self._disk.close(descriptor)

    def _read_checkpoint(self) -> str:
        try:
            return (self.directory / CHECKPOINT).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise LogError(_without_checkpoint(self.directory)) from error

    def _entries_bytes(self) -> int:
        return (self.directory / ENTRIES).stat().st_size

    def _read_leaves(self, count: int) -> list[bytes]:
        """Read `count` leaves after those known; LogError when the file is shorter than the checkpoint says."""
        leaves: list[bytes] = []
        with (self.directory / ENTRIES).open("rb") as file:
            file.seek(self._offsets[-1])
            for _ in range(count):
                leaf = _read_leaf(file)
                if leaf is None:
                    raise LogError(
                        f"log {self.directory}: {ENTRIES} ends at leaf {self.size + len(leaves)}, "
                        f"but the checkpoint covers {self.size + count}; restore it from a copy"
                    )
                leaves.append(leaf)
        return leaves

    def _extend(self, leaves: Sequence[bytes], checkpoint: Checkpoint, note: str) -> None:
        """Take on leaves that lead from the known tree to `checkpoint`; nothing changes when they do not."""
        hashes = [hash_leaf(leaf) for leaf in leaves]
        frontier = self._tree.frontier()
        for leaf_hash in hashes:
            frontier.append(leaf_hash)
        if frontier.size != checkpoint.size or frontier.root() != checkpoint.root:
            raise LogError(
                f"log {self.directory}: the leaves do not lead to the signed checkpoint of {checkpoint.size} leaves; "
                f"{ENTRIES} was altered, restore it from a copy"
            )
        for leaf, leaf_hash in zip(leaves, hashes, strict=True):
            self._index_of[leaf_hash.hex()] = self._tree.size
            self._tree.append(leaf_hash)
            self._offsets.append(self._offsets[-1] + LENGTH_BYTES + len(leaf))
        self._note = note

    def _frontier_after(self, leaves: Sequence[bytes]) -> Frontier:
        frontier = self._tree.frontier()
        for leaf in leaves:
            frontier.append(hash_leaf(leaf))
        return frontier


class Appender:
    """The right to append, valid inside `Log.exclusive`."""

    def __init__(self, log: Log, signer: Signs) -> None:
        self._log = log
        self._signer = signer

    def append(self, leaves: Sequence[bytes]) -> None:
        """Append leaves as one group: one fsync and one checkpoint, durable on return.

        Raises:
            LogDiskError: nothing was recorded.
            OutcomeUnknown: they will be in the log, or are already; so they may be of a process that dies in here.
        """
        if not leaves:
            return
        for leaf in leaves:
            if not 0 < len(leaf) <= MAX_ENTRY_BYTES:
                raise LogError(f"leaf of {len(leaf)} bytes: a log entry has 1 to {MAX_ENTRY_BYTES}")
        log = self._log
        framed = b"".join(len(leaf).to_bytes(LENGTH_BYTES, "big") + leaf for leaf in leaves)
        with ExitStack() as stack:
            try:
                log._write_entries(framed)
                room = stack.enter_context(NewFile(log.directory / CHECKPOINT, disk=log._disk))
                room.reserve(CHECKPOINT_ROOM)
            except OSError as error:
                self._take_back(error)
                raise
            log._fence.check()  # were the lock no lock on this file system, this would still sign no second history
            try:
                self.publish(leaves, room)
            except Exception as error:
                raise OutcomeUnknown(
                    f"log {log.directory}: {error}; {len(leaves)} records may be in the log all the same: "
                    "look for them with `trailmark log show` before you record them again"
                ) from error

    def sign_anew(self) -> None:
        """Put the log's new key under the same tree: the last act of a rotation. OutcomeUnknown when the disk fails."""
        self._log._take_keys()
        assert self._log._signer is not None, "who rotates the log's key has it"
        self._signer = self._log._signer
        try:
            self.publish(())
        except OSError as error:
            raise OutcomeUnknown(
                f"log {self._log.directory}: {error}; the key was rotated all the same, and signs with the next append"
            ) from error

    def publish(self, leaves: Sequence[bytes], file: NewFile | None = None) -> None:
        """Sign and store the checkpoint that adds `leaves`, durable among the entries already."""
        log = self._log
        if file is None:
            with NewFile(log.directory / CHECKPOINT, disk=log._disk) as file:
                return self.publish(leaves, file)
        frontier = log._frontier_after(leaves)
        checkpoint = Checkpoint(log.key.name, frontier.size, frontier.root())
        note = sign_checkpoint(checkpoint, self._signer)
        file.write([note.encode()])
        file.name()
        log._extend(leaves, checkpoint, note)

    def _take_back(self, error: Exception) -> None:
        """Cut off leaves that no checkpoint was signed for. OutcomeUnknown when even that fails."""
        try:
            self._log._cut_entries(self._log._offsets[-1])
        except OSError:
            raise OutcomeUnknown(
                f"log {self._log.directory}: {error}; the records could not be taken back and may turn up in the log: "
                "look for them with `trailmark log show` before you record them again"
            ) from error


def _read_leaf(file: BinaryIO) -> bytes | None:
    """The next framed leaf of a file open for reading, None at its end or when it is cut short."""
    prefix = file.read(LENGTH_BYTES)
    length = int.from_bytes(prefix, "big")
    if len(prefix) < LENGTH_BYTES or not length:
        return None
    data = file.read(length)
    return data if len(data) == length else None


def entries_of(path: Path, count: int) -> Iterator[bytes]:
    """Yield the first leaves of a file of entries; LogError when it ends before."""
    with path.open("rb") as file:
        for index in range(count):
            leaf = _read_leaf(file)
            if leaf is None:
                raise LogError(f"{path}: ends at leaf {index}, but the checkpoint covers {count}")
            yield leaf


def _without_checkpoint(directory: Path) -> str:
    return (
        f"log {directory}: no {CHECKPOINT} beside {ENTRIES}; signing a new one could contradict an earlier one, "
        "so restore it from a copy"
    )
