"""The block allocator under random operations: exact accounting, no double owner, neighbours where possible."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_apps.engine.kv_cache import BlockAllocator, OutOfBlocks

NUM_BLOCKS = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Several owners that take, grow and give back."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.owned: list[list[int]] = []

    def num_free(self) -> int:
        return NUM_BLOCKS - sum(len(blocks) for blocks in self.owned)

    def take(self, count: int, after: int | None) -> list[int]:
        if count > self.num_free():
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate(count, after=after)
            return []
        blocks = self.allocator.allocate(count, after=after)
        assert len(blocks) == count
        return blocks

    @rule(count=st.integers(1, NUM_BLOCKS))
    def new(self, count: int) -> None:
        blocks = self.take(count, None)
        if blocks:
            self.owned.append(blocks)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), count=st.integers(1, 4))
    def grow(self, data: st.DataObject, count: int) -> None:
        blocks = data.draw(st.sampled_from(self.owned))
        blocks += self.take(count, blocks[-1])

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def accounts_hold(self) -> None:
        assert self.allocator.num_free == self.num_free()
        self.allocator.check_integrity([block for blocks in self.owned for block in blocks])


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_sequences_that_grow_in_turn_stay_contiguous() -> None:
    """Four sequences, one block each in turn: attention can read all of them without copying."""
    allocator = BlockAllocator(64)
    sequences = [allocator.allocate(2) for _ in range(4)]
    for _ in range(6):
        for blocks in sequences:
            blocks += allocator.allocate(1, after=blocks[-1])
    for blocks in sequences:
        assert blocks == list(range(blocks[0], blocks[0] + 8))


def test_double_free_is_caught() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(blocks)


def test_a_leak_is_caught() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match="taken but not owned"):
        allocator.check_integrity([])
