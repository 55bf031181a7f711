"""Packed linears in C against torch in float64; a row's bits do not depend on the other rows or on the threads."""

from collections.abc import Iterator

import pytest
import torch

from kernels.linear_cpu import can_pack, linear, pack
from kernels.native import Native

# (rows, input size, output size): one of each, panels not full, rows around the tile and block heights, two depths.
SHAPES = [(0, 8, 5), (1, 2, 1), (3, 16, 40), (12, 34, 32), (13, 64, 97), (32, 96, 64), (193, 10, 33), (15, 2300, 70)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def threads_stay_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "in_size", "out_size"), SHAPES)
def test_linear(
    rows: int, in_size: int, out_size: int, with_bias: bool, dtype: torch.dtype, any_native: Native
) -> None:
    x, weight = random(rows, in_size, dtype=dtype), random(out_size, in_size, dtype=dtype, seed=1) / in_size**0.5
    bias = random(out_size, dtype=dtype, seed=2) if with_bias else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    packed = pack(weight, any_native)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(linear(x, packed, bias).double(), expected, **close)
    in_fp32 = linear(x, packed, bias, out_dtype=torch.float32)
    torch.testing.assert_close(in_fp32.double(), expected, atol=3e-5, rtol=3e-5)
    y = random(rows, out_size, dtype=dtype, seed=3)
    total = y.double() + expected
    assert linear(x, packed, bias, add_to_TO=y) is y
    torch.testing.assert_close(y.double(), total, **close)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(
    dtype: torch.dtype, any_native: Native
) -> None:
    x, packed = random(205, 2100, dtype=dtype), pack(random(70, 2100, dtype=dtype, seed=1), any_native)
    torch.set_num_threads(1)
    alone = torch.cat([linear(x[row : row + 1], packed) for row in range(len(x))])
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for count in (2, 5, 11, 12, 13, 205):
            assert torch.equal(linear(x[:count], packed), alone[:count])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_packed_rows_are_the_weight(dtype: torch.dtype, any_native: Native) -> None:
    weight = random(71, 10, dtype=dtype)
    indices = torch.tensor([70, 0, 31, 32, 63, 64, 0])
    assert torch.equal(pack(weight, any_native).rows(indices), weight[indices])


def test_what_can_be_packed() -> None:
    assert can_pack(torch.float32, 7) and can_pack(torch.bfloat16, 8)
    assert not can_pack(torch.bfloat16, 7) and not can_pack(torch.float16, 8)
