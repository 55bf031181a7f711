"""Fused sampling against the oracle in Python floats: every cut alone and together, ties, greedy beside drawn rows."""

import pytest
import torch

from kernels import reference, sampling
from kernels.sampling import sample

# temperature, top_k, top_p, min_p
KNOBS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.2),
    (1.3, 5, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (2.0, 0, 0.01, 0.0),
    (1.0, 20, 0.9, 0.1),
    (0.9, 10_000, 0.95, 0.0),
]
POINTS = (0.0, 0.77, 0.999)


def draw(logits: torch.Tensor, knobs: list[tuple[float, int, float, float]], points: list[float]) -> list[int]:
    def column(index: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([each[index] for each in knobs], dtype=dtype, device=logits.device)

    return sample(
        logits,
        temperature=column(0, torch.float32),
        top_k=column(1, torch.int32),
        top_p=column(2, torch.float64),
        min_p=column(3, torch.float32),
        points=torch.tensor(points, dtype=torch.float64, device=logits.device),
    ).tolist()


@pytest.mark.parametrize("width", [1, 61, 1100])
def test_every_cut(width: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 512)  # so that 1100 tokens are three blocks
    knobs = [each for each in KNOBS for _ in POINTS]
    points = [point for _ in KNOBS for point in POINTS]
    logits = torch.randn(len(knobs), width, generator=torch.Generator().manual_seed(width)) * 3
    actual = draw(logits.to(device), knobs, points)
    num_borders = 0
    for row, ((temperature, top_k, top_p, min_p), point) in enumerate(zip(knobs, points, strict=True)):
        expected, gap = reference.sample(
            logits[row], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, point=point
        )
        if gap > 1e-6:
            assert actual[row] == expected, (row, knobs[row], point)
        else:
            num_borders += 1
    assert num_borders <= len(knobs) // 10


@pytest.mark.parametrize("knobs", KNOBS)
def test_equal_logits_count_in_order_of_id(knobs: tuple[float, int, float, float], device: str) -> None:
    """Nine values only, 0.0 and -0.0 among them: nearly every cut falls among equals."""
    logits = torch.randint(-4, 5, (4, 90), generator=torch.Generator().manual_seed(1)).float()
    logits[:, ::7] *= -0.0
    points = [0.05, 0.31, 0.58, 0.97]
    actual = draw(logits.to(device), [knobs] * 4, points)
    temperature, top_k, top_p, min_p = knobs
    for row, point in enumerate(points):
        expected, gap = reference.sample(
            logits[row], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, point=point
        )
        assert actual[row] == expected or gap < 1e-6, (row, point)


def test_a_forbidden_token_is_never_drawn(device: str) -> None:
    logits = torch.full((2, 40), float("-inf"), device=device)
    logits[:, 13] = 1.0
    assert draw(logits, [(1.0, 0, 1.0, 0.0), (1.0, 3, 0.9, 0.0)], [0.0, 0.99]) == [13, 13]


def test_no_rows(device: str) -> None:
    assert draw(torch.empty(0, 7, device=device), [], []) == []
