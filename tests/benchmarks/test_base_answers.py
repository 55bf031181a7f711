"""The benchmark of base answers at toy size, its bounds against known ones, and what it fixes before it scores."""

from pathlib import Path

import pytest

from benchmarks.base_answers import Asked, fingerprint_of, measure, plan, queries_of, rate_of, rows_of, summary


def answered(credited: int, total: int) -> list[Asked]:
    return [Asked("near", 0, "known", "q", True, number < credited, 0.0) for number in range(total)]


def test_adapters_are_asked_what_the_base_knows_and_what_they_learnt(tiny_base: Path, tmp_path: Path) -> None:
    asked = measure(tmp_path, [("near", 3), ("far", 4)], base=tiny_base)
    of_base = [one for one in asked if one.is_base]
    # Training on other facts moves some of what the base knows; which, differs from processor to processor.
    assert len(asked) == sum(len(queries_of(style)) for style in ("near", "far")) and of_base
    facts = [one for one in asked if one.kind == "fact"]
    assert sum(not one.is_base and one.gain > 0.5 for one in facts) > len(facts) / 2
    figures = summary(asked)
    learnt = sum(not one.is_base for one in facts)
    assert (figures["base"].total, figures["adapter"].total) == (len(of_base), learnt)
    assert figures["base"].rate <= 0.1 < figures["adapter"].rate


@pytest.mark.parametrize(
    ("credited", "total", "low", "high"), [(0, 20, 0.0, 0.1391), (1, 20, 0.00256, 0.2161), (10, 20, 0.3020, 0.6980)]
)
def test_bounds_are_clopper_and_pearsons(credited: int, total: int, low: float, high: float) -> None:
    rate = rate_of("base", answered(credited, total))
    assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_what_is_chosen_before_scoring_has_one_fingerprint() -> None:
    first, again, other = (list(plan(4, seed)) for seed in (1, 1, 2))
    assert fingerprint_of(first) == fingerprint_of(again) != fingerprint_of(other)
    assert [style for style, _ in first] == ["near", "far", "near", "far"]
    for style in ("near", "far"):
        assert len({row.contributor for row in rows_of(style)}) == 3
        assert len({row.example_id for row in rows_of(style)}) == len(rows_of(style))
