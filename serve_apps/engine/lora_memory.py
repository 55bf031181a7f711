"""The device's memory for adapters: the flat buffer and the table of `kernels.lora`, and all that moves in them.

On CUDA an adapter is copied on a stream of its own, layer by layer, so that a step goes on meanwhile and a step that
uses the adapter waits for no more than the layer it has reached. Every method belongs to the thread that steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.devices import to_device
from kernels.large_pages import LargePages
from kernels.lora import MODULES, LoraPool
from kernels.native import Native
from serve_apps.engine.arena import Arena, Move
from serve_apps.engine.packed_adapter import PackedAdapter

# Adapters begin at multiples of this many bytes, a cache line, for loads as wide as the device has them.
ALIGNMENT_BYTES = 64
# An adapter that moves goes through a buffer of this size, so that compaction never asks for memory that is not there.
STAGING_BYTES = 8 << 20


@dataclass(frozen=True)
class LayerCopies:
    """A copy on its way to the GPU: one event per layer. Keeps the page-locked source alive."""

    source: PackedAdapter
    events: tuple[torch.cuda.Event, ...]

    @property
    def is_done(self) -> bool:
        """Whether the last layer has arrived."""
        return bool(self.events[-1].query())

    def wait(self, layer: int) -> None:
        """Make the current stream wait for one layer's weights; the calling thread goes on."""
        torch.cuda.current_stream().wait_event(self.events[layer])


class LoraMemory:
    """Owns `lora` and knows where each adapter lies in it."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        max_adapters: int,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        native: Native | None = None,
        alignment: int = 1,
    ) -> None:
        """Reserve `budget_bytes` on the device; on the CPU the system hands out pages on first use.

        `alignment`: a number of elements that divides the sizes of all linears, and so every offset in the table.
        """
        self._itemsize = dtype.itemsize
        self.arena = Arena(budget_bytes // dtype.itemsize, alignment=max(1, ALIGNMENT_BYTES // dtype.itemsize))
        host_table = torch.zeros(max_adapters, num_layers, len(MODULES), 3, dtype=torch.int64)
        self.lora = LoraPool(
            data=torch.empty(self.arena.size, dtype=dtype, device=device)
            if native is None
            else LargePages(native).empty((self.arena.size,), dtype),
            table=host_table.to(device),
            host_table=host_table,
            native=native,
            alignment=math.gcd(alignment, ALIGNMENT_BYTES // dtype.itemsize),
        )
        self._staging = torch.empty(min(self.arena.size, STAGING_BYTES // dtype.itemsize), dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_moved_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """What fits, in whole lines."""
        return self.arena.size * self._itemsize

    @property
    def free_bytes(self) -> int:
        """What nobody takes up, in however many holes."""
        return self.arena.num_free * self._itemsize

    def bytes_of(self, num_weights: int) -> int:
        """Return what an adapter of `num_weights` takes up."""
        return self.arena.rounded(num_weights) * self._itemsize

    def write(self, packed: PackedAdapter, adapter_row: int, *, row_of: Callable[[str], int]) -> LayerCopies | None:
        """Copy an adapter in and enter it into the table; None when it is there on return. Needs enough free bytes.

        `row_of` names the table row of an adapter that has to move to make one hole.
        """
        size = packed.data.numel()
        start = self.arena.allocate(packed.digest, size)
        if start is None:
            self._compact(size, row_of)
            start = self.arena.allocate(packed.digest, size)
        assert start is not None, "no hole after compaction"
        self._write_row(adapter_row, _shifted(packed.table, start))
        target = self.lora.data[start : start + size]
        if self._stream is None:
            target.copy_(packed.data)
            return None
        return LayerCopies(packed, self._copy_layers(packed, target, self._stream))

    def erase(self, digest: str, adapter_row: int) -> None:
        """Give an adapter's bytes back and clear its table row."""
        self.arena.free(digest)
        self._write_row(adapter_row, torch.zeros_like(self.lora.host_table[0]))

    def _copy_layers(
        self, packed: PackedAdapter, target: Tensor, stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.Event, ...]:
        # Whoever had this memory before may still be read by what is queued.
        stream.wait_stream(torch.cuda.current_stream())
        events: list[torch.cuda.Event] = []
        start = 0
        with torch.cuda.stream(stream):
            for end in packed.layer_ends:
                target[start:end].copy_(packed.data[start:end], non_blocking=True)
                events.append(torch.cuda.Event())
                events[-1].record(stream)
                start = end
        return tuple(events)

    def _compact(self, size: int, row_of: Callable[[str], int]) -> None:
        """Move adapters together until one hole holds `size` elements, and point their table rows at the new places."""
        if self._stream is not None:
            # What moves may still be on its way in.
            torch.cuda.current_stream().wait_stream(self._stream)
        for move in self.arena.compact(size):
            self._move_down(move)
            row = row_of(move.key)
            self._write_row(row, _shifted(self.lora.host_table[row], move.target - move.source))
            self.num_moved_bytes += move.size * self._itemsize

    def _move_down(self, move: Move) -> None:
        """Copy front to back in pieces: what a piece overwrites has been copied before."""
        data, distance, end = self.lora.data, move.source - move.target, move.source + move.size
        for start in range(move.source, end, len(self._staging)):
            source = data[start : min(end, start + len(self._staging))]
            piece = self._staging[: len(source)]
            piece.copy_(source)
            data[start - distance : start - distance + len(source)].copy_(piece)

    def _write_row(self, adapter_row: int, offsets: Tensor) -> None:
        self.lora.host_table[adapter_row] = offsets
        if self.lora.table is not self.lora.host_table:
            self.lora.table[adapter_row].copy_(to_device(offsets, self.lora.table.device))


def _shifted(offsets: Tensor, distance: int) -> Tensor:
    """Return table entries [..., 3] whose weights lie `distance` further on; entries without weights stay 0."""
    shifted = offsets.clone()
    shifted[..., :2] += distance * (offsets[..., 2:] > 0)
    return shifted
