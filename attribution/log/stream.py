"""Read a log on from a verified prefix: no tree in memory, nothing read twice, every leaf under the signed checkpoint.

`Log` holds all leaf hashes, which proofs need. A view that only follows needs less: the right edge of the tree it has
read (at most 64 hashes) and where the next leaf begins. Whoever keeps that `Mark` catches up in the time of the new
leaves alone, and a log that was altered, cut or swapped does not lead from the mark to the checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.log.merkle import HASH_BYTES, Frontier, hash_leaf, root_of_peaks
from attribution.log.note import Checkpoint, NoteError, NoteKey, open_checkpoint
from attribution.log.sequencer import CHECKPOINT, ENTRIES, LENGTH_BYTES, LogError

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Mark:
    """A prefix of a log: how many leaves, where the next one begins, the perfect subtrees' hashes, widest first."""

    size: int = 0
    offset: int = 0
    peaks: tuple[bytes, ...] = ()

    def root(self) -> bytes:
        """Return the root of the prefix."""
        return root_of_peaks(self.peaks)

    def packed_peaks(self) -> bytes:
        """Return the peaks as one string of bytes."""
        return b"".join(self.peaks)

    @classmethod
    def unpack(cls, size: int, offset: int, packed: bytes) -> "Mark":
        """Return the mark whose peaks were packed."""
        peaks = tuple(packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES))
        return cls(size, offset, peaks)


@dataclass(frozen=True)
class Piece:
    """Some leaves in a row with their hashes (32 bytes each), and the mark behind the last."""

    first: int
    leaves: tuple[bytes, ...]
    hashes: tuple[bytes, ...]
    mark: Mark


class LeafStream:
    """The leaves of the log in a directory, as far as its checkpoint goes."""

    def __init__(self, directory: Path, keys: Callable[[], Sequence[NoteKey]]) -> None:
        """`keys` is asked at each new checkpoint for the log's key and those before it: another may have taken over."""
        self.directory = directory
        self._keys = keys
        self._opened: tuple[str, Checkpoint] | None = None

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint on disk. LogError when it is missing or not this log's."""
        try:
            note = (self.directory / CHECKPOINT).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise LogError(f"log {self.directory}: no {CHECKPOINT}; restore it from a copy") from error
        if self._opened is None or self._opened[0] != note:
            try:
                self._opened = note, open_checkpoint(note, *self._keys())
            except NoteError as error:
                raise LogError(f"log {self.directory}: {error}; the checkpoint is not this log's") from error
        return self._opened[1]

    def pieces(self, mark: Mark, checkpoint: Checkpoint, *, num_leaves: int) -> Iterator[Piece]:
        """Yield the leaves from `mark` to `checkpoint`, `num_leaves` at a time.

        Only the last piece shows whether all of them lead to the checkpoint: when they do not, LogError is raised
        instead of yielding it.
        """
        frontier, offset = Frontier(mark.size, mark.peaks), mark.offset
        with (self.directory / ENTRIES).open("rb", buffering=BUFFER_BYTES) as file:
            file.seek(offset)
            while frontier.size < checkpoint.size:
                first = frontier.size
                leaves = self._read(file.read, first, min(num_leaves, checkpoint.size - first))
                hashes = tuple(map(hash_leaf, leaves))
                for leaf_hash in hashes:
                    frontier.append(leaf_hash)
                offset += sum(map(len, leaves)) + LENGTH_BYTES * len(leaves)
                if frontier.size == checkpoint.size and frontier.root() != checkpoint.root:
                    raise LogError(
                        f"log {self.directory}: the leaves do not lead to the signed checkpoint of {checkpoint.size} "
                        f"leaves; {ENTRIES} was altered, restore it from a copy"
                    )
                yield Piece(first, leaves, hashes, Mark(frontier.size, offset, frontier.peaks))

    def _read(self, read: Callable[[int], bytes], first: int, count: int) -> tuple[bytes, ...]:
        leaves = []
        for number in range(count):
            leaf = read(int.from_bytes(read(LENGTH_BYTES), "big"))
            if not leaf:
                raise LogError(
                    f"log {self.directory}: {ENTRIES} ends at leaf {first + number}, before its checkpoint; "
                    "restore it from a copy"
                )
            leaves.append(leaf)
        return tuple(leaves)
