"""Public ops of the engine. Each picks its body by device; every body has a plain fp32 oracle in `kernels.reference`.

Shape letters: T tokens of the step, H query heads, G key/value heads, D head size, S KV slots (blocks x block size),
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionRun:
    """One sequence's share of a step: rows [row_start, row_start + num_rows) are its newest tokens.

    `context_len` counts all its tokens up to and including these rows. Its KV lies in slots [slot_start, slot_start +
    context_len) when `slots` is None, else in the `context_len` slots listed.
    """

    row_start: int
    num_rows: int
    context_len: int
    slot_start: int
    slots: Tensor | None = None


@dataclass(frozen=True)
class PagedBatch:
    """Where a step's N sequences lie. All on the device, int32; a CUDA graph holds the buffers and refills them.

    block_tables: [N, most blocks], ids of a sequence's KV blocks in order. context_lens: [N], tokens up to and
    including the step's, 0 for a sequence that pads a graph's batch. row_starts: [N + 1], first row of each sequence.
    `has_decode`, `has_chunks`: whether some sequence may have one new row, more than one; known on the host.
    `num_splits`: in how many parts the decode body reads the keys of one sequence.
    """

    block_tables: Tensor
    context_lens: Tensor
    row_starts: Tensor
    block_size: int
    has_decode: bool
    has_chunks: bool
    num_splits: int = 8


@dataclass(frozen=True)
class AttentionPlan:
    """All runs of a step, and the masks that its layers share (filled on first use, one per run and window).

    `paged` says the same to the Triton kernels, which read nothing else; None leaves attention to torch.
    """

    runs: tuple[AttentionRun, ...]
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    paged: PagedBatch | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: y = x / sqrt(mean(x^2, last) + eps) * weight, the mean in fp32.

    x: [..., I] any float dtype; weight: [I] same dtype. Returns a new tensor like x. The cast back to x's dtype comes
    before the product with weight, as in transformers' LlamaRMSNorm.
    """
    if x.is_cuda:
        from kernels import rms_norm as fused_norm

        return fused_norm.rms_norm(x, weight, eps)
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    x_fp32 = x.float()
    return weight * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope(x_THD: Tensor, cos_TD: Tensor, signed_sin_TD: Tensor) -> Tensor:
    """Semantics: y = x * cos + swap_halves(x) * signed_sin, where signed_sin = cat(-sin, sin) of the first half.

    x: [T, heads, D]; cos, signed_sin: [T, D] same dtype. Returns a new tensor; equals transformers' rotate_half form
    exactly, since (-b) * s and b * (-s) are the same number.
    """
    num_tokens, num_heads, head_dim = x_THD.shape
    swapped = x_THD.reshape(num_tokens, num_heads, 2, head_dim // 2).flip(2).view_as(x_THD)
    return torch.addcmul(x_THD * cos_TD[:, None], swapped, signed_sin_TD[:, None])


def silu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: y = silu(x[..., :n]) * x[..., n:]. x: [T, 2n] -> [T, n], any float dtype."""
    if gate_up.is_cuda:
        from kernels import silu_mul as fused_silu

        return fused_silu.silu_mul(gate_up)
    half = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :half]).mul_(gate_up[..., half:])


def kv_write_(cache_SGD: Tensor, new_TGD: Tensor, slot_mapping_T: Tensor) -> None:
    """Semantics: cache[slot_mapping[t]] = new[t], in place; slots are distinct. slot_mapping: int64 [T]."""
    if cache_SGD.is_cuda:
        from kernels import kv_write as scatter

        scatter.kv_write_(cache_SGD, new_TGD, slot_mapping_T)
        return
    cache_SGD.index_copy_(0, slot_mapping_T, new_TGD)


def paged_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    *,
    plan: AttentionPlan,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Semantics: out[t] = softmax(scale * q[t] K^T) V over its own sequence's keys j, t - window < j <= t.

    q: [T, H, D]; k, v: [S, G, D] with H a multiple of G -> [T, H, D]. The plan's runs cover the T rows in order. Each
    sequence is computed by itself, so a row's result does not depend on what else is in the step.
    """
    if q_THD.is_cuda and plan.paged is not None:
        from kernels import paged_attention as paged

        return paged.paged_attention(q_THD, k_SGD, v_SGD, batch=plan.paged, scale=scale, window=window)
    pieces = [_attend_run(q_THD, k_SGD, v_SGD, run=run, plan=plan, scale=scale, window=window) for run in plan.runs]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else torch.empty_like(q_THD)


def _keys_of(cache_SGD: Tensor, run: AttentionRun, first: int) -> Tensor:
    """Return positions [first, context_len) of a run, [G, positions, D]: a view when its slots are neighbours."""
    if run.slots is None:
        rows = cache_SGD[run.slot_start + first : run.slot_start + run.context_len]
    else:
        rows = cache_SGD.index_select(0, run.slots[first:])
    return rows.transpose(0, 1)


def _attend_run(
    q_THD: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    run: AttentionRun,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return one run's rows, [num_rows, H, D]."""
    num_heads, head_dim, num_kv_heads = q_THD.shape[1], q_THD.shape[2], k.shape[1]
    if run.num_rows == 1:
        # The heads that share a key head become rows of one small attention, so K and V are not repeated.
        first = 0 if window is None else max(0, run.context_len - window)
        q = q_THD[run.row_start].view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        keys, values = _keys_of(k, run, first)[None], _keys_of(v, run, first)[None]
        return F.scaled_dot_product_attention(q, keys, values, scale=scale).reshape(1, num_heads, head_dim)
    mask = _chunk_mask(plan, run, window=window, device=q_THD.device)
    attended = F.scaled_dot_product_attention(
        q_THD[run.row_start : run.row_start + run.num_rows].transpose(0, 1)[None],
        _keys_of(k, run, 0)[None],
        _keys_of(v, run, 0)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return attended[0].transpose(0, 1)


def _chunk_mask(plan: AttentionPlan, run: AttentionRun, *, window: int | None, device: torch.device) -> Tensor | None:
    """Return the boolean mask [num_rows, context_len] of a run, or None where plain causal attention is the same."""
    if window is not None and window >= run.context_len:
        window = None
    key = (run.row_start, window)
    if key not in plan.masks:
        first = run.context_len - run.num_rows
        mask = None
        if first > 0 or window is not None:
            query = torch.arange(first, run.context_len, device=device)[:, None]
            keys = torch.arange(run.context_len, device=device)[None, :]
            mask = keys <= query
            if window is not None:
                mask &= keys > query - window
        plan.masks[key] = mask
    return plan.masks[key]
