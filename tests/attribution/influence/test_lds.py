"""LDS against scipy, and its bootstrap against really resampled tables."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from attribution.influence.lds import LdsError, Resamples, lds, mean_over_banks, rank_agreement, weighted_spearman


def resamples(num_queries: int, num_subsets: int, *, num_draws: int = 50) -> Resamples:
    return Resamples.of(num_queries=num_queries, num_subsets=num_subsets, num_draws=num_draws, seed=3)


def bank(seed: int, *, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [5, 30] that are the truth, subsets [40, 30], and gains [40, 5] that follow it but for noise."""
    generator = np.random.default_rng(seed)
    scores, kept = generator.standard_normal((5, 30)), generator.random((40, 30)) < 0.5
    return scores, kept, kept @ scores.T + noise * generator.standard_normal((40, 5))


def test_truth_scores_one_and_its_negative_minus_one() -> None:
    scores, kept, gains = bank(0, noise=0.0)
    found = lds(scores, kept, gains, resamples=resamples(5, 40))
    assert found.value == pytest.approx(1) and found.low == pytest.approx(1) and found.high == pytest.approx(1)
    assert lds(-scores, kept, gains, resamples=resamples(5, 40)).value == pytest.approx(-1)


def test_each_query_is_scipys_spearman() -> None:
    scores, kept, gains = bank(1, noise=5.0)
    found = lds(scores, kept, gains, resamples=resamples(5, 40))
    expected = [spearmanr(kept @ scores[query], gains[:, query]).statistic for query in range(5)]
    np.testing.assert_allclose(found.per_query, expected, atol=1e-12)
    assert found.low < found.value < found.high


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=3, max_size=12))
def test_weights_are_repetitions(items: list[tuple[int, int, int]]) -> None:
    x, y, weights = (np.array(column, dtype=np.float64) for column in zip(*items, strict=True))
    repeated = [np.repeat(values, weights.astype(int)) for values in (x, y)]
    if any(len(set(values)) < 2 for values in repeated):
        return
    expected = spearmanr(*repeated).statistic
    assert weighted_spearman(x, y, weights[None])[0] == pytest.approx(expected, abs=1e-9)


def test_draws_are_the_means_of_resampled_tables() -> None:
    scores, kept, gains = bank(2, noise=5.0)
    drawn = resamples(5, 40, num_draws=3)
    found = lds(scores, kept, gains, resamples=drawn)
    for draw in range(3):
        rows = np.repeat(np.arange(40), drawn.subsets[draw].astype(int))
        queries = np.repeat(np.arange(5), drawn.queries[draw].astype(int))
        expected = [spearmanr(kept[rows] @ scores[query], gains[rows, query]).statistic for query in queries]
        assert found.draws[draw] == pytest.approx(np.mean(expected))


def test_scores_that_say_nothing_count_as_zero() -> None:
    _, kept, gains = bank(3, noise=1.0)
    found = lds(np.zeros((5, 30)), kept, gains, resamples=resamples(5, 40))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_differences_are_paired() -> None:
    scores, kept, gains = bank(4, noise=20.0)
    drawn = resamples(5, 40, num_draws=400)
    one = lds(scores, kept, gains, resamples=drawn)
    twin = lds(scores + 1e-9, kept, gains, resamples=drawn)
    assert one.high - one.low > 0.1
    assert abs(one.minus(twin).value) < 1e-6 and one.minus(twin).high < 0.02


def test_the_interval_covers_the_truth() -> None:
    """The expected LDS of the right scores under known noise, from many banks, is in most banks' intervals."""
    values = []
    for seed in range(40):
        scores, kept, gains = bank(100 + seed, noise=5.0)
        values.append(lds(scores, kept, gains, resamples=resamples(5, 40, num_draws=200)))
    truth = np.mean([one.value for one in values])
    assert 0.8 <= np.mean([one.low <= truth <= one.high for one in values]) <= 1.0


def test_mean_over_banks_is_narrower_than_each() -> None:
    found = []
    for seed in range(4):
        scores, kept, gains = bank(seed, noise=5.0)
        found.append(lds(scores, kept, gains, resamples=resamples(5, 40, num_draws=400)))
    mean = mean_over_banks(found)
    assert mean.value == pytest.approx(np.mean([one.value for one in found]))
    assert mean.high - mean.low < min(one.high - one.low for one in found)


def test_noise_ceiling_of_equal_banks_is_one() -> None:
    _, _, gains = bank(5, noise=1.0)
    assert rank_agreement(gains, gains.copy(), resamples=resamples(5, 40)).value == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "gains", "words"),
    [
        (np.zeros((5, 29)), np.zeros((40, 5)), r"scores \(5, 29\), kept \(40, 30\)"),
        (np.zeros((5, 30)), np.zeros((40, 4)), r"gains \(40, 4\)"),
        (np.full((5, 30), np.nan), np.zeros((40, 5)), "scores: 200 numbers are not finite"),
        (np.zeros((5, 30)), np.full((40, 5), np.inf), "gains: 200 numbers are not finite"),
    ],
)
def test_what_does_not_fit_is_named(scores: np.ndarray, gains: np.ndarray, words: str) -> None:
    with pytest.raises(LdsError, match=words):
        lds(scores, np.ones((40, 30), dtype=bool), gains, resamples=resamples(5, 40))
