"""SiLU of the gate times up, from packed [gate | up] rows, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: y = silu(x[..., :n]) * x[..., n:]. x: [..., 2n] contiguous, any float dtype -> [..., n].

    silu is computed in fp32 and rounded to x's dtype before the product, as in `kernels.ops.silu_mul`.
    """
    half = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], half, dtype=gate_up.dtype, device=gate_up.device)
    num_rows = out.numel() // half if half else 0
    if num_rows:
        _silu_mul[(num_rows, triton.cdiv(half, _BLOCK))](gate_up.contiguous(), out, half, BLOCK=_BLOCK)
    return out


@triton.jit
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    half: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < half
    gate = tl.load(gate_up + row * 2 * half + column, mask=is_column, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * half + half + column, mask=is_column, other=0).to(tl.float32)
    activated = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * half + column, (activated * up).to(out.dtype.element_ty), mask=is_column)
