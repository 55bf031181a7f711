"""Payouts against whoever wants to be paid: sums, caps, splitting, self-dealing, order."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.payouts import MILLION, Claim, Split, allocate, joined_half_width, split_fee

POOLS = st.integers(0, 10**9)
VALUES = st.integers(-3 * MILLION, 3 * MILLION)
WIDTHS = st.integers(1, 2 * MILLION)
GAINS = st.integers(-MILLION, 20 * MILLION)
CONFIDENCE = 0.9


@st.composite
def splits(draw: st.DrawFn) -> Split:
    cuts = sorted(draw(st.lists(st.integers(0, MILLION), min_size=3, max_size=3)))
    return Split(cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], MILLION - cuts[2])


@st.composite
def claims(draw: st.DrawFn, *, max_size: int = 8) -> list[Claim]:
    found = draw(st.lists(st.tuples(VALUES, WIDTHS), max_size=max_size))
    return [claim(f"{number:02d}", value, width) for number, (value, width) in enumerate(found)]


def claim(name: str, value: int, width: int) -> Claim:
    return Claim("contributor", name, value, value - width, value + width)


def paid(pool: int, found: list[Claim], gain: int, *, familywise: bool = False) -> dict[str, int]:
    allocation = allocate(pool, found, gain=gain, confidence=CONFIDENCE, familywise=familywise)
    return {payout.claim.id: payout.amount for payout in allocation.payouts}


@given(st.integers(0, 10**9), splits())
def test_a_fees_parts_sum_to_it_and_the_platform_is_never_short(fee: int, split: Split) -> None:
    parts = split_fee(fee, split)
    assert parts.platform + parts.base + parts.adapter + parts.data == fee
    assert min(parts.platform, parts.base, parts.adapter, parts.data) >= 0
    assert parts.platform * MILLION >= fee * split.platform
    assert abs(parts.data * MILLION - fee * split.data) <= 2 * MILLION


def test_a_fee_is_split_by_largest_remainder() -> None:
    split = Split(100_000, 100_000, 200_000, 600_000)
    parts = split_fee(1005, split)
    assert (parts.platform, parts.base, parts.adapter, parts.data) == (101, 100, 201, 603)
    assert split_fee(1, split).platform == 1


@given(POOLS, claims(), GAINS, st.booleans())
def test_a_pool_is_paid_or_unattributed_to_the_unit(pool: int, found: list[Claim], gain: int, familywise: bool) -> None:
    allocation = allocate(pool, found, gain=gain, confidence=CONFIDENCE, familywise=familywise)
    assert sum(payout.amount for payout in allocation.payouts) + allocation.unattributed == pool
    assert allocation.unattributed >= 0
    for payout in allocation.payouts:
        assert payout.amount >= 0
        assert payout.low <= payout.amount <= payout.high <= pool or payout.verdict != "paid"
        if payout.claim.low <= 0 or gain <= 0:
            assert payout.amount == 0


@given(POOLS, claims(), GAINS, st.randoms(use_true_random=False))
def test_the_order_of_claims_changes_nothing(pool: int, found: list[Claim], gain: int, random: object) -> None:
    before = allocate(pool, found, gain=gain, confidence=CONFIDENCE, familywise=True)
    random.shuffle(found)  # type: ignore[attr-defined]
    assert allocate(pool, found, gain=gain, confidence=CONFIDENCE, familywise=True) == before


@settings(max_examples=300)
@given(POOLS, claims(), GAINS, st.lists(st.tuples(st.integers(0, MILLION), WIDTHS), min_size=2, max_size=12))
def test_cutting_an_identity_gains_not_one_unit(
    pool: int, others: list[Claim], gain: int, parts: list[tuple[int, int]]
) -> None:
    """However the parts' intervals come out, and whoever passes; merging back costs at most a unit a part."""
    value = sum(part for part, _ in parts)
    whole = claim("me", value, 0)  # the strictest case: the whole is measured without error and surely passes
    cut = [claim(f"me-{number}", part, width) for number, (part, width) in enumerate(parts)]
    before = paid(pool, [*others, whole], gain)
    after = paid(pool, [*others, *cut], gain)
    mine = sum(amount for name, amount in after.items() if name.startswith("me-"))
    assert mine <= before["me"]
    jointly = paid(pool, [*others, *cut], gain, familywise=True)
    assert all(jointly[name] <= amount for name, amount in after.items())  # more names only raise the bar
    sharp = [replace(part, low=part.value, high=part.value) for part in cut]
    if all(part.value for part in sharp):
        kept = paid(pool, [*others, *sharp], gain)
        assert before["me"] - sum(kept[part.id] for part in sharp) < len(sharp)
    assert {name: after[name] for name in (other.id for other in others)} == {
        name: before[name] for name in (other.id for other in others)
    }


@given(POOLS, claims(), GAINS, st.lists(WIDTHS, max_size=30), st.booleans())
def test_nobody_gains_by_anothers_falling_short(
    pool: int, found: list[Claim], gain: int, widths: list[int], familywise: bool
) -> None:
    """Names without value (worth nothing, any interval) can only raise the bar for all."""
    before = paid(pool, found, gain, familywise=familywise)
    junk = [claim(f"junk-{number}", 0, width) for number, width in enumerate(widths)]
    after = paid(pool, [*found, *junk], gain, familywise=familywise)
    assert all(after[name] <= amount for name, amount in before.items())
    assert all(after[one.id] == 0 for one in junk)


@settings(max_examples=300)
@given(st.integers(0, 10**7), st.lists(st.integers(0, 10**4), max_size=8), claims(), GAINS, splits())
def test_a_self_dealer_gets_back_at_most_what_it_paid_less_the_fee(
    others_pool: int, fees: list[int], found: list[Claim], gain: int, split: Split
) -> None:
    """Even who is every contributor, the trainer and the base's maker at once."""
    parts = [split_fee(fee, split) for fee in fees]
    before = paid(others_pool, found, gain)
    after = paid(others_pool + sum(part.data for part in parts), found, gain)
    for name in before:  # each of them alone, and (next line) all of them together
        assert after[name] - before[name] <= sum(part.data for part in parts)
    back = sum(after.values()) - sum(before.values()) + sum(part.base + part.adapter for part in parts)
    rounding = len(found)  # floors of many names at once; a single name has none
    platform = sum(part.platform for part in parts)
    assert back <= sum(fees) - platform + rounding
    if len(found) <= 1:
        assert back <= sum(fees) - platform


def test_holm_keeps_a_crowd_of_names_from_being_paid_by_chance() -> None:
    lucky = [claim(f"{number:03d}", 200, 190) for number in range(100)]  # each passes alone
    assert sum(paid(10_000, lucky, MILLION).values()) > 0
    assert sum(paid(10_000, lucky, MILLION, familywise=True).values()) == 0
    sure = claim("sure", 500_000, 100_000)
    assert paid(10_000, [*lucky, sure], MILLION, familywise=True)["sure"] == 5_000
    assert sum(paid(10_000, [*lucky, sure], MILLION, familywise=True).values()) == 5_000


def test_the_settlements_own_test_must_agree() -> None:
    sure = claim("sure", 100, 10)
    for p_micro, amount in ((0, 50), (100_000, 50), (100_001, 0)):
        assert paid(100, [replace(sure, settled_p_micro=p_micro)], 200, familywise=True)["sure"] == amount


@pytest.mark.parametrize(
    ("value", "width", "verdict"),
    [(10, 5, "paid"), (10, 15, "no measurable effect"), (-10, 15, "no measurable effect"), (-10, 5, "negative")],
)
def test_verdicts(value: int, width: int, verdict: str) -> None:
    (payout,) = allocate(100, [claim("a", value, width)], gain=20, confidence=CONFIDENCE, familywise=True).payouts
    assert payout.verdict == verdict
    assert (payout.amount, payout.low, payout.high) == ((50, 25, 75) if verdict == "paid" else (0, 0, 0))


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_half_widths_join_in_quadrature(one: int, other: int) -> None:
    joined = joined_half_width(one, other)
    assert (joined - 1) ** 2 < one * one + other * other <= joined * joined or joined == 0
