"""The arithmetic of scores and shares: exact against loops, and its invariants."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attribution.influence import rows, scores
from attribution.influence.bm25 import WordMatches, bm25_scores, random_ranking
from attribution.influence.rows import rows_of
from attribution.influence.scores import (
    bootstrap,
    bootstrap_mean,
    in_micros,
    score_parts,
    split_shares,
    sum_by_contributor,
)
from attribution.influence.store import Trace, TraceError, TraceExample
from tests.attribution.influence.planted import CHECKPOINT_STEPS, NUM_STEPS, Planted

NUM_GROUPS = 3


def query_for(trace: Trace) -> np.ndarray:
    dim = trace.gradients(CHECKPOINT_STEPS[0]).shape[1]
    generator = np.random.default_rng(5)
    return generator.standard_normal((len(CHECKPOINT_STEPS), NUM_GROUPS, dim)).astype(np.float32)


def looped_parts(planted: Planted, query: np.ndarray, weights: np.ndarray, normalise: str) -> np.ndarray:
    """Score example by example, group by group, in float64."""
    parts = np.zeros((len(CHECKPOINT_STEPS), NUM_GROUPS, len(planted.rows)))
    for c, step in enumerate(CHECKPOINT_STEPS):
        whole = query[c].astype(np.float64).sum(axis=0)
        for i, row in enumerate(np.load(planted.trace / "gradients" / f"{step}.npy").astype(np.float64)):
            factor = (1 - 0.999**step) ** 0.5
            if normalise == "cosine":
                factor = 1 / (np.sqrt(whole @ whole) * np.sqrt(row @ row) * weights[c].sum())
            parts[c, :, i] = [weights[c, i] * factor * float(query[c, g] @ row) for g in range(NUM_GROUPS)]
    return parts


@pytest.mark.parametrize("shard_rows", [2, 4096])
@pytest.mark.parametrize("normalise", ["none", "cosine"])
def test_parts_equal_the_loop(
    planted: Planted, monkeypatch: pytest.MonkeyPatch, shard_rows: int, normalise: scores.Normalise
) -> None:
    monkeypatch.setattr(rows, "SHARD_ROWS", shard_rows)
    trace = Trace(planted.trace)
    query = query_for(trace)
    found = score_parts(query, rows_of(trace), normalise=normalise)
    expected = looped_parts(planted, query, trace.exposure(), normalise)
    if normalise == "cosine":
        raw = looped_parts(planted, query, trace.exposure(), "none")
        expected *= np.abs(raw.sum(axis=1)).sum() / np.abs(expected.sum(axis=1)).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_long_gradient_buys_nothing_under_cosine(planted: Planted, tmp_path: Path) -> None:
    """The outlier attack: an example that makes its gradient sixteen times longer keeps its rank and its part."""
    copy = tmp_path / "trace"
    shutil.copytree(planted.trace, copy)
    for step in CHECKPOINT_STEPS:
        rows = np.load(copy / "gradients" / f"{step}.npy")
        rows[-1] *= 16  # a power of two, which float16 holds without rounding
        np.save(copy / "gradients" / f"{step}.npy", rows)
    query = query_for(Trace(planted.trace))
    gains = {}
    for normalise in ("none", "cosine"):
        honest, inflated = (
            np.abs(score_parts(query, rows_of(Trace(path)), normalise=normalise).sum(axis=(0, 1)))  # type: ignore[arg-type]
            for path in (planted.trace, copy)
        )
        gains[normalise] = (inflated[-1] / inflated[0]) / (honest[-1] / honest[0])
    assert gains["none"] == pytest.approx(16, rel=0.01)
    assert gains["cosine"] == pytest.approx(1, rel=0.01)


def test_exposure_gives_each_step_to_the_nearest_checkpoint(planted: Planted) -> None:
    trace = Trace(planted.trace)
    expected = np.zeros((len(CHECKPOINT_STEPS), len(planted.rows)))
    order = [row.example_id for row in planted.rows]
    for step in trace.steps:
        num_tokens = sum(trace.examples[order.index(name)].num_target_tokens for name in step.example_ids)
        nearest = min(range(len(CHECKPOINT_STEPS)), key=lambda c: abs(CHECKPOINT_STEPS[c] - step.step))
        for name in step.example_ids:
            expected[nearest, order.index(name)] += step.lr / num_tokens
    np.testing.assert_allclose(trace.exposure(), expected, rtol=1e-9)
    assert len(trace.steps) == NUM_STEPS


def test_contributors_get_the_sum_of_their_rows() -> None:
    parts = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4)
    key_ids, summed = sum_by_contributor(parts, ["b", "a", "b", "c"])
    assert key_ids == ("a", "b", "c")
    np.testing.assert_array_equal(summed, np.stack([parts[..., 1], parts[..., 0] + parts[..., 2], parts[..., 3]], -1))


def test_bootstrap_weights_average_to_one_and_repeat() -> None:
    parts = np.random.default_rng(0).standard_normal((3, 8, 2))
    draws = bootstrap(parts, num_draws=20_000, seed=1)
    np.testing.assert_array_equal(draws, bootstrap(parts, num_draws=20_000, seed=1))
    np.testing.assert_allclose(draws.mean(axis=0), parts.sum(axis=(0, 1)), atol=0.1)
    steady = bootstrap(np.ones((3, 8, 1)), num_draws=50, seed=1)
    np.testing.assert_allclose(steady, 24.0)


def test_bootstrap_mean_stays_between_the_values() -> None:
    spread = bootstrap_mean(np.array([0.0, 1.0, 5.0]), num_draws=500, seed=0, confidence=0.9)
    assert 0 < spread.low < 2 < spread.high < 5
    point = bootstrap_mean(np.array([3.0]), num_draws=500, seed=0, confidence=0.9)
    assert (point.low, point.high) == (pytest.approx(3.0), pytest.approx(3.0))


@settings(max_examples=60, deadline=None)
@given(parts=hnp.arrays(np.float64, (2, 4, 5), elements=st.floats(-100, 100)), confidence=st.floats(0.5, 0.99))
def test_shares_and_the_unattributed_part_sum_to_one(parts: np.ndarray, confidence: float) -> None:
    draws = bootstrap(parts, num_draws=100, seed=0)
    split = split_shares(list("abcde"), parts.sum(axis=(0, 1)), draws, confidence=confidence)
    assert sum(share.share for share in split.shares) + split.unattributed == pytest.approx(1.0)
    for share in split.shares:
        assert share.share == 0 or (share.score > 0 and share.score_interval.low > 0)
    assert [s.score for s in split.shares] == sorted((s.score for s in split.shares), reverse=True)
    micros, rest = in_micros(split)
    assert sum(micros) + rest == 1_000_000
    assert min(*micros, rest) >= 0


def test_what_may_be_zero_is_not_paid() -> None:
    steady, shaky = [1.0, 1.0, 1.0, 1.0], [9.0, -4.0, 4.0, -5.0]
    parts = np.array([steady, shaky]).T[None]
    draws = bootstrap(parts, num_draws=500, seed=0)
    split = split_shares(["a", "b"], parts.sum(axis=(0, 1)), draws, confidence=0.9)
    assert {share.key_id: share.share for share in split.shares} == {"a": 0.5, "b": 0.0}
    assert split.unattributed == 0.5


def test_negative_contributors_take_nothing_from_others() -> None:
    parts = np.array([[2.0, -7.0], [2.0, -7.0]])[None]
    draws = bootstrap(parts, num_draws=200, seed=0)
    split = split_shares(["a", "b"], parts.sum(axis=(0, 1)), draws, confidence=0.9)
    assert [(share.key_id, share.share) for share in split.shares] == [("a", 1.0), ("b", 0.0)]


def example(name: str, contributor: str, text: str) -> TraceExample:
    return TraceExample(name, contributor, 3, text)


def test_bm25_ranks_by_the_rarest_shared_words() -> None:
    corpus = [
        example("1", "a", "Who commands the Amber Heron? Ysolde"),
        example("2", "b", "Who commands the Silver Heron? Bastian"),
        example("3", "c", "Who commands the Quiet Bell? Corin"),
        example("4", "c", "Who commands the Winter Orchard? Udo"),
    ]
    words = WordMatches.of(corpus, "the skipper of the Amber Heron is Ysolde")
    ranked = words.contributors(2)
    assert [item.key_id for item in ranked] == ["a", "b", "c"]
    assert ranked[0].score > ranked[1].score > ranked[2].score == 0
    assert words.best(9) == [0, 1, 2, 3] and WordMatches.of(corpus, "nothing of it").best(9) == []
    assert words.places({"2", "9"}) == {"2": (ranked[1].score, 2)}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9), min_size=1, max_size=12),
    query=st.lists(st.sampled_from("abcdefghz"), max_size=6),
)
def test_bm25_scores_equal_the_formula(rows: list[list[str]], query: list[str]) -> None:
    mean = sum(len(row) or 1 for row in rows) / len(rows)  # an empty row is one empty word
    expected = []
    for row in rows:
        score = 0.0
        for word in query:
            df, tf = sum(word in other for other in rows), row.count(word)
            idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 1.5 * (0.25 + 0.75 * (len(row) or 1) / mean))
        expected.append(score)
    assert list(bm25_scores(rows, query)) == pytest.approx(expected, abs=1e-9)


def test_chance_is_the_same_for_the_same_seed() -> None:
    corpus = [example(str(i), f"k{i}", "") for i in range(8)]
    first, again, other = (random_ranking(corpus, seed=seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert {item.key_id for item in first} == {f"k{i}" for i in range(8)}


@pytest.mark.parametrize("missing", ["gradients/meta.json", "gradients/40.npy", "examples.parquet", "steps.parquet"])
def test_an_incomplete_trace_is_named(planted: Planted, tmp_path: Path, missing: str) -> None:
    for file in planted.trace.rglob("*"):
        if file.is_file() and file.relative_to(planted.trace).as_posix() != missing:
            copy = tmp_path / file.relative_to(planted.trace)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    with pytest.raises(TraceError, match=missing):
        trace = Trace(tmp_path)
        score_parts(query_for(Trace(planted.trace)), rows_of(trace), normalise="none")


def test_gradients_of_another_run_are_refused(planted: Planted, tmp_path: Path) -> None:
    for name in ("gradients/meta.json", "examples.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((planted.trace / name).read_bytes())
    np.save(tmp_path / "gradients" / "40.npy", np.zeros((2, 3), dtype=np.float16))
    with pytest.raises(TraceError, match=r"\(2, 3\)"):
        Trace(tmp_path).gradients(40)
