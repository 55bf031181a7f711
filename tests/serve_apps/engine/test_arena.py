"""The arena under random operations: nothing overlaps, best fit, and compaction moves no more than it must."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_apps.engine.arena import Arena

SIZE, ALIGNMENT = 40, 2


class ArenaMachine(RuleBasedStateMachine):
    """A buffer in which each key writes its own number: whatever moves must arrive whole."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SIZE, alignment=ALIGNMENT)
        self.buffer = [0] * SIZE
        self.sizes: dict[str, int] = {}
        self.num_keys = 0

    def write(self, start: int, size: int) -> None:
        key = str(self.num_keys)
        self.buffer[start : start + size] = [self.num_keys] * size
        self.sizes[key] = size

    @rule(size=st.integers(1, 20))
    def allocate(self, size: int) -> None:
        self.num_keys += 1
        holes = self.holes()
        start = self.arena.allocate(str(self.num_keys), size)
        rounded = self.arena.rounded(size)
        fitting = [length for _, length in holes if length >= rounded]
        if start is None:
            assert not fitting
        else:
            assert (start, min(fitting)) in holes, "not the best fit"
            self.write(start, size)

    @rule(size=st.integers(1, 30))
    def compact_and_allocate(self, size: int) -> None:
        if self.arena.rounded(size) > self.arena.num_free:
            with pytest.raises(AssertionError):
                self.arena.compact(size)
            return
        cheapest = self.cheapest(self.arena.rounded(size))
        moves = self.arena.compact(size)
        assert sum(move.size for move in moves) <= cheapest
        for move in moves:
            self.buffer[move.target : move.target + move.size] = self.buffer[move.source : move.source + move.size]
        self.num_keys += 1
        start = self.arena.allocate(str(self.num_keys), size)
        assert start is not None
        self.write(start, size)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.sizes)))
        self.arena.free(key)
        del self.sizes[key]

    @invariant()
    def accounts_hold(self) -> None:
        self.arena.check_integrity()
        assert self.arena.num_free == SIZE - sum(self.arena.rounded(size) for size in self.sizes.values())
        for key, size in self.sizes.items():
            start = self.arena.start_of(key)
            assert self.buffer[start : start + size] == [int(key)] * size

    def taken(self) -> list[tuple[int, int]]:
        return sorted((self.arena.start_of(key), self.arena.rounded(size)) for key, size in self.sizes.items())

    def holes(self) -> list[tuple[int, int]]:
        edges = [(0, 0), *self.taken(), (SIZE, 0)]
        ends = [start + size for start, size in edges]
        return [(end, start - end) for end, (start, _) in zip(ends, edges[1:], strict=False)]

    def cheapest(self, size: int) -> int:
        """By trying every run of neighbours: the least that lies between holes that sum to `size`."""
        holes, taken = self.holes(), self.taken()
        spans = [(first, last) for first, last in combinations(range(len(holes) + 1), 2)]
        return min(
            sum(length for _, length in taken[first : last - 1])
            for first, last in spans
            if sum(length for _, length in holes[first:last]) >= size
        )


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_freeing_all_gives_every_element_back(sizes: list[int]) -> None:
    arena = Arena(300, alignment=4)
    for index, size in enumerate(sizes):
        assert arena.allocate(str(index), size) is not None
    for index in range(len(sizes)):
        arena.free(str(index))
    assert arena.num_free == 300 and arena.allocate("whole", 300) == 0
    arena.check_integrity()


def test_an_overlap_is_caught() -> None:
    arena = Arena(10)
    arena.allocate("a", 4)
    arena._insert("b", 2, 4)
    with pytest.raises(AssertionError, match="b overlaps"):
        arena.check_integrity()
