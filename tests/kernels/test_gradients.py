"""Scores of quantised rows: C and torch against one product a number."""

import pytest
import torch

from kernels import gradients, reference
from kernels.gradients import BLOCK, score_rows
from kernels.native import Native


def case(num: int, blocks: int, groups: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num + blocks + groups)
    codes = torch.randint(-127, 128, (num, blocks * BLOCK), generator=generator).to(torch.int8)
    scales = torch.randint(0, 256, (num, blocks), generator=generator).to(torch.uint8)
    units = torch.rand(num, generator=generator) * 1e-3
    return codes, scales, units, torch.randn(groups, blocks * BLOCK, generator=generator)


@pytest.mark.parametrize(("num", "blocks", "groups"), [(0, 1, 1), (1, 1, 1), (5, 3, 8), (9, 2, 11), (7, 16, 3)])
def test_score_rows(any_native: Native, monkeypatch: pytest.MonkeyPatch, num: int, blocks: int, groups: int) -> None:
    monkeypatch.setattr(gradients, "CHUNK_ROWS", 4)
    inputs = case(num, blocks, groups)
    expected = reference.score_rows(*inputs)
    for native in (None, any_native):
        found = score_rows(*inputs, native=native)
        assert found.shape == (groups, num)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() if num else 1))


def test_a_rows_score_does_not_depend_on_the_batch(any_native: Native) -> None:
    codes, scales, units, query = case(13, 5, 9)
    together = score_rows(codes, scales, units, query, native=any_native)
    for row in range(len(codes)):
        part = slice(row, row + 1)
        for group in range(len(query)):
            alone = score_rows(codes[part], scales[part], units[part], query[group : group + 1], native=any_native)
            assert torch.equal(alone[0], together[group, part])
