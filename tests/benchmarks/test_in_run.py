"""The program at toy size: cost on the wide model, worth on a small lab, k = 1 equal to itself."""

from pathlib import Path

import numpy as np

from benchmarks import in_run
from benchmarks.attribution.banks import DROPS, plan_banks
from benchmarks.attribution.facts import Size
from benchmarks.attribution.lab import SETTINGS, Lab, LabSettings


def test_worth_and_cost_at_toy_size(tmp_path: Path) -> None:
    size = Size(num_people=4, facts_per_person=2, num_rows=24, num_queries=4)
    train = SETTINGS.model_copy(update={"rank": 2, "batch_size": 8, "epochs": 2})
    lab = Lab(LabSettings(size, train), seed=0, folder=tmp_path)
    plans = plan_banks(lab, DROPS[:2], num_subsets=6, num_orders=1)
    figures = {figure.name: figure for figure in in_run.worth(lab, plans, cache=tmp_path)}
    assert len(figures) == 2 * 2 * (2 * len(in_run.REFRESH_STEPS) - 1)
    assert all(-1 <= figure.value <= 1 for name, figure in figures.items() if ": LDS" in name)
    # Five steps: refreshed every 20 and every 40 is refreshed once.
    one, other = (figures[f"seed 0, keep-50%, sgd: LDS, k = {k}"] for k in (20, 40))
    assert one.value == other.value
    assert not np.array_equal(in_run.in_run_scores(lab, 1), in_run.in_run_scores(lab, 40))


def test_the_default_k_keeps_the_refreshes_to_their_share() -> None:
    cost = {figure.name: figure for figure in in_run.cost(num_steps=1)}
    k = next(figure.value for name, figure in cost.items() if name.startswith("default k"))
    assert k == np.ceil(in_run.COST_QUERIES / (0.07 * in_run.COST_ROWS))
    assert cost["overhead at the default k"].floor == 0.10
