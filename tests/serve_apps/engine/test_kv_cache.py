"""The block allocator under random operations: exact accounting, what is found again and what goes first."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_apps.engine.kv_cache import BlockAllocator, OutOfBlocks

NUM_BLOCKS = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Owners that take, find, grow, publish and give back; a model of what is known by key and goes first."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        # (chain, blocks): the owner's block i has the content that chain names with key i.
        self.owned: list[tuple[int, list[int]]] = []
        self.known: dict[bytes, int] = {}
        self.releases: list[list[int]] = []

    def num_available(self) -> int:
        return NUM_BLOCKS - len({block for _, blocks in self.owned for block in blocks})

    def take(self, count: int, after: int | None) -> list[int]:
        if count > self.num_available():
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate(count, after=after)
            return []
        num_free = self.num_available() - sum(len(release) for release in self.releases)
        blocks = self.allocator.allocate(count, after=after)
        assert len(set(blocks)) == count
        lost = {block for key, block in self.known.items() if key not in self.allocator._block_of}
        assert lost or num_free >= count
        while lost:
            assert set(self.releases[0]) <= lost, "something younger went first"
            lost -= set(self.releases.pop(0))
        self.known = {key: block for key, block in self.known.items() if key in self.allocator._block_of}
        return blocks

    @rule(chain=st.integers(0, 2), count=st.integers(1, NUM_BLOCKS))
    def new(self, chain: int, count: int) -> None:
        keys = [key(chain, index) for index in range(count)]
        num_known = next((index for index, item in enumerate(keys) if item not in self.known), count)
        found = self.allocator.share(keys)
        assert found == [self.known[item] for item in keys[:num_known]]
        self.releases = [kept for release in self.releases if (kept := [b for b in release if b not in found])]
        self.owned.append((chain, found))
        found += self.take(count - num_known, None) if count > num_known else []

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), count=st.integers(1, 4))
    def grow(self, data: st.DataObject, count: int) -> None:
        _, blocks = data.draw(st.sampled_from(self.owned))
        blocks += self.take(count, blocks[-1] if blocks else None)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), count=st.integers(1, NUM_BLOCKS))
    def publish(self, data: st.DataObject, count: int) -> None:
        chain, blocks = data.draw(st.sampled_from(self.owned))
        for index, block in enumerate(blocks[:count]):
            self.allocator.register(block, key(chain, index))
            if key(chain, index) not in self.known and block not in self.known.values():
                self.known[key(chain, index)] = block

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        _, blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.allocator.free(blocks)
        held = {block for _, others in self.owned for block in others}
        cached = [block for block in blocks if block in self.known.values() and block not in held]
        self.releases += [cached] if cached else []

    @invariant()
    def accounts_hold(self) -> None:
        self.allocator.check_integrity([block for _, blocks in self.owned for block in blocks])
        assert self.allocator.num_available == self.num_available()
        assert self.allocator.num_cached == sum(len(release) for release in self.releases)
        assert self.allocator._block_of == self.known
        held = Counter(block for _, blocks in self.owned for block in blocks)
        for _, blocks in self.owned:
            private = [block for block in blocks if held[block] == 1 and block not in self.known.values()]
            assert self.allocator.private(blocks) == private


def key(chain: int, index: int) -> bytes:
    return f"{chain} {index}".encode()


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


def test_a_finished_sequence_leaves_room_for_another_of_its_length() -> None:
    """All blocks cached: the oldest sequence goes as a whole, and its neighbours serve the next one and its growth."""
    allocator = BlockAllocator(12)
    for chain in range(3):
        blocks = allocator.allocate(4)
        for index, block in enumerate(blocks):
            allocator.register(block, key(chain, index))
        allocator.free(blocks)
    assert allocator.num_cached == allocator.num_available == 12
    blocks = allocator.allocate(2)
    blocks += allocator.allocate(1, after=blocks[-1])
    blocks += allocator.allocate(1, after=blocks[-1])
    assert blocks == list(range(blocks[0], blocks[0] + 4)) and allocator.num_evictions == 4
    assert allocator.share([key(0, 0)]) == [] and len(allocator.share([key(1, index) for index in range(4)])) == 4
