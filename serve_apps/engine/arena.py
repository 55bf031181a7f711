"""Places adapters of any size in one flat buffer: best fit, and the cheapest compaction where holes are too small.

0        a          b     c                 size
|--------|##########|-----|#######|---------|        # taken by a key      - hole
"""

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """Elements [source, source + size) of `key` move down to `target`; the two ranges may overlap."""

    key: str
    source: int
    target: int
    size: int


class Arena:
    """Owns the ranges of 0..size-1, each taken by one key or free. Deterministic: the same calls give the same ranges.

    Every range begins and ends at a multiple of `alignment`, counted in elements.
    """

    def __init__(self, size: int, *, alignment: int = 1) -> None:
        self._alignment = alignment
        self.size = size // alignment * alignment
        self._ranges: dict[str, tuple[int, int]] = {}
        # (start, size, key), ordered by start.
        self._ordered: list[tuple[int, int, str]] = []
        self._num_taken = 0

    @property
    def num_free(self) -> int:
        """Elements that nobody owns, in however many holes."""
        return self.size - self._num_taken

    def rounded(self, size: int) -> int:
        """Return what `size` elements take up."""
        return -(-size // self._alignment) * self._alignment

    def start_of(self, key: str) -> int:
        """Return where a key's range begins."""
        return self._ranges[key][0]

    def allocate(self, key: str, size: int) -> int | None:
        """Take the smallest hole that holds `size` elements; None when there is none, and nothing is taken."""
        assert key not in self._ranges and size > 0, f"{key} has a range already, or asks for none"
        size = self.rounded(size)
        fitting = [(length, start) for start, length in self._holes() if length >= size]
        if not fitting:
            return None
        start = min(fitting)[1]
        self._insert(key, start, size)
        return start

    def free(self, key: str) -> None:
        """Give a key's range back."""
        self._remove(key)

    def compact(self, size: int) -> list[Move]:
        """Make one hole of `size` elements out of neighbouring holes, moving as few elements as possible.

        Returns the moves in the order in which the caller must carry them out: each target lies in what is free or has
        moved before. Needs `rounded(size) <= num_free`.
        """
        first, last = self._cheapest_window(self.rounded(size))
        moves: list[Move] = []
        target = self._ordered[first - 1][0] + self._ordered[first - 1][1] if first else 0
        for start, length, key in self._ordered[first:last]:
            if start != target:
                moves.append(Move(key, start, target, length))
            target += length
        for move in moves:
            self._remove(move.key)
        for move in moves:
            self._insert(move.key, move.target, move.size)
        return moves

    def check_integrity(self) -> None:
        """Assert that ranges are aligned, inside, apart from each other, and that the counts agree."""
        end = 0
        for start, size, key in self._ordered:
            assert self._ranges[key] == (start, size), f"{key} lies elsewhere than its entry says"
            assert start >= end and size > 0, f"{key} overlaps its neighbour"
            assert start % self._alignment == 0 and size % self._alignment == 0, f"{key} is not aligned"
            end = start + size
        assert end <= self.size, "a range ends outside"
        assert len(self._ordered) == len(self._ranges), "a range is listed twice"
        assert self._num_taken == sum(size for _, size, _ in self._ordered), "the taken count disagrees with the ranges"

    def _holes(self) -> list[tuple[int, int]]:
        """Return every hole as (start, size), in order; hole i lies before range i, the last one behind all ranges."""
        holes, end = [], 0
        for start, size, _ in self._ordered:
            holes.append((end, start - end))
            end = start + size
        return [*holes, (end, self.size - end)]

    def _cheapest_window(self, size: int) -> tuple[int, int]:
        """Return ranges [first, last) whose surrounding holes sum to `size` or more, with the fewest taken elements."""
        holes = [length for _, length in self._holes()]
        best: tuple[int, int, int] | None = None
        first = free = taken = 0
        for last, hole in enumerate(holes):
            free += hole
            while free - holes[first] >= size:
                free -= holes[first]
                taken -= self._ordered[first][1]
                first += 1
            if free >= size and (best is None or taken < best[0]):
                best = (taken, first, last)
            if last < len(self._ordered):
                taken += self._ordered[last][1]
        assert best is not None, f"{size} elements asked for, {self.num_free} free"
        return best[1], best[2]

    def _insert(self, key: str, start: int, size: int) -> None:
        self._ranges[key] = (start, size)
        insort(self._ordered, (start, size, key))
        self._num_taken += size

    def _remove(self, key: str) -> None:
        start, size = self._ranges.pop(key)
        del self._ordered[bisect_left(self._ordered, (start, size, key))]
        self._num_taken -= size
