"""LoRA shrink of a whole group of linears (q/k/v, gate/up, or one alone) for every adapter of a step, in one launch.

A fixed grid pulls (tile, split of k) units from the device-built work list. The rank rows of the group's modules are
taken as one ragged axis, [A_q; A_k; A_v] at true ranks, so x is read once for all of them and no padding is read. A
tile of 1-4 tokens streams A past each token (GEMV body); a longer one multiplies on the tensor cores. Each split of k
writes its own partial sums and the expand kernel adds them in order: no atomics, no zeroing, one result.

Sources: LoRA https://arxiv.org/abs/2106.09685; many adapters in one launch https://arxiv.org/abs/2310.18547.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.devices import multiplies_natively
from kernels.lora import LoraPool, LoraWork
from kernels.lora_work import group_ranks, split_count

GEMV_ROWS = 4


def lora_shrink_(work: LoraWork, x_TI: Tensor, *, pool: LoraPool, layer: int, modules: range) -> None:
    """Semantics: sum over s of work.partials[s, p, :] = concat(A_m for m in modules) x[work.order[p]], p in a tile.

    x: [T, I] contiguous, float; `work` built for the same step. Products and sums are in fp32; operands of the tensor
    cores keep their dtype where both are the same 16-bit type, else both become fp32. Partials of base-model rows and
    beyond an adapter's own rank are left as they were.
    """
    num_tokens, in_size = x_TI.shape
    if not num_tokens:
        return
    tiling = work.tiling
    table = pool.table
    _shrink[(work.num_programs,)](
        x_TI,
        pool.data,
        table,
        work.order,
        work.sorted_rows,
        work.tile_starts,
        work.num_tiles,
        work.partials,
        num_tokens,
        in_size,
        table.stride(0),
        layer * table.stride(1) + modules.start * table.stride(2),
        work.partials.stride(1),
        tiling.max_splits,
        NUM_MODULES=len(modules),
        ALIGNMENT=pool.alignment,
        IN_FP32=not multiplies_natively(x_TI, pool.data),
        GEMV_ROWS=GEMV_ROWS,
        TILE_ROWS=tiling.tile_rows,
        RANK_BLOCK=tiling.rank_block,
        K_BLOCK=tiling.k_block,
    )


@triton.jit
def _shrink(
    x: tl.tensor,
    data: tl.tensor,
    table: tl.tensor,
    order: tl.tensor,
    sorted_rows: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    partials: tl.tensor,
    num_tokens: tl.tensor,
    in_size: tl.tensor,
    table_stride: tl.tensor,
    table_offset: tl.tensor,
    partial_stride: tl.tensor,
    max_splits: tl.tensor,
    NUM_MODULES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IN_FP32: tl.constexpr,
    GEMV_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
) -> None:
    programs = tl.num_programs(0)
    tiles = tl.load(num_tiles)
    splits = split_count(tiles, programs, max_splits)
    chunk = tl.cdiv(tl.cdiv(in_size, splits), K_BLOCK) * K_BLOCK
    for unit in range(tl.program_id(0), tiles * splits, programs):
        split = unit % splits
        start = tl.load(tile_starts + unit // splits)
        adapter_row = tl.load(sorted_rows + start)
        member = start + tl.arange(0, TILE_ROWS)
        in_tile = (member < num_tokens) & (
            tl.load(sorted_rows + member, mask=member < num_tokens, other=-1) == adapter_row
        )
        num_rows = tl.sum(in_tile.to(tl.int32), 0)
        entry = table + adapter_row.to(tl.int64) * table_stride + table_offset
        rank_0, rank_1, rank_2 = group_ranks(entry, NUM_MODULES)
        # Dividing and multiplying by the promised alignment tells the compiler what it may load at a time.
        a_0 = tl.load(entry) // ALIGNMENT * ALIGNMENT
        a_1 = a_0
        a_2 = a_0
        if NUM_MODULES > 1:
            a_1 = tl.load(entry + 3) // ALIGNMENT * ALIGNMENT
        if NUM_MODULES > 2:
            a_2 = tl.load(entry + 6) // ALIGNMENT * ALIGNMENT
        num_ranks = tl.minimum(rank_0 + rank_1 + rank_2, partial_stride)
        first_k = split * chunk
        last_k = tl.minimum(first_k + chunk, in_size)
        out = partials + split * num_tokens * partial_stride
        for first_rank in range(0, num_ranks, RANK_BLOCK):
            rank = first_rank + tl.arange(0, RANK_BLOCK)
            is_rank = rank < num_ranks
            # The ragged axis: which module's A each rank row comes from.
            local_1 = a_1 + (rank - rank_0).to(tl.int64) * in_size
            local_2 = a_2 + (rank - rank_0 - rank_1).to(tl.int64) * in_size
            a_row = tl.where(rank < rank_0 + rank_1, local_1, local_2)
            a_row = tl.where(rank < rank_0, a_0 + rank.to(tl.int64) * in_size, a_row)
            if num_rows <= GEMV_ROWS:
                for index in range(0, num_rows):
                    token = tl.load(order + start + index).to(tl.int64)
                    total = tl.zeros([RANK_BLOCK, K_BLOCK], tl.float32)
                    for k_start in range(first_k, last_k, K_BLOCK):
                        k = k_start + tl.arange(0, K_BLOCK)
                        is_k = k < last_k
                        a = tl.load(data + a_row[:, None] + k[None, :], mask=is_rank[:, None] & is_k[None, :], other=0)
                        x_k = tl.load(x + token * in_size + k, mask=is_k, other=0)
                        total += a.to(tl.float32) * x_k.to(tl.float32)[None, :]
                    tl.store(out + (start + index) * partial_stride + rank, tl.sum(total, 1), mask=is_rank)
            else:
                token_rows = tl.load(order + member, mask=in_tile, other=0).to(tl.int64)
                product = tl.zeros([TILE_ROWS, RANK_BLOCK], tl.float32)
                for k_start in range(first_k, last_k, K_BLOCK):
                    k = k_start + tl.arange(0, K_BLOCK)
                    is_k = k < last_k
                    a_t = tl.load(data + a_row[None, :] + k[:, None], mask=is_rank[None, :] & is_k[:, None], other=0)
                    x_mk = tl.load(
                        x + token_rows[:, None] * in_size + k[None, :], mask=in_tile[:, None] & is_k[None, :], other=0
                    )
                    if IN_FP32:
                        product = tl.dot(x_mk.to(tl.float32), a_t.to(tl.float32), product, input_precision="ieee")
                    else:
                        product = tl.dot(x_mk, a_t, product)
                tl.store(
                    out + member[:, None] * partial_stride + rank[None, :],
                    product,
                    mask=in_tile[:, None] & is_rank[None, :],
                )
