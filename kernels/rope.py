"""RoPE of queries and keys and the write of keys and values into the cache, in one launch over packed q/k/v.

With Qwen3's norms over heads fused in before the rotation. Sources: https://arxiv.org/abs/2104.09864;
https://arxiv.org/abs/1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rope_kv_write_(
    qkv_TN: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    *,
    cos_PD: Tensor,
    signed_sin_PD: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Semantics: returns rope(norm(q)), [T, H, D]; k_cache[slot[t]] = rope(norm(k[t])) and v_cache[slot[t]] = v[t].

    rope(x) = x * cos[position] + swap_halves(x) * signed_sin[position], signed_sin = cat(-sin, sin) of the first half;
    norm is RMSNorm over D with `q_norm` and `k_norm` [D], left out when they are None. qkv: [T, (H + 2G) D] contiguous;
    caches: [S, G, D] contiguous; cos, signed_sin: [P, D], all of one float dtype; positions, slot_mapping: int64 [T].
    Rows whose slot is negative pad a CUDA graph's batch and are written nowhere.
    """
    num_tokens = qkv_TN.shape[0]
    num_kv_heads, head_dim = k_SGD.shape[1:]
    if (q_norm is None) != (k_norm is None):
        raise ValueError("give both q_norm and k_norm, or neither")
    if qkv_TN.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(f"qkv has {qkv_TN.shape[1]} columns, not {(num_heads + 2 * num_kv_heads) * head_dim}")
    q_THD = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv_TN.dtype, device=qkv_TN.device)
    if num_tokens:
        _rope_kv_write[(num_tokens, num_heads + 2 * num_kv_heads)](
            qkv_TN,
            q_THD,
            k_SGD,
            v_SGD,
            cos_PD,
            signed_sin_PD,
            positions_T,
            slot_mapping_T,
            q_THD if q_norm is None else q_norm,
            q_THD if k_norm is None else k_norm,
            eps,
            num_heads,
            num_kv_heads,
            head_dim,
            HAS_NORM=q_norm is not None,
            HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
            num_warps=1,
        )
    return q_THD


@triton.jit
def _rope_kv_write(
    qkv: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    head_dim: tl.tensor,
    HAS_NORM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = head_dim // 2
    low = tl.arange(0, HALF_BLOCK)
    is_low = low < half
    source = qkv + token * (num_heads + 2 * num_kv_heads) * head_dim + head * head_dim
    first = tl.load(source + low, mask=is_low, other=0)
    second = tl.load(source + half + low, mask=is_low, other=0)
    slot = tl.load(slot_mapping + token)
    dtype = q_out.dtype.element_ty
    if head >= num_heads + num_kv_heads:
        target = v_cache + (slot * num_kv_heads + head - num_heads - num_kv_heads) * head_dim
        tl.store(target + low, first, mask=is_low & (slot >= 0))
        tl.store(target + half + low, second, mask=is_low & (slot >= 0))
    else:
        x_1 = first.to(tl.float32)
        x_2 = second.to(tl.float32)
        if HAS_NORM:
            scale = 1 / tl.sqrt((tl.sum(x_1 * x_1, 0) + tl.sum(x_2 * x_2, 0)) / head_dim + eps)
            q_1 = tl.load(q_norm + low, mask=is_low, other=0).to(tl.float32)
            q_2 = tl.load(q_norm + half + low, mask=is_low, other=0).to(tl.float32)
            k_1 = tl.load(k_norm + low, mask=is_low, other=0).to(tl.float32)
            k_2 = tl.load(k_norm + half + low, mask=is_low, other=0).to(tl.float32)
            # Rounded where the steps apart round: after the normalisation and after the weight.
            x_1 = ((x_1 * scale).to(dtype).to(tl.float32) * tl.where(head < num_heads, q_1, k_1)).to(dtype)
            x_2 = ((x_2 * scale).to(dtype).to(tl.float32) * tl.where(head < num_heads, q_2, k_2)).to(dtype)
            x_1 = x_1.to(tl.float32)
            x_2 = x_2.to(tl.float32)
        angle = tl.load(positions + token) * head_dim
        cos_1 = tl.load(cos + angle + low, mask=is_low, other=0).to(tl.float32)
        cos_2 = tl.load(cos + angle + half + low, mask=is_low, other=0).to(tl.float32)
        sin_1 = tl.load(signed_sin + angle + low, mask=is_low, other=0).to(tl.float32)
        sin_2 = tl.load(signed_sin + angle + half + low, mask=is_low, other=0).to(tl.float32)
        y_1 = ((x_1 * cos_1).to(dtype).to(tl.float32) + x_2 * sin_1).to(dtype)
        y_2 = ((x_2 * cos_2).to(dtype).to(tl.float32) + x_1 * sin_2).to(dtype)
        if head < num_heads:
            q_target = q_out + (token * num_heads + head) * head_dim
            tl.store(q_target + low, y_1, mask=is_low)
            tl.store(q_target + half + low, y_2, mask=is_low)
        else:
            k_target = k_cache + (slot * num_kv_heads + head - num_heads) * head_dim
            tl.store(k_target + low, y_1, mask=is_low & (slot >= 0))
            tl.store(k_target + half + low, y_2, mask=is_low & (slot >= 0))
