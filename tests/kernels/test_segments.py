"""The work list of a step: neighbours merge, the base model is left out, both forms say the same."""

import pytest
import torch

from kernels.segments import BASE_ROW, build_step

CPU = torch.device("cpu")


def test_segments_merge_neighbours_and_skip_the_base() -> None:
    step = build_step([(BASE_ROW, 2), (1, 1), (1, 2), (0, 0), (4, 1)], device=CPU)
    assert step.segments.tolist() == [[1, 2, 5], [4, 5, 6]] and step.segments.dtype == torch.int32
    assert step.adapter_rows.tolist() == [-1, -1, 1, 1, 1, 4] and step.adapter_rows.dtype == torch.int32


@pytest.mark.parametrize("runs", [[], [(BASE_ROW, 3)], [(2, 0)]])
def test_no_adapter_no_segment(runs: list[tuple[int, int]]) -> None:
    step = build_step(runs, device=CPU)
    assert step.segments.shape == (0, 3)
    assert step.adapter_rows.tolist() == [BASE_ROW] * sum(count for row, count in runs)


def test_segments_refuse_a_scattered_adapter() -> None:
    with pytest.raises(ValueError, match="not neighbours"):
        build_step([(0, 1), (1, 1), (0, 1)], device=CPU)
