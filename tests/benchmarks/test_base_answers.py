"""The benchmark of base answers at toy size, its bounds against known ones, and what it fixes before it scores."""

from pathlib import Path

import pytest

from benchmarks.base_answers import Asked, Query, fingerprint_of, measure, plan, queries_of, rate_of, rows_of, summary


def answered(credited: int, total: int) -> list[Asked]:
    return [Asked("near", 0, "known", "q", True, number < credited, 0.0) for number in range(total)]


def test_one_adapter_is_asked_what_the_base_knows_and_what_it_learnt(tiny_base: Path, tmp_path: Path) -> None:
    def ask(style: str) -> list[Query]:
        queries = queries_of(style)
        known = [one for one in queries if one.kind == "known"]
        return [*known, next(one for one in queries if one.kind == "fact")]

    *known, fact = measure(tmp_path, [("far", 3)], base=tiny_base, ask=ask)
    of_base = [one for one in known if one.is_base]
    # Training on other facts moves some of what the base knows, which ones differs from processor to processor.
    assert len(known) == 12 and len(of_base) >= 3
    assert sum(one.is_credited for one in of_base) <= 1
    assert not fact.is_base and fact.gain > 0.5
    figures = summary([*known, fact])
    assert (figures["base"].total, figures["adapter"].total) == (len(of_base), 13 - len(of_base))


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
