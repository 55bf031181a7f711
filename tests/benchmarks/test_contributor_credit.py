"""The benchmark of contributor credit at toy size: with every coalition it is exact, and it tells what it compares."""

import json
from pathlib import Path

import numpy as np
import pytest

from attribution.exact_values import exact_banzhaf
from benchmarks import contributor_credit as program
from benchmarks.attribution.facts import Size
from benchmarks.attribution.lab import SETTINGS, Lab, LabSettings

TOY = LabSettings(
    size=Size(num_people=12, num_rows=16, num_queries=30),
    train=SETTINGS.model_copy(update={"epochs": 2, "batch_size": 8}),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(TOY, seed=0, folder=tmp_path_factory.mktemp("lab"))


def test_the_program_measures_what_it_says(lab: Lab, tmp_path: Path) -> None:
    draws = program.plan_draws(0, num_queries=30, num_draws=2)
    assert program.digest_of(lab, draws) == program.digest_of(lab, draws) != program.digest_of(lab, draws[:1])
    result = program.measure(lab, draws, cache=tmp_path, utility="likelihood")
    logs, _ = program.train_all(lab, cache=tmp_path)  # from the cache: the files are all there
    utilities = np.exp(logs)
    np.testing.assert_allclose(exact_banzhaf(utilities).mean(axis=1).round(5), result.exact_means)
    np.testing.assert_allclose(program.settle_pairs(utilities, 0, 256).cells, exact_banzhaf(utilities), atol=1e-9)
    assert utilities[0].tolist() != utilities[-1].tolist() and utilities.shape == (256, 30)
    program.print_tables([result])
    held = program.floors([result])
    assert len(held) == 4 and all(0 <= one["value"] <= 1 for one in held)
    written = json.loads(json.dumps(program._to_json([result], held, form="quick", utility="likelihood")))
    assert written["seeds"][0]["sha256"] == program.digest_of(lab, draws)
