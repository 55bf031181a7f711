"""The device-built work list of one step: tokens sorted by adapter and cut into tiles of one adapter each.

Nothing here reads a number back to the host, and no shape depends on how many adapters are active or registered, so
the two launches can lie inside a CUDA graph: a replay sorts whatever `adapter_rows` holds by then.

    adapter_rows      3 -1  3  0  3          token 1 is the base model's
    order             1  3  0  2  4          stable: by adapter row, then by token
    sorted_rows      -1  0  3  3  3
    tile_starts       1  2  4  .  .          positions in `order`, here with tiles of 2 rows; base rows are in no tile
    num_tiles         3
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lora import MAX_RANK, LoraWork

# Programs per multiprocessor of the fixed grids: two hide each other's memory latency. Not tuned on a device yet.
PROGRAMS_PER_PROCESSOR = 2
INTERPRETED_PROGRAMS = 3
_RANK_BLOCK = 128
_SCAN_BLOCK = 1024


@dataclass(frozen=True)
class Tiling:
    """Block sizes of shrink and expand. Rows of a tile and the split-k bound follow the number of tokens.

    `max_splits` bounds the partial sums, [max_splits, tokens, rank rows] fp32: few tokens need many splits to occupy
    the device, many tokens need none. The sizes are reasoned, not tuned: no device was at hand.
    """

    tile_rows: int
    max_splits: int
    rank_block: int = 32
    k_block: int = 128
    column_block: int = 128


def tiling_for(num_tokens: int) -> Tiling:
    """Return the block sizes for a step of so many tokens."""
    if num_tokens <= 256:
        return Tiling(16, 16, column_block=256)
    if num_tokens <= 1024:
        return Tiling(16, 8)
    if num_tokens <= 2048:
        return Tiling(32, 4, k_block=64)
    return Tiling(64, 2, k_block=64)


def num_programs(device: torch.device) -> int:
    """Return the size of the fixed grid."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * PROGRAMS_PER_PROCESSOR


def allocate_work(
    num_tokens: int,
    *,
    device: torch.device,
    tiling: Tiling | None = None,
    max_group_rank: int = 3 * MAX_RANK,
) -> LoraWork:
    """Return buffers for steps of exactly `num_tokens` tokens; `build_work_` fills them.

    `max_group_rank` bounds the summed rank of modules computed together (q/k/v: three times the largest rank); only
    the rows of true ranks are ever touched, so a large bound costs address space and memory but no time.
    """
    sizes = tiling or tiling_for(num_tokens)
    assert sizes.max_splits * num_tokens * max_group_rank < 2**31, "the kernels count partial sums in 32 bits"
    per_token = torch.empty(4, num_tokens, dtype=torch.int32, device=device)
    return LoraWork(
        order=per_token[0],
        sorted_rows=per_token[1],
        index_in_segment=per_token[2],
        tile_starts=per_token[3],
        num_tiles=torch.zeros(1, dtype=torch.int32, device=device),
        partials=torch.empty(sizes.max_splits, num_tokens, max_group_rank, dtype=torch.float32, device=device),
        tiling=sizes,
        num_programs=num_programs(device),
    )


def build_work_(work: LoraWork, adapter_rows_T: Tensor) -> None:
    """Semantics: order = stable argsort of adapter_rows; tiles = its runs of equal rows >= 0, cut every tile_rows.

    adapter_rows: int32 [T] in any order, -1 for the base model, T as `work` was allocated for. Overwrites `work`.
    """
    num_tokens = adapter_rows_T.shape[0]
    if num_tokens != work.order.shape[0]:
        raise ValueError(f"work was allocated for {work.order.shape[0]} tokens, the step has {num_tokens}")
    if not num_tokens:
        return
    _sort_tokens[(triton.cdiv(num_tokens, _RANK_BLOCK),)](
        adapter_rows_T, work.order, work.sorted_rows, work.index_in_segment, num_tokens, BLOCK=_RANK_BLOCK
    )
    _list_tiles[(1,)](
        work.sorted_rows,
        work.index_in_segment,
        work.tile_starts,
        work.num_tiles,
        num_tokens,
        TILE_ROWS=work.tiling.tile_rows,
        BLOCK=_SCAN_BLOCK,
    )


@triton.jit
def _sort_tokens(
    rows: tl.tensor,
    order: tl.tensor,
    sorted_rows: tl.tensor,
    index_in_segment: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Count for each token how many come before it: quadratic in tokens, yet one launch, no atomics, always the same.

    8192 tokens are 67 million comparisons over 64 programs; a decode step of 256 is one round of two programs.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    row = tl.load(rows + token, mask=is_token, other=0)
    num_below = tl.zeros([BLOCK], tl.int32)
    num_equal_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        other = start + tl.arange(0, BLOCK)
        is_other = other < num_tokens
        other_row = tl.load(rows + other, mask=is_other, other=0)
        is_below = (other_row[None, :] < row[:, None]) & is_other[None, :]
        is_equal_before = (other_row[None, :] == row[:, None]) & (other[None, :] < token[:, None])
        num_below += tl.sum(is_below.to(tl.int32), 1)
        num_equal_before += tl.sum(is_equal_before.to(tl.int32), 1)
    position = num_below + num_equal_before
    tl.store(order + position, token, mask=is_token)
    tl.store(sorted_rows + position, row, mask=is_token)
    tl.store(index_in_segment + position, num_equal_before, mask=is_token)


@triton.jit
def _list_tiles(
    sorted_rows: tl.tensor,
    index_in_segment: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    num_tokens: tl.tensor,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: compact the positions at which a tile begins, in order."""
    found = 0
    for start in range(0, num_tokens, BLOCK):
        position = start + tl.arange(0, BLOCK)
        is_token = position < num_tokens
        row = tl.load(sorted_rows + position, mask=is_token, other=-1)
        index = tl.load(index_in_segment + position, mask=is_token, other=1)
        is_start = (row >= 0) & (index % TILE_ROWS == 0)
        rank = found + tl.cumsum(is_start.to(tl.int32), 0) - 1
        tl.store(tile_starts + rank, position, mask=is_start)
        found += tl.sum(is_start.to(tl.int32), 0)
    tl.store(num_tiles, found)


@triton.jit
def split_count(num_tiles: tl.tensor, programs: tl.tensor, max_splits: tl.tensor) -> tl.tensor:
    """Return how many splits of k occupy the grid with so many tiles; shrink and expand must agree on it."""
    return tl.minimum(max_splits, tl.maximum(1, programs // tl.maximum(num_tiles, 1)))


@triton.jit
def group_ranks(
    entry: tl.tensor,
    NUM_MODULES: tl.constexpr,
) -> tl.tensor:
    """Return the ranks of up to three neighbouring modules of one adapter, 0 where the group has fewer."""
    rank_0 = tl.load(entry + 2).to(tl.int32)
    rank_1 = 0
    rank_2 = 0
    if NUM_MODULES > 1:
        rank_1 = tl.load(entry + 5).to(tl.int32)
    if NUM_MODULES > 2:
        rank_2 = tl.load(entry + 8).to(tl.int32)
    return rank_0, rank_1, rank_2
