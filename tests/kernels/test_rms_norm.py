"""RMSNorm in Triton, alone, over heads of packed rows, and after a fused addition."""

import pytest
import torch

from kernels import ops, reference
from kernels.rms_norm import add_rms_norm_, rms_norm
from tests.kernels.cases import DTYPES, close, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (2, 5, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = random(*shape, dtype=dtype, device=device), random(shape[-1], dtype=dtype, seed=1, device=device)
    actual = rms_norm(x, weight, 1e-5)
    close(actual, reference.rms_norm(x, weight, 1e-5), dtype)
    close(actual, ops.rms_norm(x.cpu(), weight.cpu(), 1e-5).to(device), dtype)


def test_heads_of_packed_rows_are_not_copied(device: str) -> None:
    packed, weight = random(3, 7, 8, device=device), random(8, seed=1, device=device)
    heads = packed[:, 2:5]
    close(rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (4, 21)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, residual = random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, seed=1, device=device)
    weight = random(shape[1], dtype=dtype, seed=2, device=device)
    total, expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    close(add_rms_norm_(x, residual, weight, 1e-5), expected, dtype)
    if dtype == torch.float32 or device == "cuda":
        assert torch.equal(residual, total), "one addition, one rounding"
    close(residual, total, dtype)  # the interpreter does not round to bf16 as devices do


def test_rows_that_are_not_contiguous_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        rms_norm(random(2, 8, 3, device=device).transpose(1, 2), random(8, device=device), 1e-5)
