"""The audit tier on a recorded home: effects against real removals, what is said, recorded and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from attribution.bodies import InfluenceBody
from attribution.influence.audit import AuditError, ask_of_receipt, audits_of, load_model, sweep, trace_of
from attribution.influence.query import Completion
from attribution.influence.recorded_run import KeptStates
from attribution.influence.replay import LoraRun, ReplayError
from attribution.influence.store import Trace, TraceError
from attribution.receipts import append_completions, new_receipt_id
from pipelines.audit.driver import ask_of_receipts, ask_of_suite, audit, draw_receipts
from tests.attribution.influence.planted import FACTS, MIRA, Planted
from tests.attribution.influence.planted_home import PlantedHome, furnish, receipt_row, record_adapter
from tests.attribution.influence.recorded import facts, record_run

QUESTION = next(iter(FACTS[MIRA]))


@pytest.fixture(scope="session")
def recorded(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return record_run(planted, tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="session")
def home(recorded: Planted, tmp_path_factory: pytest.TempPathFactory) -> PlantedHome:
    return furnish(tmp_path_factory.mktemp("audit-home") / "home", recorded)


@pytest.fixture(scope="session")
def run(recorded: Planted) -> LoraRun:
    return LoraRun.of_trace(Trace(recorded.trace), load_model(recorded.base, recorded.adapter))


def test_the_replay_ends_where_the_recorded_run_did(run: LoraRun, recorded: Planted) -> None:
    states = KeptStates(Trace(recorded.trace), run)
    assert len(states) == 10 and states[60].step == 60
    final = run.run()
    torch.testing.assert_close(final.weights, states[60].weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(final.exp_avg, states[60].exp_avg, atol=1e-4, rtol=0)


def test_an_audit_says_what_a_removal_does(home: PlantedHome, run: LoraRun) -> None:
    asked = ask_of_receipt(home.trail, home.receipts[QUESTION])
    report = audit(home.trail, [asked])
    (found,) = report.audits
    assert not report.refused and found.is_exact and found.label == "audit: causal for small removals"
    assert found.fidelity.share_of_move < 1e-3 and found.cpu_seconds > 0
    assert found.helped[0].contributor == MIRA and "Lima" in found.helped[0].text
    without = run.run_many(1 - torch.eye(run.num_examples))
    real = run.query_losses(without, asked.question.queries)[:, 0] - run.query_losses(run.run(), asked.question.queries)
    assert int(real.argmax()) == 0, "leaving out the fact itself hurts most"
    assert any("do not add up" in caveat for caveat in found.caveats)
    assert any("no small removal" in caveat for caveat in found.caveats), "three of seven rows are no small removal"
    assert found.loss == pytest.approx(float(run.query_losses(run.run(), asked.question.queries)[0]), abs=1e-4)


def test_an_audit_is_recorded_once_and_names_its_tier(home: PlantedHome) -> None:
    asked = ask_of_receipt(home.trail, home.receipts[QUESTION])
    first, again = (audit(home.trail, [asked]).audits[0] for _ in range(2))
    assert first.record == again.record and first.contributors == again.contributors
    entry = home.trail.entry(first.record)
    assert entry.record is not None and isinstance(entry.record.body, InfluenceBody)
    body = entry.record.body
    assert body.method.startswith("unrolled-adamw/v1") and body.receipt_id == home.receipts[QUESTION]
    assert body.top == (), "an audit names no shares"
    table = home.trail.get_table(body.table).to_pydict()
    best = int(np.argmax(table["score_micro"]))
    assert table["example_id"][best] == first.helped[0].example_id
    assert not audit(home.trail, [asked], record=False).audits[0].record


def test_a_sample_shares_sweeps_and_passes_over_what_cannot_be_audited(home: PlantedHome) -> None:
    drawn = draw_receipts(home.trail, 100, seed=0)
    assert drawn == draw_receipts(home.trail, 100, seed=0) != draw_receipts(home.trail, 100, seed=1)
    asked, refused = ask_of_receipts(home.trail, drawn)
    assert [one.question for one in refused] == [f"receipt {home.base_receipt}"]
    report = audit(home.trail, asked[:3], record=False)
    assert [found.receipt_id for found in report.audits] == [one.question.receipt_id for one in asked[:3]]
    assert {found.num_shared for found in report.audits} == {3}


def test_a_query_set_is_asked_of_an_adapter(home: PlantedHome, tmp_path: Path) -> None:
    suite = tmp_path / "facts.jsonl"
    rows = [
        {"id": str(place), "prompt": question, "expected": [answer], "reference": answer}
        for place, (question, answer) in enumerate(FACTS[MIRA].items())
    ]
    suite.write_text("\n".join(json.dumps(row) for row in rows))
    asked = ask_of_suite(home.trail, str(suite), adapter="facts@1")
    (found,) = audit(home.trail, [asked]).audits
    assert found.question == "query set facts" and not found.record
    assert found.contributors[0].key_id == MIRA
    with pytest.raises(AuditError, match="no adapter trained in this home"):
        ask_of_suite(home.trail, str(suite), adapter="sha256:" + "0" * 64)


def test_what_cannot_be_audited_is_refused_with_what_is_left(home: PlantedHome, planted: Planted) -> None:
    with pytest.raises(AuditError, match="not in this home's log"):
        ask_of_receipt(home.trail, "nothing")
    with pytest.raises(AuditError, match="base model alone"):
        ask_of_receipt(home.trail, home.base_receipt)
    empty, single = new_receipt_id(), new_receipt_id()
    prompt = list(_completion(home).prompt_token_ids)
    rows = [
        receipt_row(home.trail, name, QUESTION, (prompt, output), base=home.base, adapter=home.adapter)
        for name, output in ((empty, []), (single, [7]))
    ]
    append_completions(home.trail, rows, replica="replica-0")
    with pytest.raises(AuditError, match="no token that was predicted from another"):
        ask_of_receipt(home.trail, empty)
    (found,) = audit(home.trail, [ask_of_receipt(home.trail, single)], record=False).audits
    assert any("one token" in caveat for caveat in found.caveats)


def test_an_adapter_without_a_recorder_says_what_it_still_has(planted: Planted, tmp_path: Path) -> None:
    old = furnish(tmp_path / "home", planted)
    with pytest.raises(TraceError, match=r"without a recorder.*still rank"):
        trace_of(old.trail, old.adapter)
    bare = record_adapter(old.trail, planted, old.base, with_trace=False)
    with pytest.raises(AuditError, match="has no training trace"):
        trace_of(old.trail, bare)
    asked, _ = ask_of_receipts(old.trail, [old.receipts[QUESTION]])
    report = audit(old.trail, asked)
    assert not report.audits and "without a recorder" in report.refused[0].reason


def test_dropout_cannot_be_replayed(recorded: Planted, tmp_path: Path) -> None:
    trace = _altered(recorded, tmp_path, lora_dropout=0.1)
    with pytest.raises(ReplayError, match=r"lora_dropout=0.1, whose masks were not kept"):
        LoraRun.of_trace(trace, load_model(recorded.base, recorded.adapter))


def test_a_replay_that_diverges_is_not_called_exact(recorded: Planted, home: PlantedHome, tmp_path: Path) -> None:
    trace = _altered(recorded, tmp_path)
    final = trace.path / "checkpoints" / "60" / "adapter_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(final).items()}, final)
    swept = sweep(recorded.base, recorded.adapter, trace, [[_completion(home).encoded]])
    assert swept.fidelity.max_abs_diff == pytest.approx(1e-3, rel=0.1)
    assert swept.fidelity.drift == pytest.approx(1e-3, rel=0.1) and not swept.fidelity.is_exact
    asked = ask_of_receipt(home.trail, home.receipts[QUESTION])
    (found,) = audits_of(home.trail, [asked], trace, swept, num_top=3, record=False)
    assert found.label.startswith("not exact: the replay ends") and "NOT exact" in found.method
    assert any("1.0" in caveat and "replay diverges" in caveat for caveat in found.caveats)


def test_an_erased_row_ends_the_replay_with_a_reason(recorded: Planted, tmp_path: Path) -> None:
    trace = _altered(recorded, tmp_path)
    rows = pq.read_table(trace.path / "examples.parquet")
    columns = {name: rows.column(name).to_pylist() for name in rows.column_names}
    columns["input_ids"][2], columns["labels"][2] = [], []
    pq.write_table(pa.table(columns, schema=rows.schema), trace.path / "examples.parquet")
    with pytest.raises(TraceError, match=r"1 rows were erased since \(row 2 first\)"):
        LoraRun.of_trace(Trace(trace.path), load_model(recorded.base, recorded.adapter))


def _altered(recorded: Planted, folder: Path, **changed: object) -> Trace:
    path = folder / "trace"
    shutil.copytree(recorded.trace, path)
    (path / "run.json").write_text(json.dumps(facts(**changed)))
    return Trace(path)


def _completion(home: PlantedHome) -> Completion:
    ids, labels = ask_of_receipt(home.trail, home.receipts[QUESTION]).question.queries[0]
    num_prompt = sum(label < 0 for label in labels)
    return Completion(tuple(ids[:num_prompt]), tuple(ids[num_prompt:]))
