"""LoRA expand of a whole group of linears for every adapter of a step, in one launch: y += B (A x) in place.

A fixed grid pulls (tile, block of output columns) units; the columns of q, k and v (gate and up) are one ragged axis,
so a group is one launch. The prologue adds shrink's partial sums in the order of their splits, which makes split-k
deterministic without atomics. Like shrink, a tile of 1-4 tokens takes the GEMV body, a longer one the tensor cores.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lora import LoraPool, LoraWork
from kernels.lora_shrink import GEMV_ROWS
from kernels.lora_work import group_ranks, split_count

# Rank rows of B taken at a time; the tensor cores want at least 16.
RANK_BLOCK = 16


def lora_expand_(
    y_TO: Tensor, work: LoraWork, *, pool: LoraPool, layer: int, modules: range, out_bounds: Sequence[int]
) -> None:
    """Semantics: y[order[p], bounds[i]:bounds[i+1]] += (sum over s of work.partials[s, p, rows of m_i]) B_{m_i}.

    y: [T, O] contiguous, float; `work.partials` as `lora_shrink_` left them for the same step, layer and modules. The
    sum is in fp32 and y is rounded once; a 16-bit B is multiplied as TF32, which holds it exactly and the shrunk values
    to 10 bits of mantissa, an fp32 B exactly. Base-model rows and columns of rank-0 modules are not touched.
    """
    num_tokens, out_size = y_TO.shape
    if not num_tokens:
        return
    if not y_TO.is_contiguous():
        raise ValueError("y must be contiguous: it is written in place by token row")
    if out_bounds[-1] > out_size:
        raise ValueError(f"out_bounds end at column {out_bounds[-1]}, y has {out_size}")
    bounds = [*out_bounds, *[out_bounds[-1]] * (4 - len(out_bounds))]
    tiling, table = work.tiling, pool.table
    block = tiling.column_block
    blocks = [triton.cdiv(bounds[index + 1] - bounds[index], block) for index in range(3)]
    _expand[(work.num_programs,)](
        y_TO,
        pool.data,
        table,
        work.order,
        work.sorted_rows,
        work.tile_starts,
        work.num_tiles,
        work.partials,
        num_tokens,
        out_size,
        *bounds,
        blocks[0],
        blocks[0] + blocks[1],
        sum(blocks),
        table.stride(0),
        layer * table.stride(1) + modules.start * table.stride(2),
        work.partials.stride(1),
        tiling.max_splits,
        NUM_MODULES=len(modules),
        ALIGNMENT=pool.alignment,
        IS_16_BIT=pool.data.dtype != torch.float32,
        GEMV_ROWS=GEMV_ROWS,
        TILE_ROWS=tiling.tile_rows,
        RANK_BLOCK=RANK_BLOCK,
        COLUMN_BLOCK=block,
    )


@triton.jit
def _expand(
    y: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    order: tl.tensor,
    sorted_rows: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    partials: tl.tensor,
    num_tokens: tl.tensor,
    out_size: tl.tensor,
    bound_0: tl.tensor,
    bound_1: tl.tensor,
    bound_2: tl.tensor,
    bound_3: tl.tensor,
    block_1: tl.tensor,
    block_2: tl.tensor,
    num_blocks: tl.tensor,
    table_stride: tl.tensor,
    table_offset: tl.tensor,
    partial_stride: tl.tensor,
    max_splits: tl.tensor,
    NUM_MODULES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_16_BIT: tl.constexpr,
    GEMV_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
) -> None:
    programs = tl.num_programs(0)
    tiles = tl.load(num_tiles)
    splits = split_count(tiles, programs, max_splits)
    split_stride = num_tokens * partial_stride
    for unit in range(tl.program_id(0), tiles * num_blocks, programs):
        start = tl.load(tile_starts + unit // num_blocks)
        adapter_row = tl.load(sorted_rows + start)
        entry = table + adapter_row.to(tl.int64) * table_stride + table_offset
        rank_0, rank_1, rank_2 = group_ranks(entry, NUM_MODULES)
        # The ragged axis: which module this block of columns belongs to.
        block = unit % num_blocks
        module = (block >= block_1).to(tl.int32) + (block >= block_2).to(tl.int32)
        first_block = tl.where(module == 0, 0, tl.where(module == 1, block_1, block_2))
        first_column = tl.where(module == 0, bound_0, tl.where(module == 1, bound_1, bound_2))
        last_column = tl.where(module == 0, bound_1, tl.where(module == 1, bound_2, bound_3))
        num_ranks = tl.where(module == 0, rank_0, tl.where(module == 1, rank_1, rank_2))
        first_rank = tl.where(module == 0, 0, tl.where(module == 1, rank_0, rank_0 + rank_1))
        if num_ranks > 0:
            b = tl.load(entry + module * 3 + 1) // ALIGNMENT * ALIGNMENT
            width = last_column - first_column
            column = (block - first_block) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
            is_column = column < width
            member = start + tl.arange(0, TILE_ROWS)
            in_tile = (member < num_tokens) & (
                tl.load(sorted_rows + member, mask=member < num_tokens, other=-1) == adapter_row
            )
            num_rows = tl.sum(in_tile.to(tl.int32), 0)
            if num_rows <= GEMV_ROWS:
                for index in range(0, num_rows):
                    shrunk = partials + (start + index) * partial_stride + first_rank
                    total = tl.zeros([COLUMN_BLOCK], tl.float32)
                    for rank_start in range(0, num_ranks, RANK_BLOCK):
                        rank = rank_start + tl.arange(0, RANK_BLOCK)
                        is_rank = rank < num_ranks
                        h = tl.zeros([RANK_BLOCK], tl.float32)
                        for split in range(0, splits):
                            h += tl.load(shrunk + split * split_stride + rank, mask=is_rank, other=0)
                        b_rows = b + rank.to(tl.int64) * width
                        b_rn = tl.load(
                            data + b_rows[:, None] + column[None, :],
                            mask=is_rank[:, None] & is_column[None, :],
                            other=0,
                        )
                        total += tl.sum(h[:, None] * b_rn.to(tl.float32), 0)
                    token = tl.load(order + start + index).to(tl.int64)
                    out = y + token * out_size + first_column + column
                    before = tl.load(out, mask=is_column, other=0)
                    tl.store(out, (before.to(tl.float32) + total).to(y.dtype.element_ty), mask=is_column)
            else:
                shrunk_rows = partials + member * partial_stride + first_rank
                product = tl.zeros([TILE_ROWS, COLUMN_BLOCK], tl.float32)
                for rank_start in range(0, num_ranks, RANK_BLOCK):
                    rank = rank_start + tl.arange(0, RANK_BLOCK)
                    is_rank = rank < num_ranks
                    is_h = in_tile[:, None] & is_rank[None, :]
                    h_mr = tl.zeros([TILE_ROWS, RANK_BLOCK], tl.float32)
                    for split in range(0, splits):
                        h_mr += tl.load(shrunk_rows[:, None] + split * split_stride + rank[None, :], mask=is_h, other=0)
                    b_rows = b + rank.to(tl.int64) * width
                    b_rn = tl.load(
                        data + b_rows[:, None] + column[None, :], mask=is_rank[:, None] & is_column[None, :], other=0
                    )
                    if IS_16_BIT:
                        product = tl.dot(h_mr, b_rn.to(tl.float32), product, input_precision="tf32")
                    else:
                        product = tl.dot(h_mr, b_rn, product, input_precision="ieee")
                tokens = tl.load(order + member, mask=in_tile, other=0).to(tl.int64)
                out_mn = y + tokens[:, None] * out_size + first_column + column[None, :]
                is_out = in_tile[:, None] & is_column[None, :]
                before_mn = tl.load(out_mn, mask=is_out, other=0)
                tl.store(out_mn, (before_mn.to(tl.float32) + product).to(y.dtype.element_ty), mask=is_out)
