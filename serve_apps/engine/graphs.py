"""CUDA graphs of the decode step: one per bucket of batch sizes, with and without LoRA, captured on first use.

A graph replays launches with the addresses and host values of its capture. So everything that changes between replays
lies in buffers that every replay refills whole, padding included, and everything the host decides is part of the key:

    refilled      token ids, positions, slots, adapter rows, block tables, context lengths
    listed again  the LoRA work list, by kernels inside the graph, from the adapter rows
    in the key    rows of the bucket, whether any row has an adapter
    fixed         weights, KV cache, adapter pool and its table: the same memory for the life of the engine

Rows beyond the batch pad the bucket: slot -1 (nothing is written), adapter row -1, context 0 (nothing is read).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora import LoraPool, LoraStep
from kernels.ops import AttentionPlan, PagedBatch
from kernels.segments import BASE_ROW
from serve_apps.engine.batch import StepBatch

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 2


@dataclass(frozen=True)
class Captured:
    """A recorded step: `replay` computes it again from the same buffers into `logits`."""

    replay: Callable[[], None]
    logits: Tensor


Capture = Callable[[Callable[[], Tensor]], Captured]


class CudaCapture:
    """Captures functions as CUDA graphs that share one memory pool, since only one replays at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Captured:
        """Run `compute` twice on a side stream, so that kernels are compiled and loaded, then record it."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                compute()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch leaves its capture stream current when the capture fails; the outer stream comes back whatever happens.
        # Other threads page-lock memory for adapters meanwhile, which a stricter mode would take for an error.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            logits = compute()
        return Captured(graph.replay, logits)


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """Return batch sizes to capture: 1, 2, 4, then steps of 8 to 64, of 32 to 256, of 128 beyond, and the largest."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(384, max_batch + 1, 128)]
    return (*(size for size in sizes if size < max_batch), max_batch)


class DecodeGraphs:
    """Owns the graphs and their buffers. One thread."""

    def __init__(
        self,
        forward: Callable[[StepBatch], Tensor],
        capture: Capture,
        *,
        lora_pool: LoraPool,
        max_batch: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        """`forward` computes a step's logits; `max_blocks` is the most KV blocks of one sequence."""
        self._forward = forward
        self._capture = capture
        self._lora_pool = lora_pool
        self._max_blocks = max_blocks
        self._block_size = block_size
        self._device = device
        self._buckets = buckets_up_to(max_batch)
        self._recorded: dict[tuple[int, bool], tuple[StepBatch, Captured] | None] = {}

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return sum(entry is not None for entry in self._recorded.values())

    def capture_all(self) -> None:
        """Capture every bucket now, the largest first so that the others fit into its memory."""
        for bucket in reversed(self._buckets):
            for has_adapters in (True, False):
                self._entry(bucket, has_adapters)

    def run(self, batch: StepBatch) -> Tensor | None:
        """Return the step's logits, valid until the next call; None for a step that is not a decode of every row.

        Also None when its bucket could not be captured. A layer's adapter weights cannot be awaited inside a
        graph, so the stream waits for the whole of adapters on their way.
        """
        paged, num_rows = batch.attention.paged, batch.token_ids.shape[0]
        if paged is None or paged.has_chunks or batch.logit_rows.shape[0] != num_rows or num_rows > self._buckets[-1]:
            return None
        bucket = next(size for size in self._buckets if size >= num_rows)
        entry = self._entry(bucket, len(batch.lora.segments) > 0)
        if entry is None:
            return None
        for copies in batch.lora_copies:
            copies.wait(-1)
        buffers, captured = entry
        refill_(buffers, batch)
        captured.replay()
        return captured.logits[:num_rows]

    def _entry(self, bucket: int, has_adapters: bool) -> tuple[StepBatch, Captured] | None:
        key = (bucket, has_adapters)
        if key not in self._recorded:
            buffers = self._empty(bucket, has_adapters)
            try:
                self._recorded[key] = (buffers, self._capture(lambda: self._forward(buffers)))
            except RuntimeError as error:  # out of memory, also as a capture that "failed due to a previous error"
                logger.warning("decode steps of %d rows run without a graph: %s", bucket, error)
                self._recorded[key] = None
        return self._recorded[key]

    def _empty(self, bucket: int, has_adapters: bool) -> StepBatch:
        """Return buffers in which every row pads."""
        device = self._device
        per_token = torch.zeros(3, bucket, dtype=torch.int64, device=device)
        per_token[2] = -1
        paged = PagedBatch(
            block_tables=torch.zeros(bucket, self._max_blocks, dtype=torch.int32, device=device),
            context_lens=torch.zeros(bucket, dtype=torch.int32, device=device),
            row_starts=torch.arange(bucket + 1, dtype=torch.int32, device=device),
            block_size=self._block_size,
            has_decode=True,
            has_chunks=False,
        )
        # The forward asks of the segments only whether there are any; the kernels read the rows.
        lora = LoraStep(
            adapter_rows=torch.full((bucket,), BASE_ROW, dtype=torch.int32, device=device),
            segments=torch.zeros(int(has_adapters), 3, dtype=torch.int32),
        )
        return StepBatch(
            token_ids=per_token[0],
            positions=per_token[1],
            slot_mapping=per_token[2],
            logit_rows=torch.arange(bucket, device=device),
            attention=AttentionPlan((), paged=paged),
            lora_pool=self._lora_pool,
            lora=lora,
            lora_copies=(),
        )


def refill_(buffers: StepBatch, batch: StepBatch) -> None:
    """Copy a step into a graph's buffers and turn the rows beyond it into padding."""
    target, source = buffers.attention.paged, batch.attention.paged
    assert target is not None and source is not None
    num_rows, width = source.block_tables.shape
    for name, padding in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1)):
        _refill_rows_(getattr(buffers, name), getattr(batch, name), padding)
    _refill_rows_(buffers.lora.adapter_rows, batch.lora.adapter_rows, BASE_ROW)
    _refill_rows_(target.context_lens, source.context_lens, 0)
    target.block_tables[:num_rows, :width].copy_(source.block_tables)


def _refill_rows_(target: Tensor, source: Tensor, padding: int) -> None:
    target[: source.shape[0]].copy_(source)
    target[source.shape[0] :].fill_(padding)
