"""Attention over the paged cache: a decode body that splits the keys, and a body for prefill and chunks.

Both take a step of any mix: the decode body does the sequences with one new row, the other one the rest, each skipping
the other's on the device. Query heads that share a key head are rows of one tile, so keys and values are read once for
all of them; softmax runs online. The splits of the decode body leave partial results that a second launch merges in
order: no atomics, and a row's result does not depend on what else is in the step.

Sources: paged cache https://arxiv.org/abs/2309.06180; online softmax https://arxiv.org/abs/1805.02867; split keys
https://arxiv.org/abs/2311.01282; grouped queries https://arxiv.org/abs/2305.13245.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.devices import multiplies_natively
from kernels.ops import PagedBatch

_MIN_DOT = 16
# Keys read at a time, rows of a chunk tile; fp32 products of the larger tile do not fit into registers (compiled for
# sm_90 they spill 15 kB per thread).
_KEYS, _CHUNK_ROWS = 64, 64
_KEYS_FP32, _CHUNK_ROWS_FP32 = 32, 16


def paged_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    *,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Semantics: out[t] = softmax(scale * q[t] K^T) V over its own sequence's keys j, t - window < j <= t.

    q: [T, H, D], last axis contiguous; k, v: [S, G, D] contiguous, H a multiple of G, one float dtype -> [T, H, D].
    Scores, softmax and sums are in fp32; on the tensor cores a 16-bit model's weights are rounded to its dtype before
    the product with V. Rows of no sequence (padding) come out as they were allocated: undefined.
    """
    num_rows, num_heads, head_dim = q_THD.shape
    num_sequences, num_kv_heads = batch.context_lens.shape[0], k_SGD.shape[1]
    out = torch.empty(num_rows, num_heads, head_dim, dtype=q_THD.dtype, device=q_THD.device)
    if not num_rows or not num_sequences:
        return out
    if num_heads % num_kv_heads or q_THD.stride(2) != 1:
        raise ValueError(f"{num_heads} heads are no multiple of {num_kv_heads}, or heads are not contiguous")
    heads_per_kv = num_heads // num_kv_heads
    is_native = multiplies_natively(q_THD, k_SGD)
    common: dict[str, Any] = {
        "block_size": batch.block_size,
        "table_stride": batch.block_tables.stride(0),
        "row_stride": q_THD.stride(0),
        "head_stride": q_THD.stride(1),
        "num_kv_heads": num_kv_heads,
        "heads_per_kv": heads_per_kv,
        "head_dim": head_dim,
        "scale": scale,
        "window": window or 0,
        "HAS_WINDOW": window is not None,
        "NATIVE": is_native,
        "KEYS": _KEYS if is_native else _KEYS_FP32,
        "HEAD_BLOCK": max(_MIN_DOT, triton.next_power_of_2(head_dim)),
    }
    inputs = (q_THD, k_SGD, v_SGD, batch.block_tables, batch.context_lens, batch.row_starts)
    if batch.has_decode:
        _decode(inputs, out, batch, common)
    if batch.has_chunks:
        rows = max(_CHUNK_ROWS if is_native else _CHUNK_ROWS_FP32, triton.next_power_of_2(heads_per_kv))
        num_tiles = num_rows // (rows // heads_per_kv) + num_sequences
        _attend_chunks[(num_tiles, num_kv_heads)](
            *inputs,
            out,
            num_sequences,
            **common,
            SKIP_DECODE=batch.has_decode,
            ROWS=rows,
            SEQUENCES=triton.next_power_of_2(num_sequences),
        )
    return out


def _decode(inputs: tuple[Tensor, ...], out: Tensor, batch: PagedBatch, common: dict[str, Any]) -> None:
    num_sequences, num_heads, head_dim = batch.context_lens.shape[0], out.shape[1], out.shape[2]
    shape = (num_sequences, num_heads, batch.num_splits)
    sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=out.device)
    peaks_and_weights = torch.empty(2, *shape, dtype=torch.float32, device=out.device)
    _attend_decode[(num_sequences, common["num_kv_heads"], batch.num_splits)](
        *inputs,
        sums,
        peaks_and_weights[0],
        peaks_and_weights[1],
        **common,
        ROWS=max(_MIN_DOT, triton.next_power_of_2(common["heads_per_kv"])),
    )
    _merge_splits[(num_sequences, num_heads)](
        sums,
        peaks_and_weights[0],
        peaks_and_weights[1],
        batch.row_starts,
        out,
        num_heads,
        head_dim,
        batch.num_splits,
        SPLITS=triton.next_power_of_2(batch.num_splits),
        HEAD_BLOCK=common["HEAD_BLOCK"],
    )


@triton.jit
def _softmax_over(
    query: tl.tensor,
    position: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    kv_head: tl.tensor,
    block_size: tl.tensor,
    num_kv_heads: tl.tensor,
    head_dim: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return (weighted sum of values, largest score, sum of weights) of each query row over keys [first, last)."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    d = tl.arange(0, HEAD_BLOCK)
    is_d = d < head_dim
    for start in range(first_key, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < last_key
        block = tl.load(table + key // block_size, mask=is_key, other=0).to(tl.int64)
        slot = (block * block_size + key % block_size) * num_kv_heads + kv_head
        keys_dn = tl.load(k + slot[None, :] * head_dim + d[:, None], mask=is_key[None, :] & is_d[:, None], other=0)
        if NATIVE:
            scores = tl.dot(query, keys_dn) * scale
        else:
            scores = tl.dot(query.to(tl.float32), keys_dn.to(tl.float32), input_precision="ieee") * scale
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet has no peak; 0 keeps exp(-inf - 0) = 0 instead of exp(-inf + inf).
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probability = tl.exp(scores - anchor[:, None])
        fade = tl.exp(peak - anchor)
        values_nd = tl.load(v + slot[:, None] * head_dim + d[None, :], mask=is_key[:, None] & is_d[None, :], other=0)
        if NATIVE:
            step = tl.dot(probability.to(values_nd.dtype), values_nd)
        else:
            step = tl.dot(probability, values_nd.to(tl.float32), input_precision="ieee")
        total = total * fade[:, None] + step
        weight = weight * fade + tl.sum(probability, 1)
        peak = new_peak
    return total, peak, weight


@triton.jit
def _attend_decode(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    row_starts: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    block_size: tl.tensor,
    table_stride: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    heads_per_kv: tl.tensor,
    head_dim: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
) -> None:
    """One program: one sequence, one key head, one share of the keys."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    row = tl.load(row_starts + sequence).to(tl.int64)
    if tl.load(row_starts + sequence + 1) == row + 1:
        context_len = tl.load(context_lens + sequence)
        member = tl.arange(0, ROWS)
        is_member = member < heads_per_kv
        head = kv_head * heads_per_kv + member
        d = tl.arange(0, HEAD_BLOCK)
        is_q = is_member[:, None] & (d < head_dim)[None, :]
        query = tl.load(q + row * row_stride + head[:, None] * head_stride + d[None, :], mask=is_q, other=0)
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(context_len - window, 0)
        share = tl.cdiv(tl.cdiv(context_len - lowest, num_splits), KEYS) * KEYS
        first_key = lowest + split * share
        total, peak, weight = _softmax_over(
            query,
            tl.full([ROWS], 0, tl.int32) + context_len - 1,
            first_key,
            tl.minimum(first_key + share, context_len),
            k,
            v,
            block_tables + sequence.to(tl.int64) * table_stride,
            kv_head,
            block_size,
            num_kv_heads,
            head_dim,
            scale,
            window,
            HAS_WINDOW,
            NATIVE,
            ROWS,
            KEYS,
            HEAD_BLOCK,
        )
        place = (sequence.to(tl.int64) * num_kv_heads * heads_per_kv + head) * num_splits + split
        tl.store(peaks + place, peak, mask=is_member)
        tl.store(weights + place, weight, mask=is_member)
        tl.store(sums + place[:, None] * head_dim + d[None, :], total, mask=is_q)


@triton.jit
def _merge_splits(
    sums: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    row_starts: tl.tensor,
    out: tl.tensor,
    num_heads: tl.tensor,
    head_dim: tl.tensor,
    num_splits: tl.tensor,
    SPLITS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
) -> None:
    """One program: one head of one sequence; a sequence without keys gives zeros."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(row_starts + sequence).to(tl.int64)
    if tl.load(row_starts + sequence + 1) == row + 1:
        split = tl.arange(0, SPLITS)
        is_split = split < num_splits
        place = (sequence * num_heads + head) * num_splits + split
        peak = tl.load(peaks + place, mask=is_split, other=float("-inf"))
        highest = tl.max(peak, 0)
        factor = tl.exp(peak - tl.where(highest == float("-inf"), 0.0, highest))
        weight = tl.sum(factor * tl.load(weights + place, mask=is_split, other=0), 0)
        d = tl.arange(0, HEAD_BLOCK)
        is_d = d < head_dim
        total_sd = tl.load(
            sums + place[:, None] * head_dim + d[None, :], mask=is_split[:, None] & is_d[None, :], other=0
        )
        total = tl.sum(total_sd * factor[:, None], 0) / tl.where(weight > 0, weight, 1.0)
        tl.store(out + (row * num_heads + head) * head_dim + d, total.to(out.dtype.element_ty), mask=is_d)


@triton.jit
def _attend_chunks(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    row_starts: tl.tensor,
    out: tl.tensor,
    num_sequences: tl.tensor,
    block_size: tl.tensor,
    table_stride: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    heads_per_kv: tl.tensor,
    head_dim: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    NATIVE: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SKIP_DECODE: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
) -> None:
    """One program: a tile of neighbouring queries of one sequence, all heads that share one key head.

    The grid has room for every sequence to end in a partial tile: sequence i begins at tile row_start // queries + i,
    which leaves it at least as many tiles as it needs; the ones left over do nothing.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    queries_per_tile = ROWS // heads_per_kv
    index = tl.arange(0, SEQUENCES)
    is_sequence = index < num_sequences
    starts = tl.load(row_starts + index, mask=is_sequence, other=0)
    first_tiles = tl.where(is_sequence, starts // queries_per_tile + index, 2147483647)
    sequence = tl.sum((first_tiles <= tile).to(tl.int32), 0) - 1
    row_start = tl.load(row_starts + sequence)
    num_rows = tl.load(row_starts + sequence + 1) - row_start
    first_query = (tile - row_start // queries_per_tile - sequence) * queries_per_tile
    is_mine = first_query < num_rows
    if SKIP_DECODE:
        is_mine = is_mine & (num_rows > 1)
    if is_mine:
        context_len = tl.load(context_lens + sequence)
        member = tl.arange(0, ROWS)
        local = first_query + member // heads_per_kv
        is_row = (member // heads_per_kv < queries_per_tile) & (local < num_rows)
        position = context_len - num_rows + local
        head = kv_head * heads_per_kv + member % heads_per_kv
        row = (row_start + local).to(tl.int64)
        d = tl.arange(0, HEAD_BLOCK)
        is_q = is_row[:, None] & (d < head_dim)[None, :]
        query = tl.load(q + (row * row_stride + head * head_stride)[:, None] + d[None, :], mask=is_q, other=0)
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(context_len - num_rows + first_query - window + 1, 0) // KEYS * KEYS
        last_key = tl.minimum(context_len - num_rows + first_query + queries_per_tile, context_len)
        total, _, weight = _softmax_over(
            query,
            position,
            lowest,
            last_key,
            k,
            v,
            block_tables + sequence.to(tl.int64) * table_stride,
            kv_head,
            block_size,
            num_kv_heads,
            head_dim,
            scale,
            window,
            HAS_WINDOW,
            NATIVE,
            ROWS,
            KEYS,
            HEAD_BLOCK,
        )
        result = total / tl.where(weight > 0, weight, 1.0)[:, None]
        target = out + ((row * num_kv_heads * heads_per_kv + head) * head_dim)[:, None] + d[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=is_q)
