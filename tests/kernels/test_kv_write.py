"""The cache write in Triton: slices of packed heads, slots that pad a batch."""

import pytest
import torch

from kernels import reference
from kernels.kv_write import kv_write_
from tests.kernels.cases import DTYPES, random


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(dtype: torch.dtype, device: str) -> None:
    cache = random(9, 3, 4, dtype=dtype, device=device)
    new = random(5, 8, 4, dtype=dtype, seed=1, device=device)[:, 2:5]  # not contiguous, as a slice of packed q/k/v
    slots = torch.tensor([8, 0, -1, 5, -1], device=device)
    expected = reference.kv_write(cache, new[slots >= 0], slots[slots >= 0])
    kv_write_(cache, new, slots)
    assert torch.equal(cache, expected)


def test_nothing_to_write(device: str) -> None:
    cache = random(2, 1, 4, device=device)
    before = cache.clone()
    kv_write_(cache, random(0, 1, 4, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert torch.equal(cache, before)


def test_scattered_heads_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="one after the other"):
        kv_write_(
            random(4, 2, 4, device=device),
            random(3, 4, 4, device=device)[:, ::2],
            torch.tensor([0, 1, 2], device=device),
        )
