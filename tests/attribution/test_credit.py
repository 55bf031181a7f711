"""Credit against the exact values of all coalitions: estimates, the cover of their intervals, and when to stop."""

import hashlib
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.coalitions import PairDesign, near_full
from attribution.credit import RULE, Credit, CreditError, Search, least_budget, least_items, measure_credit
from attribution.evidence import NO_EFFECT
from attribution.exact_values import (
    all_coalitions,
    exact_banzhaf,
    exact_shapley,
    leave_one_out,
    msr_banzhaf,
)
from attribution.ridge import fit_ridge, scaled_prior
from attribution.significance import holm, sign_flip_p
from tests.attribution.games import TableUtility, concave_game

NUM_PLAYERS, NUM_ITEMS = 8, 24


def credit_of(utilities: np.ndarray, num_players: int = NUM_PLAYERS, **search: object) -> Credit:
    return measure_credit(TableUtility(utilities), num_players, search=Search(**search))  # type: ignore[arg-type]


def test_exact_values_are_those_of_the_definitions() -> None:
    utilities = np.random.default_rng(0).normal(size=(16, 3))
    shapley, banzhaf = np.zeros((4, 3)), np.zeros((4, 3))
    for order in permutations(range(4)):
        seen = 0
        for player in order:
            shapley[player] += (utilities[seen | 1 << player] - utilities[seen]) / 24
            seen |= 1 << player
    for player in range(4):
        for others in range(16):
            if not others >> player & 1:
                banzhaf[player] += (utilities[others | 1 << player] - utilities[others]) / 8
    np.testing.assert_allclose(exact_shapley(utilities), shapley, atol=1e-12)
    np.testing.assert_allclose(exact_banzhaf(utilities), banzhaf, atol=1e-12)
    np.testing.assert_allclose(exact_shapley(utilities).sum(axis=0), utilities[15] - utilities[0], atol=1e-12)
    np.testing.assert_allclose(msr_banzhaf(all_coalitions(4), utilities), banzhaf, atol=1e-12)


@pytest.mark.parametrize("num_players", [1, 2, 3, 5])
def test_all_coalitions_give_exact_values(num_players: int) -> None:
    utilities = concave_game(num_players, 6, noise=0.5, seed=1)
    utility = TableUtility(utilities)
    credit = measure_credit(utility, num_players, search=Search(budget=2**num_players - 1, precision=0))
    assert credit.stopped == "exact" and sorted(utility.asked) == list(range(2**num_players))
    np.testing.assert_allclose(credit.banzhaf.cells, exact_banzhaf(utilities), atol=1e-9)
    np.testing.assert_allclose(credit.leave_one_out.cells, leave_one_out(utilities), atol=1e-9)
    assert not credit.banzhaf.coalition_width.any() and (credit.banzhaf.item_width > 0).all()


def test_a_few_coalitions_come_near_and_their_intervals_cover() -> None:
    """90 % intervals of cells, and of values over items that were not asked; the floors of the benchmark, toy size."""
    correlation, of_cells, of_values, msr = [], [], [], []
    for seed in range(12):
        many = concave_game(NUM_PLAYERS, 200, noise=0.4, seed=seed)
        utilities = many[:, np.random.default_rng(seed).choice(200, NUM_ITEMS, replace=False)]
        credit = credit_of(utilities, budget=40, seed=seed, precision=0, batch=64)
        exact, found = exact_banzhaf(utilities), credit.banzhaf
        correlation.append(np.corrcoef(found.cells.ravel(), exact.ravel())[0, 1])
        of_cells.append((found.cell_low <= exact) & (exact <= found.cell_high))
        everywhere = exact_banzhaf(many).mean(axis=1)
        of_values.append((found.low <= everywhere) & (everywhere <= found.high))
        plain = msr_banzhaf(credit.coalitions, credit.utilities)
        msr.append(np.corrcoef(plain.ravel(), exact.ravel())[0, 1])
    assert np.mean(correlation) > 0.93 > np.mean(msr)
    assert 0.85 <= np.mean(of_cells) <= 0.95
    assert 0.82 <= np.mean(of_values) <= 0.97  # 96 values only


def test_fewer_pairs_than_players_still_cover() -> None:
    covered = []
    for seed in range(12):
        utilities = concave_game(12, NUM_ITEMS, noise=0.4, seed=seed)
        credit = credit_of(utilities, 12, budget=24, seed=seed, precision=0)
        assert credit.num_pairs < 12
        exact = exact_banzhaf(utilities)
        covered.append((credit.banzhaf.cell_low <= exact) & (exact <= credit.banzhaf.cell_high))
    assert 0.84 <= np.mean(covered) <= 0.97


def test_leave_one_out_is_measured_where_it_is_cheap_and_estimated_where_not() -> None:
    utilities = concave_game(10, NUM_ITEMS, noise=0.1, seed=3)
    exact = leave_one_out(utilities)
    np.testing.assert_allclose(credit_of(utilities, 10, budget=50).leave_one_out.cells, exact, atol=1e-9)
    covered, near = [], []
    for seed in range(10):
        utilities = concave_game(10, NUM_ITEMS, noise=0.1, seed=seed)
        exact = leave_one_out(utilities)
        found = credit_of(utilities, 10, budget=24, seed=seed, precision=0).leave_one_out
        covered.append((found.cell_low <= exact) & (exact <= found.cell_high))
        near.append(np.corrcoef(found.cells.ravel(), exact.ravel())[0, 1])
    assert np.mean(near) > 0.5 and 0.8 <= np.mean(covered) <= 0.99


def test_a_good_prior_helps_and_a_bad_one_does_little_harm() -> None:
    error = {"none": [], "good": [], "wrong": []}  # type: dict[str, list[float]]
    for seed in range(8):
        utilities = concave_game(12, NUM_ITEMS, noise=0.8, seed=seed)
        exact = exact_banzhaf(utilities)
        draw = np.random.default_rng(seed)
        priors = {
            "none": None,
            "good": 7 * exact + draw.normal(size=exact.shape),
            "wrong": draw.normal(size=exact.shape),
        }
        for name, prior in priors.items():
            search = Search(budget=48, seed=seed, precision=0)
            found = measure_credit(TableUtility(utilities), 12, search=search, prior=prior).banzhaf.cells
            error[name].append(float(((found - exact) ** 2).mean()))
    assert np.mean(error["good"]) < 0.9 * np.mean(error["none"])
    assert np.mean(error["wrong"]) < 1.1 * np.mean(error["none"])


def test_the_search_stops_when_intervals_are_narrow_and_never_for_a_verdict() -> None:
    utilities = concave_game(NUM_PLAYERS, NUM_ITEMS, noise=0.02, seed=0)
    wide, narrow = (credit_of(utilities, budget=200, precision=precision, batch=4) for precision in (0.05, 0.004))
    assert wide.stopped == narrow.stopped == "narrow"
    assert len(wide.coalitions) < len(narrow.coalitions) < 200
    assert credit_of(utilities, budget=30, precision=0).stopped == "budget"


def test_another_draw_or_fit_is_another_rule() -> None:
    """What RULE stands for: where this fails on purpose, count RULE up, or older settlements cannot be told apart."""
    credit = credit_of(concave_game(NUM_PLAYERS, NUM_ITEMS, noise=0.5, seed=5), budget=40, precision=0, seed=7)
    drawn = hashlib.sha256(np.packbits(credit.coalitions).tobytes()).hexdigest()[:16]
    assert (RULE, drawn, len(credit.coalitions)) == (1, "4c05680ce870d6c5", 41)
    np.testing.assert_allclose(credit.banzhaf.values[:3], [0.4870382, 0.7494578, 0.7962077], atol=1e-5)
    np.testing.assert_allclose(credit.banzhaf.low[:3], [0.2130619, 0.4717104, 0.4863846], atol=1e-5)


def test_players_without_effect_are_said_to_have_none() -> None:
    """Six players of eight do nothing; over 30 games with noise a verdict on any of them is wrong."""
    wrong, missed = 0, 0
    for seed in range(30):
        draw = np.random.default_rng(seed)
        utilities = all_coalitions(8)[:, :1] * np.ones((1, 20)) * 0.8 - all_coalitions(8)[:, 1:2] * 0.8
        utilities = utilities + 0.4 * draw.normal(size=(256, 20)) + 0.2 * draw.normal(size=(256, 1))
        credit = credit_of(utilities, budget=48, seed=seed)
        verdicts = [credit.verdict(player) for player in range(8)]
        wrong += any(verdict != NO_EFFECT for verdict in verdicts[2:])
        missed += verdicts[:2] != ["helped", "hindered"]
    assert wrong <= 6 and missed <= 3  # 10 % of 30 is 3; 7 or more have a probability of 2.6 %


def test_no_coalition_is_measured_twice_and_the_budget_holds() -> None:
    utility = TableUtility(concave_game(6, 5, noise=0.5, seed=0))
    credit = measure_credit(utility, 6, search=Search(budget=30, precision=0, batch=4))
    assert len(utility.asked) == len(set(utility.asked)) == len(credit.coalitions) <= 31
    again = measure_credit(utility, 6, search=Search(budget=30, precision=0, batch=4))
    np.testing.assert_array_equal(again.banzhaf.cells, credit.banzhaf.cells)


@pytest.mark.parametrize(("num_players", "budget", "least"), [(1, 0, 1), (3, 6, 7), (8, 10, 11), (500, 10, 11)])
def test_a_budget_too_small_is_refused_with_what_is_needed(num_players: int, budget: int, least: int) -> None:
    assert least_budget(num_players) == least
    with pytest.raises(CreditError, match=f"--budget {least} or more"):
        measure_credit(TableUtility(np.zeros((2, 2))), num_players, search=Search(budget=budget))


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(CreditError, match="1 item says nothing"):
        credit_of(np.zeros((4, 1)), 2, budget=3)
    with pytest.raises(CreditError, match="no finite value"):
        credit_of(np.full((4, 3), np.nan), 2, budget=3)
    with pytest.raises(CreditError, match="none to settle over"):
        measure_credit(TableUtility(np.zeros((1, 2))), 0, search=Search(budget=3))


def test_a_utility_that_never_changes_has_no_effect() -> None:
    credit = credit_of(np.ones((256, 4)), budget=40)
    assert not credit.banzhaf.cells.any() and (credit.p_values == 1).all()
    assert {credit.verdict(player) for player in range(8)} == {NO_EFFECT}


@settings(max_examples=30, deadline=None)
@given(num_players=st.integers(1, 16), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_pairs_are_distinct_complementary_and_evenly_spread(num_players: int, count: int, seed: int) -> None:
    design = PairDesign(num_players, seed)
    coalitions = np.concatenate([design.draw(count // 2), design.draw(count - count // 2)])
    expected = min(count, 2 ** (num_players - 1))
    assert len(design.signs) == expected and len(coalitions) == 2 * expected
    assert len({row.tobytes() for row in coalitions}) == 2 * expected
    np.testing.assert_array_equal(coalitions[::2], ~coalitions[1::2])
    assert design.is_complete == (expected == 2 ** (num_players - 1))


def test_each_coalition_of_a_pair_is_as_likely_as_any_other() -> None:
    first = np.array([PairDesign(3, seed).draw(1)[0] for seed in range(800)])
    counts = np.bincount((first * [1, 2, 4]).sum(axis=1), minlength=8)
    assert counts.min() > 65 and counts.max() < 140  # 100 expected; four standard deviations are 37


def test_pairs_are_nearly_orthogonal() -> None:
    design = PairDesign(8, 0)
    design.draw(16)
    signs = design.matrix()
    variance = np.trace(np.linalg.inv(signs.T @ signs)) / 8
    assert variance < 1.25 / 16  # 1/16 for an orthogonal design


def test_near_full_leaves_out_every_player_once() -> None:
    for num_players, count in ((7, 7), (7, 30), (23, 5), (3, 2)):
        left_out = ~near_full(num_players, count, seed=1)
        assert len(left_out) == min(num_players, count) and (left_out.sum(axis=0) == 1).all()


def test_ridge_equals_the_augmented_least_squares() -> None:
    draw = np.random.default_rng(0)
    design, outcomes, prior = draw.normal(size=(9, 5)), draw.normal(size=(9, 4)), draw.normal(size=(5, 4))
    fit = fit_ridge(design, outcomes, prior=prior, penalty=0.7)
    stacked = np.concatenate([design, np.sqrt(0.7) * np.eye(5)])
    expected = np.linalg.lstsq(stacked, np.concatenate([outcomes, np.sqrt(0.7) * prior]), rcond=None)[0]
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-10)
    np.testing.assert_allclose(fit.residuals, outcomes - design @ expected, atol=1e-10)
    hat = design @ np.linalg.inv(design.T @ design + 0.7 * np.eye(5)) @ design.T
    assert fit.residual_df == pytest.approx(9 - np.trace(hat))


def test_the_penalty_of_least_cross_validation_error_is_found() -> None:
    draw = np.random.default_rng(1)
    design = draw.choice([-1.0, 1.0], size=(24, 10))
    outcomes = design @ (draw.normal(size=(10, 3)) * 0.2) + draw.normal(size=(24, 3))

    def error(penalty: float) -> float:
        hat = design @ np.linalg.inv(design.T @ design + penalty * np.eye(10)) @ design.T
        left = outcomes - hat @ outcomes
        return float(((left**2).sum(axis=0) / (outcomes**2).sum(axis=0)).sum() / (24 - np.trace(hat)) ** 2)

    chosen = fit_ridge(design, outcomes).penalty
    assert error(chosen) <= min(error(penalty) for penalty in np.logspace(-4, 5, 60)) * 1.001


def test_a_prior_is_scaled_and_never_turned_round() -> None:
    draw = np.random.default_rng(2)
    design, truth = draw.normal(size=(12, 4)), draw.normal(size=(4, 3))
    np.testing.assert_allclose(scaled_prior(design, design @ truth, 5 * truth), truth, atol=1e-10)
    assert not scaled_prior(design, design @ truth, -truth).any()


def test_holm_and_sign_flips_against_their_definitions() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    few = np.array([[1.0, 1.0, 1.0], [3.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert sign_flip_p(few, seed=0).tolist() == pytest.approx([2 / 8, 1.0, 1.0])
    many = sign_flip_p(np.stack([np.ones(40), np.tile([1.0, -1.0], 20)]), seed=0)
    assert 0 < many[0] < 1e-3 and many[1] == 1.0


@pytest.mark.parametrize(("num_players", "confidence"), [(1, 0.9), (3, 0.9), (8, 0.95), (10, 0.5)])
def test_fewer_items_than_least_tell_nobody_from_nothing(num_players: int, confidence: float) -> None:
    def least_p(num_items: int) -> float:
        alone = sign_flip_p(np.ones((1, num_items)), seed=0)
        return float(holm(np.concatenate([alone, np.ones(num_players - 1)]))[0])

    least = least_items(num_players, confidence)
    assert least_p(least) < 1 - confidence <= least_p(least - 1)
