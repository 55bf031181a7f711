"""Plain fp32 oracle of every op: one token, one head, one adapter at a time, nothing shared, nothing in place.

Sources: LoRA https://arxiv.org/abs/2106.09685; RoPE https://arxiv.org/abs/2104.09864; RMSNorm
https://arxiv.org/abs/1910.07467; grouped queries https://arxiv.org/abs/2305.13245.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.lora import LoraPool, LoraStep
from kernels.ops import AttentionRun


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight in fp32."""
    x = x.float()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return residual + x, rounded to x's dtype, and its norm in fp32."""
    total = (residual.float() + x.float()).to(x.dtype)
    return total, rms_norm(total, weight, eps)


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


def lora_add(
    y_TO: Tensor,
    x_TI: Tensor,
    *,
    pool: LoraPool,
    step: LoraStep,
    layer: int,
    modules: range,
    out_bounds: Sequence[int],
) -> Tensor:
    """Return y plus each token's own adapter's B A x, token by token and module by module, in fp32."""
    y = y_TO.float().clone()
    for token, adapter_row in enumerate(step.adapter_rows.tolist()):
        for module, out_start, out_end in zip(modules, out_bounds, out_bounds[1:], strict=False):
            a_start, b_start, rank = pool.table[adapter_row, layer, module].tolist() if adapter_row >= 0 else (0, 0, 0)
            for row in range(rank):
                a_I = pool.data[a_start + row * x_TI.shape[1] :][: x_TI.shape[1]].float()
                b_O = pool.data[b_start + row * (out_end - out_start) :][: out_end - out_start].float()
                y[token, out_start:out_end] += b_O * (a_I @ x_TI[token].float())
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


def edited_logits(
    logits_V: Tensor,
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: Sequence[tuple[int, float]] = (),
    forbidden: Sequence[int] = (),
) -> list[float]:
    """Return one row's logits after penalties, biases and forbidden tokens, token by token in Python floats.

    Repetition: https://arxiv.org/abs/1909.05858, over prompt and output; presence and frequency over the output, as
    https://platform.openai.com/docs/api-reference defines them.
    """
    edited = []
    for token, logit in enumerate(logits_V.tolist()):
        if token in prompt or token in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        count = list(output).count(token)
        logit -= presence * (count > 0) + frequency * count
        logit += dict(bias).get(token, 0.0)
        edited.append(-math.inf if token in forbidden else logit)
    return edited


def top_k_top_p(
    logits_V: Tensor | Sequence[float], *, top_k: int, top_p: float, temperature: float, min_p: float = 0.0
) -> list[float]:
    """Return the distribution that sampling draws from, computed in Python floats.

    Keep the `top_k` best (0: all), then the fewest of them whose share reaches `top_p` (1: all), of these the ones at
    least `min_p` times as likely as the best; ties go to the lower id.
    """
    logits = [float(logit) for logit in logits_V]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[:top_k] if top_k else order
    weights = [math.exp((logits[token] - logits[kept[0]]) / temperature) for token in kept]
    total, running, nucleus = sum(weights), 0.0, []
    for token, weight in zip(kept, weights, strict=True):
        if weight >= min_p:
            nucleus.append((token, weight))
        running += weight
        if top_p < 1 and running >= top_p * total:
            break
    kept_total = sum(weight for _, weight in nucleus)
    probabilities = [0.0] * len(order)
    for token, weight in nucleus:
        probabilities[token] = weight / kept_total
    return probabilities


def pick(probabilities: Sequence[float], order: Sequence[int], point: float) -> int:
    """Return the first token, taken in `order`, at which the summed probability exceeds `point`."""
    running = 0.0
    for token in order:
        running += probabilities[token]
        if running > point and probabilities[token] > 0:
            return token
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def sample(
    logits_V: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, point: float
) -> tuple[int, float]:
    """Return the token drawn at `point`, and how far the point is from the border to another token."""
    order = sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))
    if temperature == 0:
        return order[0], 1.0
    probabilities = top_k_top_p(logits_V, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    by_id = top_p >= 1 and not top_k
    order = list(range(len(logits_V))) if by_id else order
    borders = [0.0]
    for token in order:
        borders.append(borders[-1] + probabilities[token])
    return pick(probabilities, order, point), min(abs(point - border) for border in borders[1:])


def lora_gradient(short_NTR: Tensor, long_NTL: Tensor, basis_LB: Tensor) -> Tensor:
    """Add one outer product per token: out[n] = sum over t of short[n, t]^T (long[n, t] @ basis)."""
    num, tokens, rank = short_NTR.shape
    out = torch.zeros(num, rank, basis_LB.shape[1], device=short_NTR.device)
    for n in range(num):
        for t in range(tokens):
            out[n] += torch.outer(short_NTR[n, t].float(), long_NTL[n, t].float() @ basis_LB)
    return out


def score_rows(codes: Tensor, scales: Tensor, units: Tensor, query: Tensor) -> Tensor:
    """Make each row's numbers one by one, then multiply: out[g, i] = <query[g], row i>."""
    block = codes.shape[1] // max(1, scales.shape[1])
    out = torch.zeros(len(query), len(codes))
    for i in range(len(codes)):
        row = torch.tensor([float(codes[i, j]) * float(scales[i, j // block]) for j in range(codes.shape[1])])
        out[:, i] = query @ row * units[i]
    return out
