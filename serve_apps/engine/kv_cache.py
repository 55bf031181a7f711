"""Paged key/value cache: a block allocator with exact accounting that finds prefixes again, and its tensors."""

from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.large_pages import LargePages
from serve_apps.engine.architecture import ModelSpec


class OutOfBlocks(Exception):
    """Fewer blocks are free than asked for; the scheduler answers by preempting. Never reaches a user."""


class BlockAllocator:
    """Owns block ids 0..num_blocks-1. Deterministic: the same calls give the same ids.

    A block is free, or held by one or more sequences, or cached: held by nobody, but its content is known by a key and
    will be found again until the block is needed. What was given back together goes together, longest ago first.

    Blocks of one sequence are handed out as neighbours where possible, because attention reads neighbouring slots
    without copying: growth takes the next id, and a new sequence starts in the middle of the longest free run so that
    the sequence before it can grow too.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._is_free = np.ones(num_blocks, dtype=bool)
        self._num_free = num_blocks
        self._num_holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Cached blocks by the number of the release that left them, oldest first.
        self._releases: OrderedDict[int, list[int]] = OrderedDict()
        self._release_of: dict[int, int] = {}
        self._num_releases = 0
        self.num_evictions = 0

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds: free, or cached and given up when needed."""
        return self._num_free + self.num_cached

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can be found by key."""
        return len(self._release_of)

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` blocks, continuing behind block `after` when it is free. Raises OutOfBlocks and takes none."""
        if count > self.num_available:
            raise OutOfBlocks(f"{count} KV blocks asked for, {self.num_available} available")
        taken: list[int] = []
        candidate = self._start(count) if after is None else after + 1
        while len(taken) < count:
            if candidate >= self.num_blocks or not self._is_free[candidate]:
                candidate = self._start(count - len(taken))
            self._is_free[candidate] = False
            self._num_free -= 1
            self._num_holders[candidate] = 1
            taken.append(candidate)
            candidate += 1
        return taken

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Hold the blocks known by the first of `keys`, as many as are known without a gap."""
        shared: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if not self._num_holders[block]:
                self._uncache(block)
            self._num_holders[block] += 1
            shared.append(block)
        return shared

    def register(self, block: int, key: bytes) -> None:
        """Make a held block's content findable by `key`; where another block has it already, that one stays."""
        assert self._num_holders[block], f"KV block {block} is registered and nobody holds it"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def private(self, blocks: Sequence[int]) -> list[int]:
        """Return those of a holder's `blocks` that nobody else holds or can find."""
        return [block for block in blocks if self._num_holders[block] == 1 and block not in self._key_of]

    def free(self, blocks: Sequence[int]) -> None:
        """Give one hold of each block back. Freeing what nobody holds is a bug of the caller."""
        cached: list[int] = []
        for block in blocks:
            assert self._num_holders[block], f"KV block {block} freed twice"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._key_of:
                cached.append(block)
            else:
                self._is_free[block] = True
                self._num_free += 1
        if cached:
            self._releases[self._num_releases] = cached
            self._release_of.update(dict.fromkeys(cached, self._num_releases))
            self._num_releases += 1

    def check_integrity(self, owned: Sequence[int]) -> None:
        """Assert that every block is held exactly as often as `owned` lists it, and otherwise free or cached."""
        holders = Counter(owned)
        held = {block for block, count in enumerate(self._num_holders) if count}
        assert held == set(holders), (
            f"taken but not owned: {held - set(holders)}; owned but free: {set(holders) - held}"
        )
        for block, count in holders.items():
            assert self._num_holders[block] == count, f"KV block {block} has {count} owners and another count"
        cached = [block for release in self._releases.values() for block in release]
        free = set(np.flatnonzero(self._is_free).tolist())
        assert len(free) == self._num_free, "the free count disagrees with the free map"
        assert len(set(cached)) == len(cached) and set(cached) == set(self._release_of), "cached twice, or lost"
        assert not (free & held or free & set(cached) or held & set(cached)), "a KV block is in two states"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a KV block is in no state"
        assert set(cached) <= set(self._key_of), "a cached KV block has no key"
        assert not free & set(self._key_of), "a free KV block has a key"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "keys and blocks disagree"

    def _start(self, count: int) -> int:
        """Return where `count` blocks should begin: in the longest free run, in its middle if that leaves room.

        Gives up cached blocks for want of free ones; to get a run of `count`, at most `count` releases more.
        """
        start, length = self._longest_run()
        num_extra = 0
        while length < count and self._releases and (self._num_free < count or num_extra < count):
            num_extra += self._num_free >= count
            self._evict_release()
            start, length = self._longest_run()
        if start > 0 and count <= length // 2:
            return start + length // 2
        return start

    def _longest_run(self) -> tuple[int, int]:
        """Return (first block, number of blocks) of the longest run of free blocks."""
        if not self._num_free:
            return 0, 0
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self._is_free.view(np.int8), [0]))))
        starts, ends = edges[::2], edges[1::2]
        longest = int(np.argmax(ends - starts))
        return int(starts[longest]), int(ends[longest] - starts[longest])

    def _evict_release(self) -> None:
        for block in list(next(iter(self._releases.values()))):
            self._uncache(block)
            del self._block_of[self._key_of.pop(block)]
            self._is_free[block] = True
            self._num_free += 1
            self.num_evictions += 1

    def _uncache(self, block: int) -> None:
        number = self._release_of.pop(block)
        self._releases[number].remove(block)
        if not self._releases[number]:
            del self._releases[number]


class KvCache:
    """Keys and values, [num_layers, 2, slots, kv heads, head_dim]; slot = block id * block size + offset."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        pages: LargePages | None = None,
    ) -> None:
        """Reserve the cache, on the CPU in memory from `pages` if given."""
        self.block_size = block_size
        shape = (spec.num_layers, 2, num_blocks * block_size, spec.num_kv_heads, spec.head_dim)
        # Zeros, not empty: padded reads on CUDA multiply masked slots by 0, and 0 * NaN is NaN.
        if pages is None:
            self._data = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self._data = pages.empty(shape, dtype).zero_()
        self._layers = [(layer[0], layer[1]) for layer in self._data]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one layer, each [slots, kv heads, head_dim]."""
        return self._layers[index]

    def zero(self, blocks: Sequence[int]) -> None:
        """Clear blocks whose content may be NaN before somebody else gets them."""
        for block in blocks:
            self._data[:, :, block * self.block_size : (block + 1) * self.block_size] = 0


def block_bytes(spec: ModelSpec, *, block_size: int, dtype: torch.dtype) -> int:
    """Return the size of one block over all layers."""
    return int(spec.num_layers * 2 * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize)
