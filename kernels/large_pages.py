"""CPU memory in large pages, for what every step streams through: weights, adapters, the KV cache."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.native import Native

PAGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20
LINE_BYTES = 64


class LargePages:
    """Hands out uninitialised tensors, one behind the other in chunks of memory that begin at a large page.

    With pages of 4 KiB reading a weight misses an address translation every 64 lines, and the processor's own
    read-ahead stops there. Where the system gives no large pages the memory is ordinary. Pages are taken on first use.
    """

    def __init__(self, native: Native) -> None:
        self._native = native
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor that begins at a cache line."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._used + num_bytes > len(self._chunk):
            self._chunk, self._used = self._new_chunk(max(num_bytes, CHUNK_BYTES)), 0
        start = self._used
        self._used += -(-num_bytes // LINE_BYTES) * LINE_BYTES
        return self._chunk[start : start + num_bytes].view(dtype).view(*shape)

    def _new_chunk(self, num_bytes: int) -> Tensor:
        size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        whole = torch.empty(size + PAGE_BYTES, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE_BYTES
        self._native.ask_for_large_pages(whole.data_ptr() + start, size)
        return whole[start : start + size]
