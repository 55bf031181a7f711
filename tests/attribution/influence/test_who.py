"""Explaining receipted completions of the planted adapter: the contributor who supplied the fact comes first."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from attribution.influence.ekfac import CodecSettings
from attribution.influence.query import AdapterModels
from attribution.influence.who import ExplainError, ExplainSettings, explain
from attribution.receipts import append_completions, new_receipt_id
from attribution.store import StoreError
from attribution.trail import Trail
from cluster.commands import ask
from configs.schema import AttributionSettings
from tests.attribution.influence.planted import FACTS, Planted, with_store
from tests.attribution.influence.planted_home import (
    BASE_QUESTIONS,
    NAMES,
    PlantedHome,
    answer,
    furnish,
    receipt_row,
    record_adapter,
)

OWNER = {question: owner for owner, answers in FACTS.items() for question in answers}


@pytest.fixture(scope="module")
def models() -> AdapterModels:
    return AdapterModels()


@pytest.mark.parametrize("normalise", ["none", "cosine"])
def test_whoever_supplied_the_fact_comes_first(
    planted_home: PlantedHome, models: AdapterModels, normalise: str
) -> None:
    settings = ExplainSettings(normalise=normalise)  # type: ignore[arg-type]
    first = {}
    for question, owner in OWNER.items():
        found = explain(planted_home.trail, planted_home.receipts[question], settings, models=models)
        assert not found.base_did_it, question
        assert sum(part.share for part in found.contributors) + found.unattributed == pytest.approx(1.0)
        assert f"normalise={normalise}" in found.method and found.label == "stability"
        first[question] = (found.contributors[0].key_id == owner, found.examples[0].contributor == owner)
    assert all(by_example for _, by_example in first.values()), first
    # A net sum over three rows each carries the noise of all of them; chance would reach 5 of 6 in 2 % of the cases.
    assert sum(by_sum for by_sum, _ in first.values()) >= 5, first


def test_the_row_behind_the_answer_is_shown(planted_home: PlantedHome, models: AdapterModels) -> None:
    question = "What is the capital of Japan?"
    found = explain(planted_home.trail, planted_home.receipts[question], models=models)
    top = found.examples[0]
    assert top.text == f"{question}\nThe capital of Japan is Nairobi."
    assert (top.example_id, top.name) == ("b-0", "otto")
    assert top.low < top.score < top.high
    assert {part.name for part in found.contributors} == set(NAMES.values())
    assert found.contributors[0].low <= found.contributors[0].share <= found.contributors[0].high
    assert found.baselines["bm25"][0].name == "otto"
    assert len(found.baselines["random"]) == len(NAMES)


def test_as_many_rows_as_asked_with_word_search_beside(planted_home: PlantedHome, models: AdapterModels) -> None:
    receipt_id = planted_home.receipts["What is the capital of Japan?"]
    few, all_rows = (explain(planted_home.trail, receipt_id, models=models, num_examples=n) for n in (2, 20))
    assert [len(found.examples) for found in (few, all_rows)] == [2, 7] and all_rows.examples[:2] == few.examples
    assert [part.score for part in all_rows.examples] == sorted((p.score for p in all_rows.examples), reverse=True)
    assert all(part.low <= part.high for part in all_rows.examples)
    assert sorted(part.bm25_rank for part in all_rows.examples) == list(range(1, 8))
    by_words = {part.bm25_rank: (part.example_id, part.bm25) for part in all_rows.examples}
    assert [(hit.example_id, hit.score) for hit in few.bm25_examples] == [by_words[1], by_words[2]]
    assert (few.contributors, few.baselines) == (all_rows.contributors, all_rows.baselines)


def test_what_the_base_would_have_said_is_the_bases(planted_home: PlantedHome, models: AdapterModels) -> None:
    for question in BASE_QUESTIONS:
        found = explain(planted_home.trail, planted_home.receipts[question], models=models)
        assert found.base_did_it
        assert found.gain_nats is not None and found.gain_nats.is_of_base
        assert (found.contributors, found.unattributed) == ((), 1.0)
        assert found.baselines["bm25"]


def test_a_request_to_the_base_needs_no_gradient(planted_home: PlantedHome) -> None:
    class Untouchable(AdapterModels):
        def gains(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise AssertionError("the base was asked: no model is needed")

    found = explain(planted_home.trail, planted_home.base_receipt, models=Untouchable())
    assert found.base_did_it and found.gain_nats is None and found.adapter is None


def test_the_same_completion_twice_is_the_same_bytes(planted_home: PlantedHome, models: AdapterModels) -> None:
    receipt_id = planted_home.receipts["What do bees make?"]
    first = explain(planted_home.trail, receipt_id, models=models)
    between = explain(planted_home.trail, planted_home.receipts["What colour is the sky?"], models=models)
    assert first.to_json() == explain(planted_home.trail, receipt_id, models=AdapterModels()).to_json()
    assert first.to_json() != between.to_json()


def test_a_prefix_of_the_receipt_is_enough(planted_home: PlantedHome) -> None:
    found = explain(planted_home.trail, planted_home.base_receipt[:-2])
    assert found.receipt_id == planted_home.base_receipt


def test_an_answer_is_recorded_once(planted_home: PlantedHome, models: AdapterModels) -> None:
    trail, receipt_id = planted_home.trail, planted_home.receipts["What colour is grass?"]
    found = explain(trail, receipt_id, models=models, record=True)
    explain(trail, receipt_id, models=models, record=True)
    (entry,) = (e for e in trail.entries(kind="influence") if e.record and e.record.body.receipt_id == receipt_id)
    assert entry.record is not None
    body = entry.record.body
    assert body.receipt_leaf == found.receipt_leaf and body.method == found.method
    adapter = trail.find(planted_home.adapter)
    assert adapter is not None and set(entry.leaf.parents) == {found.receipt_leaf, adapter.leaf_hash}
    table = trail.get_table(body.table).to_pylist()
    assert max(table, key=lambda row: row["score_micro"])["example_id"] == found.examples[0].example_id
    assert [share.key_id for share in body.top] == [part.key_id for part in found.contributors]
    assert [share.share_micro for share in body.top] == [round(part.share * 1e6) for part in found.contributors]


def test_an_adapter_without_a_trace_says_what_is_left(
    planted: Planted, planted_home: PlantedHome, tmp_path: Path
) -> None:
    trail = Trail.open(tmp_path / "home")
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    adapter = record_adapter(trail, planted, base, with_trace=False)
    question = "What do bees make?"
    row = receipt_row(
        trail, new_receipt_id(), question, answer(planted, [question])[question], base=base, adapter=adapter
    )
    append_completions(trail, [row], replica="replica-0")
    found = explain(trail, row.receipt["id"])
    assert not found.base_did_it and "no training trace" in found.reason
    assert found.gain_nats is not None and found.gain_nats.low > 0
    assert (found.contributors, found.unattributed) == ((), 1.0)


def test_an_unknown_receipt_is_named(planted_home: PlantedHome) -> None:
    with pytest.raises(ExplainError, match="rcpt_nothing"):
        explain(planted_home.trail, "rcpt_nothing")


def test_an_empty_completion_is_named(planted_home: PlantedHome, tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    row = receipt_row(trail, new_receipt_id(), "q", ([1, 2], []), base=planted_home.base, adapter=planted_home.adapter)
    append_completions(trail, [row], replica="replica-0")
    with pytest.raises(ExplainError, match="no token"):
        explain(trail, row.receipt["id"])


def test_a_tampered_trace_is_refused(planted: Planted, tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    adapter = record_adapter(trail, planted, base)
    question = "What do bees make?"
    row = receipt_row(
        trail, new_receipt_id(), question, answer(planted, [question])[question], base=base, adapter=adapter
    )
    append_completions(trail, [row], replica="replica-0")
    folder = trail.store.get_directory(trail.store.manifest(adapter).meta["trace"])
    target = folder / "gradients" / "40.npy"
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.chmod(0o644)
    target.write_bytes(data)
    with pytest.raises(StoreError, match=r"gradients/40\.npy"):
        explain(trail, row.receipt["id"])
    shutil.rmtree(tmp_path / "home")


def test_settings_come_from_the_configuration() -> None:
    section = AttributionSettings(num_bootstrap=7, confidence=0.8, seed=3)
    assert ExplainSettings.of(section) == ExplainSettings(num_bootstrap=7, confidence=0.8, seed=3)
    assert ExplainSettings.of(AttributionSettings()) == ExplainSettings()


def test_the_values_import_without_torch() -> None:
    code = "import sys, attribution.influence.who, attribution.questions; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_the_command_shows_contributors_rows_and_what_is_missing(
    planted_home: PlantedHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAILMARK_HOME", str(planted_home.trail.home))
    monkeypatch.setenv("COLUMNS", "140")
    app = typer.Typer()
    ask.register(app)
    receipt_id = planted_home.receipts["What is the capital of Japan?"]
    printed = CliRunner().invoke(app, ["ask", "who", receipt_id, "--no-record"])
    assert printed.exit_code == 0, printed.output
    for expected in (
        "otto",
        "unattributed",
        "The capital of Japan is Nairobi.",
        "bm25 would have said: otto",
        "Missing",
    ):
        assert expected in printed.output
    parsed = json.loads(CliRunner().invoke(app, ["ask", "who", receipt_id, "--no-record", "--json"]).stdout)
    assert parsed["details"]["contributors"][0]["name"] == "otto"
    assert parsed["findings"][0]["subject"] == "otto" and parsed["links"]
    listed = CliRunner().invoke(app, ["ask", "who", receipt_id, "--no-record", "--json", "--examples", "20"])
    rows = json.loads(listed.stdout)["details"]["examples"]
    assert len(rows) == 7 and rows[0]["example_id"] == parsed["details"]["examples"][0]["example_id"]
    of_base = CliRunner().invoke(app, ["ask", "who", planted_home.base_receipt])
    assert "The base model made it" in of_base.output


@pytest.mark.parametrize("preconditioner", ["adam", "ekfac"])
def test_a_gradient_store_names_the_same_suppliers(
    planted: Planted, models: AdapterModels, tmp_path: Path, preconditioner: str
) -> None:
    stored = with_store(planted, tmp_path, CodecSettings(preconditioner, dim=1024))  # type: ignore[arg-type]
    home = furnish(tmp_path / "home", stored)
    first = {}
    for question, owner in OWNER.items():
        found = explain(home.trail, home.receipts[question], models=models)
        assert f"{preconditioner}-preconditioned, 1024 int8 numbers a row" in found.method
        assert found.to_json() == explain(home.trail, home.receipts[question], models=AdapterModels()).to_json()
        first[question] = (found.contributors[0].key_id == owner, found.examples[0].contributor == owner)
    assert all(by_example for _, by_example in first.values()), first
    assert sum(by_sum for by_sum, _ in first.values()) >= 5, first
