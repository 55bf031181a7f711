"""Paged key/value cache: a block allocator with exact accounting, and the tensors behind it."""

import numpy as np
import torch
from torch import Tensor

from serve_apps.engine.architecture import ModelSpec


class OutOfBlocks(Exception):
    """Fewer blocks are free than asked for; the scheduler answers by preempting. Never reaches a user."""


class BlockAllocator:
    """Owns block ids 0..num_blocks-1. Deterministic: the same calls give the same ids.

    Blocks of one sequence are handed out as neighbours where possible, because attention reads neighbouring slots
    without copying: growth takes the next id, and a new sequence starts in the middle of the longest free run so that
    the sequence before it can grow too.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._is_free = np.ones(num_blocks, dtype=bool)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return self._num_free

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` blocks, continuing behind block `after` when it is free. Raises OutOfBlocks and takes none."""
        if count > self._num_free:
            raise OutOfBlocks(f"{count} KV blocks asked for, {self._num_free} free")
        taken: list[int] = []
        candidate = self._start(count) if after is None else after + 1
        while len(taken) < count:
            if candidate >= self.num_blocks or not self._is_free[candidate]:
                candidate = self._start(count - len(taken))
            self._is_free[candidate] = False
            taken.append(candidate)
            candidate += 1
        self._num_free -= count
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Freeing a free block is a bug of the caller."""
        for block in blocks:
            assert not self._is_free[block], f"KV block {block} freed twice"
            self._is_free[block] = True
        self._num_free += len(blocks)

    def check_integrity(self, owned: list[int]) -> None:
        """Assert that exactly the blocks in `owned` are taken, each once."""
        assert len(set(owned)) == len(owned), "a KV block has two owners"
        taken = set(np.flatnonzero(~self._is_free).tolist())
        assert taken == set(owned), f"taken but not owned: {taken - set(owned)}; owned but free: {set(owned) - taken}"
        assert self._num_free == self.num_blocks - len(taken), "the free count disagrees with the free map"

    def _start(self, count: int) -> int:
        """Return where `count` blocks should begin: in the longest free run, in its middle if that leaves room."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self._is_free.view(np.int8), [0]))))
        starts, ends = edges[::2], edges[1::2]
        longest = int(np.argmax(ends - starts))
        start, length = int(starts[longest]), int(ends[longest] - starts[longest])
        if start > 0 and count <= length // 2:
            return start + length // 2
        return start


class KvCache:
    """Keys and values, [num_layers, 2, slots, kv heads, head_dim]; slot = block id * block size + offset."""

    def __init__(
        self, spec: ModelSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        # Zeros, not empty: padded reads on CUDA multiply masked slots by 0, and 0 * NaN is NaN.
        self._data = torch.zeros(
            spec.num_layers, 2, num_blocks * block_size, spec.num_kv_heads, spec.head_dim, dtype=dtype, device=device
        )
        self._layers = [(layer[0], layer[1]) for layer in self._data]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one layer, each [slots, kv heads, head_dim]."""
        return self._layers[index]

    def zero(self, blocks: list[int]) -> None:
        """Clear blocks whose content may be NaN before somebody else gets them."""
        for block in blocks:
            self._data[:, :, block * self.block_size : (block + 1) * self.block_size] = 0


def block_bytes(spec: ModelSpec, *, block_size: int, dtype: torch.dtype) -> int:
    """Return the size of one block over all layers."""
    return int(spec.num_layers * 2 * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize)
