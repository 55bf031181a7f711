"""SiLU * mul in Triton."""

import pytest
import torch

from kernels import reference
from kernels.silu_mul import silu_mul
from tests.kernels.cases import DTYPES, close, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (7, 22), (2, 2100)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x = random(*shape, dtype=dtype, device=device)
    close(silu_mul(x), reference.silu_mul(x), dtype)
