"""Rows behind a query set: the mean of what each query says alone, exact, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from attribution.answers import Resampling
from attribution.influence.audit import Asked, Question
from attribution.influence.ekfac import CodecSettings
from attribution.influence.gradient_store import GradientStoreError
from attribution.influence.query import AdapterModels
from attribution.influence.question import OpenStores, question_of
from attribution.influence.set_rows import rows_behind
from attribution.influence.topk import top_examples
from attribution.influence.who import subject_of
from cluster import cli
from tests.attribution.influence.planted import FACTS, Planted, with_store
from tests.attribution.influence.planted_home import PlantedHome, furnish

HOW = Resampling(num_draws=200, confidence=0.9, seed=3)


@pytest.fixture(scope="module", params=["ekfac", "adam"])
def home(request: pytest.FixtureRequest, planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> PlantedHome:
    folder = tmp_path_factory.mktemp("asked")
    return furnish(folder / "home", with_store(planted, folder, CodecSettings(request.param, dim=512)))


def asked_of(home: PlantedHome, questions: list[str]) -> Asked:
    subjects = [subject_of(home.trail, home.receipts[question]) for question in questions]
    receipt, queries = subjects[0].receipt, [one.completion.encoded for one in subjects]
    return Asked(Question("a set", queries, 1), receipt["base"], receipt["adapter"], "facts")


def test_a_set_scores_the_mean_of_what_its_queries_score_alone(home: PlantedHome) -> None:
    models, stores = AdapterModels(), OpenStores(home.trail)
    questions = [question for answers in FACTS.values() for question in answers][:4]
    found = rows_behind(home.trail, asked_of(home, questions), num_rows=1000, resampling=HOW, models=models)
    scores: dict[str, list[float]] = {}
    for question in questions:
        one = question_of(home.trail, home.receipts[question], models, stores)
        for hit in top_examples(stores.get(one.trace), one.asked, k=1000)[0]:
            scores.setdefault(hit.example_id, []).append(hit.score)
    assert len(found.rows) == found.num_rows == len(scores)
    shards = stores.get(found.trace).shards
    mean_exposure = np.concatenate([shard.weights[shard.live].sum(axis=1) for shard in shards]).mean()
    scores = {name: [score / mean_exposure for score in each] for name, each in scores.items()}
    for row in found.rows:
        assert row.score == pytest.approx(np.mean(scores[row.example_id]), abs=1e-5)
        assert row.low is not None and row.high is not None
        assert (
            min(scores[row.example_id]) - 1e-5 <= row.low <= row.score <= row.high <= max(scores[row.example_id]) + 1e-5
        )
    order = [row.score for row in found.rows]
    assert order == sorted(order, reverse=True)
    best = rows_behind(home.trail, asked_of(home, questions), num_rows=3, resampling=HOW, models=models)
    assert best.rows == found.rows[:3]


def test_one_query_has_no_interval(home: PlantedHome) -> None:
    question = next(iter(next(iter(FACTS.values()))))
    found = rows_behind(home.trail, asked_of(home, [question]), num_rows=2, resampling=HOW)
    assert found.num_queries == 1 and all(row.low is None and row.high is None for row in found.rows)


def test_a_trace_without_a_store_says_what_remains(planted: Planted, tmp_path: Path) -> None:
    home = furnish(tmp_path / "home", planted)
    question = next(iter(next(iter(FACTS.values()))))
    with pytest.raises(GradientStoreError, match="ask who"):
        rows_behind(home.trail, asked_of(home, [question]), num_rows=2, resampling=HOW)


def test_the_command_lists_the_rows_of_a_suite(
    home: PlantedHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "suite.jsonl"
    answers = next(iter(FACTS.values()))
    rows = [{"id": one, "prompt": one, "expected": [said], "reference": said} for one, said in answers.items()]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("TRAILMARK_HOME", str(home.trail.home))
    adapter = subject_of(home.trail, home.receipts[next(iter(answers))]).receipt["adapter"]
    line = ["ask", "rows", str(suite), "--adapter", adapter, "--examples", "2"]
    said = CliRunner().invoke(cli.app, [*line, "--json"])
    assert said.exit_code == 0, said.output
    value = json.loads(said.stdout)
    assert value["num_queries"] == len(answers) and len(value["rows"]) == 2 and value["rows"][0]["bm25_rank"] >= 1
    table = CliRunner().invoke(cli.app, line)
    assert table.exit_code == 0 and value["rows"][0]["example_id"] in table.output.replace("\n", "")
