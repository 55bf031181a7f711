"""RMSNorm in one launch, with the residual addition before it fused in: x is read once and written at most twice.

Source: https://arxiv.org/abs/1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: y = x / sqrt(mean(x^2, last) + eps) * weight, the mean in fp32. Returns a new tensor like x.

    x: [..., I] or a slice [T, heads, I] of packed rows (last axis contiguous), any float dtype; weight: [I]. The
    normalised value is rounded to x's dtype before the product with weight, as in `kernels.ops.rms_norm`.
    """
    rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, out, eps)
    return out


def add_rms_norm_(x_TI: Tensor, residual_TI: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: residual += x in place; returns residual / sqrt(mean(residual^2) + eps) * weight as a new tensor.

    x, residual: [T, I] contiguous of one float dtype. The sum is rounded to that dtype before it is normalised, so the
    result is the one of the two steps apart.
    """
    out = torch.empty_like(x_TI)
    _launch(x_TI.view(-1, 1, x_TI.shape[-1]), residual_TI, weight, out, eps)
    return out


def _launch(rows: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    num_outer, num_inner, size = rows.shape
    if not num_outer * num_inner:
        return
    if rows.stride(-1) != 1 or (residual is not None and not residual.is_contiguous()):
        raise ValueError("the normalised axis and the residual must be contiguous")
    block = triton.next_power_of_2(size)
    _rms_norm[(num_outer * num_inner,)](
        rows,
        out if residual is None else residual,
        weight,
        out,
        num_inner,
        rows.stride(0),
        rows.stride(1),
        size,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )


@triton.jit
def _rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < size
    source = x + (row // num_inner) * outer_stride + (row % num_inner) * inner_stride
    value = tl.load(source + column, mask=is_column, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * size + column, mask=is_column, other=0).to(tl.float32)
        rounded = (value + before).to(out.dtype.element_ty)
        tl.store(residual + row * size + column, rounded, mask=is_column)
        value = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    normalised = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=is_column, other=0).to(tl.float32)
    tl.store(out + row * size + column, (normalised * factor).to(out.dtype.element_ty), mask=is_column)
