"""Plain fp32 oracle of every op: one token, one head, one adapter at a time, nothing shared, nothing in place.

Sources: LoRA https://arxiv.org/abs/2106.09685; RoPE https://arxiv.org/abs/2104.09864; RMSNorm
https://arxiv.org/abs/1910.07467; grouped queries https://arxiv.org/abs/2305.13245.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.lora import LoraPool
from kernels.ops import AttentionRun, LoraGroup
from kernels.segments import Segment


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight in fp32."""
    x = x.float()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


def rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate each pair (d, d + D/2) by its token's angle; cos and sin are [T, D] with equal halves."""
    x = x_THD.float()
    half = x.shape[-1] // 2
    cos, sin = cos_TD.float()[:, None, :half], sin_TD.float()[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return gate * sigmoid(gate) * up in fp32."""
    gate, up = gate_up.float().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def lora_add(y_TO: Tensor, x_TI: Tensor, *, segments: Sequence[Segment], groups: Sequence[LoraGroup | None]) -> Tensor:
    """Return y plus each token's own adapter's B A x, token by token and part by part, in fp32."""
    y = y_TO.float().clone()
    for segment in segments:
        group = groups[segment.adapter_row]
        for token in range(segment.start, segment.end):
            for part in group.parts if group is not None else ():
                a = group.a_RI[part.rank_start : part.rank_end].float()  # type: ignore[union-attr]
                y[token, part.out_start : part.out_end] += part.b_RO.float().t() @ (a @ x_TI[token].float())
    return y


def kv_write(cache_SGD: Tensor, new_TGD: Tensor, slot_mapping_T: Tensor) -> Tensor:
    """Return the cache with each new row at its slot."""
    cache = cache_SGD.clone()
    for token, slot in enumerate(slot_mapping_T.tolist()):
        cache[slot] = new_TGD[token]
    return cache


def paged_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    *,
    runs: Sequence[AttentionRun],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return softmax(scale q K^T) V for one row and head at a time, in fp32."""
    out = torch.zeros_like(q_THD, dtype=torch.float32)
    heads_per_kv = q_THD.shape[1] // k_SGD.shape[1]
    for run in runs:
        slots = run.slots.tolist() if run.slots is not None else range(run.slot_start, run.slot_start + run.context_len)
        for row in range(run.num_rows):
            position = run.context_len - run.num_rows + row
            first = 0 if window is None else max(0, position + 1 - window)
            visible = list(slots)[first : position + 1]
            for head in range(q_THD.shape[1]):
                keys, values = (
                    k_SGD[visible, head // heads_per_kv].float(),
                    v_SGD[visible, head // heads_per_kv].float(),
                )
                weights = torch.softmax(scale * (keys @ q_THD[run.row_start + row, head].float()), -1)
                out[run.row_start + row, head] = weights @ values
    return out


def top_k_top_p(logits_V: Tensor, *, top_k: int, top_p: float, temperature: float) -> list[float]:
    """Return the distribution that sampling draws from, computed in Python floats.

    Keep the `top_k` best (0: all), then the fewest of them whose share reaches `top_p`; ties go to the lower id.
    """
    order = sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))
    kept = order[:top_k] if top_k else order
    best = float(logits_V[kept[0]])
    weights = [math.exp((float(logits_V[token]) - best) / temperature) for token in kept]
    total, running, nucleus = sum(weights), 0.0, []
    for token, weight in zip(kept, weights, strict=True):
        nucleus.append((token, weight))
        running += weight / total
        if running >= top_p:
            break
    kept_total = sum(weight for _, weight in nucleus)
    probabilities = [0.0] * len(order)
    for token, weight in nucleus:
        probabilities[token] = weight / kept_total
    return probabilities


def lora_pool_add(
    y_TO: Tensor,
    x_TI: Tensor,
    *,
    pool: LoraPool,
    adapter_rows: Tensor,
    layer: int,
    modules: range,
    out_bounds: Sequence[int],
) -> Tensor:
    """Return y plus each token's own adapter's B A x, token by token and module by module, in fp32."""
    y = y_TO.float().clone()
    for token, adapter_row in enumerate(adapter_rows.tolist()):
        for index, module in enumerate(modules):
            a_offset, b_offset, rank = pool.host_table[adapter_row, layer, module].tolist()
            if adapter_row < 0 or not rank:
                continue
            columns = slice(out_bounds[index], out_bounds[index + 1])
            width = columns.stop - columns.start
            a = pool.data[a_offset : a_offset + rank * x_TI.shape[1]].view(rank, -1).float()
            b = pool.data[b_offset : b_offset + rank * width].view(rank, width).float()
            y[token, columns] += b.t() @ (a @ x_TI[token].float())
    return y
