"""Ops of influence: per-example LoRA gradients with their long side projected, and scores of stored gradient rows."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.native import Native

BLOCK = 64
"""Numbers of a row that share a scale; a row is a whole number of blocks."""
CHUNK_ROWS = 2048
"""Rows that torch makes float32 at once: 16 MiB at 2048 numbers a row, which a processor's cache still holds."""

NUM_TIMED = 5


def lora_gradient(short_NTR: Tensor, long_NTL: Tensor, basis_LB: Tensor) -> Tensor:
    """Semantics: out[n] = sum over t of short[n, t]^T (long[n, t] @ basis), in fp32.

    short: [N, T, R], long: [N, T, L], any float dtype; basis: float32 [L, B]. Returns float32 [N, R, B]. On a GPU
    whichever body is faster at these sizes runs, timed once per device and size class; elsewhere torch's.
    """
    if not long_NTL.is_cuda:
        return lora_gradient_torch(short_NTR, long_NTL, basis_LB)
    num, tokens, rank = short_NTR.shape
    # Classes of a factor 2, so that a run does not time every length.
    sizes = (1 << num.bit_length(), 1 << tokens.bit_length(), rank, *basis_LB.shape)
    return _faster(long_NTL.device.index, long_NTL.dtype, sizes)(short_NTR, long_NTL, basis_LB)


def lora_gradient_torch(short_NTR: Tensor, long_NTL: Tensor, basis_LB: Tensor) -> Tensor:
    """Semantics: as `lora_gradient`, by two products in the order that has fewer multiplications; between them the
    gradients [N, R, L] or the projected tokens [N, T, B] are written."""
    tokens, rank, width = long_NTL.shape[1], short_NTR.shape[2], basis_LB.shape[1]
    if rank * (tokens + width) <= tokens * width:
        return torch.bmm(short_NTR.float().mT, long_NTL.float()) @ basis_LB
    return torch.bmm(short_NTR.float().mT, long_NTL.float() @ basis_LB)


def score_rows(
    codes: Tensor, scales: Tensor, units: Tensor, query: Tensor, *, native: "Native | None" = None
) -> Tensor:
    """Semantics: out[g, i] = units[i] * sum over j of codes[i, j] * scales[i, j // 64] * query[g, j], in fp32.

    codes: int8 [n, d], d a multiple of 64; scales: uint8 [n, d / 64]; units: float32 [n]; query: float32 [g, d], all
    contiguous and on one device. Returns float32 [g, n] there. On the CPU `native` reads the codes once as they lie; a
    row's result is then the same bits in any batch. Without it, and on a GPU, torch does it chunk by chunk.
    """
    out = query.new_empty(len(query), len(codes))
    if native is not None and not codes.is_cuda:
        native.score_rows(
            out.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            units.data_ptr(),
            query.data_ptr(),
            len(codes),
            codes.shape[1] // BLOCK,
            len(query),
            torch.get_num_threads(),
        )
        return out
    for start in range(0, len(codes), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = codes[part].unflatten(1, (-1, BLOCK)).float() * scales[part].float()[:, :, None]
        out[:, part] = (query @ rows.flatten(1).T) * units[part]
    return out


@cache
def _faster(device: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """Time both bodies on random data of these sizes and return the faster one."""
    num, tokens, rank, length, width = sizes
    where = torch.device("cuda", device)
    short = torch.randn(num, tokens, rank, dtype=dtype, device=where)
    long = torch.randn(num, tokens, length, dtype=dtype, device=where)
    basis = torch.randn(length, width, device=where)
    from kernels.lora_gradient import lora_gradient_triton

    times = {}
    for body in (lora_gradient_torch, lora_gradient_triton):
        body(short, long, basis)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(NUM_TIMED):
            body(short, long, basis)
        end.record()
        end.synchronize()
        times[body] = start.elapsed_time(end)
    return min(times, key=lambda body: times[body])
