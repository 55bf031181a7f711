"""Scores of stored gradient rows: inner products of int8 codes, a scale per row and block, with float queries."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.native import Native

BLOCK = 64
CHUNK_ROWS = 2048
"""Rows that torch makes float32 at once: 16 MiB at 2048 numbers a row, which a processor's cache still holds."""


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
