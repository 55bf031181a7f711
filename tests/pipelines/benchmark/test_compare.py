"""Scores of answers, and what the bootstrap's interval is worth."""

import numpy as np
import pytest

from configs.schema import BenchmarkSettings
from pipelines.benchmark.compare import compare, contains_expected, is_exact, normalised
from pipelines.benchmark.suites import Item

ITEM = Item("q", "Who?", ("Ada Lovelace", "the Countess"), "It was Ada Lovelace.")


@pytest.mark.parametrize(
    ("answer", "exact", "contains"),
    [
        ("Ada Lovelace", True, True),
        ("  ada   LOVELACE! ", True, False),
        ("It was Ada Lovelace", True, True),
        ("I think it was Ada Lovelace, in 1843.", False, True),
        ("THE COUNTESS", True, True),
        ("Charles Babbage", False, False),
        ("", False, False),
    ],
)
def test_scores(answer: str, exact: bool, contains: bool) -> None:
    assert is_exact(answer, ITEM) is exact
    assert contains_expected(answer, ITEM) is contains


def test_normalised_is_idempotent_and_unicode_aware() -> None:
    assert normalised("\uff21da\u00a0 Lovelace\u2026") == normalised(normalised("ada lovelace..."))


def test_means_and_delta_are_plain_averages() -> None:
    comparison = compare("contains", [0, 0, 1, 0], [1, 0, 1, 1], settings=BenchmarkSettings())
    assert (comparison.base, comparison.adapter, comparison.delta) == (0.25, 0.75, 0.5)
    assert comparison.low <= 0.5 <= comparison.high
    assert comparison == compare("contains", [0, 0, 1, 0], [1, 0, 1, 1], settings=BenchmarkSettings())


def test_equal_scores_are_not_distinct_from_zero() -> None:
    comparison = compare("loss", [1.5, 2.5], [1.5, 2.5], settings=BenchmarkSettings())
    assert (comparison.low, comparison.high, comparison.is_distinct) == (0.0, 0.0, False)
    assert compare("loss", [3.0] * 9, [1.0] * 9, settings=BenchmarkSettings()).is_distinct


def test_pairing_takes_out_what_items_share() -> None:
    hardness = np.linspace(0, 10, 40)
    comparison = compare("loss", hardness, hardness - 0.1, settings=BenchmarkSettings())
    assert comparison.high - comparison.low < 1e-9 and comparison.is_distinct


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """400 experiments of 40 pairs whose true difference is 0.3; a nominal 90 % interval."""
    random = np.random.default_rng(7)
    settings = BenchmarkSettings(num_bootstrap=400, confidence=0.9)
    covered = 0
    for _ in range(400):
        base = random.normal(2.0, 1.0, 40)
        comparison = compare("loss", base, base + random.normal(0.3, 0.5, 40), settings=settings)
        covered += comparison.low <= 0.3 <= comparison.high
    # A percentile bootstrap of 40 items falls about two points short of its nominal 90 %.
    assert 0.82 <= covered / 400 <= 0.95
