"""Per-example LoRA gradients, their long side projected: kernel and torch against one outer product a token."""

import pytest
import torch

from kernels import reference
from kernels.gradients import lora_gradient, lora_gradient_torch
from kernels.lora_gradient import SPLIT_TOKENS, lora_gradient_triton
from tests.kernels.cases import DTYPES, close, random

SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 70, 33), (3, 40, 8, 64, 16), (1, SPLIT_TOKENS + 3, 2, 9, 5), (2, 33, 17, 130, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    num, tokens, rank, length, width = shape
    short = random(num, tokens, rank, dtype=dtype, device=device)
    long = random(num, tokens, length, dtype=dtype, seed=1, device=device)
    # Powers of two are the same number in bf16, to which the kernel rounds the basis of 16-bit rows.
    basis = random(length, width, seed=2, device=device).sign() * 0.25
    expected = reference.lora_gradient(short, long, basis)
    size = float(expected.abs().max()) or 1.0
    for body in (lora_gradient, lora_gradient_torch, lora_gradient_triton):
        close(body(short, long, basis) / size, expected / size, dtype)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8, 3), (2, 0, 2, 8, 3)])
def test_nothing_gives_zeros(shape: tuple[int, ...], device: str) -> None:
    num, tokens, rank, length, width = shape
    short, long = torch.zeros(num, tokens, rank, device=device), torch.zeros(num, tokens, length, device=device)
    for body in (lora_gradient_torch, lora_gradient_triton):
        found = body(short, long, torch.ones(length, width, device=device))
        assert found.shape == (num, rank, width) and not found.any()
