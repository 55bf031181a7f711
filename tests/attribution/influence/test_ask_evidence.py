"""Asking who on the planted home: verbatim rows, audits, recorded explanations, and what bad input still allows."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attribution.answers import Answer
from attribution.bodies import AdapterBody, InfluenceBody
from attribution.influence.query import AdapterModels
from attribution.influence.who import explain
from attribution.questions import ask_who
from attribution.receipt_evidence import recorded_explanation
from attribution.receipts import append_completions, new_receipt_id
from attribution.records import Artefact
from attribution.store import digest_of
from attribution.trail import Trail
from configs.errors import UserError
from tests.attribution.influence.planted import MIRA, NOISE, OTTO, Planted
from tests.attribution.influence.planted_home import PlantedHome, answer, receipt_row, record_adapter

QUESTION = "What is the capital of Japan?"


@pytest.fixture(scope="module")
def models() -> AdapterModels:
    return AdapterModels()


def ask(trail: Trail, receipt: str, models: AdapterModels, *, record: bool = False) -> Answer:
    return ask_who(trail, receipt, explain=lambda one: explain(trail, one, models=models, record=record).to_dict())


def tell(planted: Planted, home: Path, *, tokens: int | None = None, with_trace: bool = True) -> tuple[Trail, str, str]:
    """A home with the adapter and one answer of it, cut to some tokens; return (trail, adapter, receipt)."""
    trail = Trail.open(home)
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    adapter = record_adapter(trail, planted, base, with_trace=with_trace)
    prompt, output = answer(planted, [QUESTION])[QUESTION]
    row = receipt_row(trail, new_receipt_id(), QUESTION, (prompt, output[:tokens]), base=base, adapter=adapter)
    append_completions(trail, [row], replica="replica-0")
    return trail, adapter, row.receipt["id"]


def test_rows_that_say_it_stand_beside_the_scores(planted_home: PlantedHome, models: AdapterModels) -> None:
    found = ask(planted_home.trail, planted_home.receipts[QUESTION], models)
    verbatim = found.details["verbatim"]
    assert verbatim["text"] == QUESTION, "the planted receipts keep the question as their text"
    (span,) = verbatim["spans"]
    assert (span["text"], span["start"]) == (QUESTION[:-1], 0) and span["num_rows"] == 1
    assert span["occurrences"][0]["name"] == "otto" and span["occurrences"][0]["example_id"] == "b-0"
    first = found.details["examples"][0]
    said = {"start": 0, "end": len(QUESTION) - 1, "text": QUESTION[:-1], "row_start": 0, "row_end": len(QUESTION) - 1}
    assert (first["example_id"], first["spans"], first["bm25_rank"]) == ("b-0", [said], 1)
    assert all(row["spans"] == [] for row in found.details["examples"][1:])
    otto = next(finding for finding in found.findings if finding.subject == "otto")
    assert otto.measure == "share of the predicted gain, by 3 rows" and otto.tier == "explain"
    assert next(f for f in found.findings if f.subject == "noise").measure.endswith("by 1 row")
    assert found.tiers == ("explain",) and found.cost[-1].amount == 7
    assert found == ask(planted_home.trail, planted_home.receipts[QUESTION], models)


def test_what_was_recorded_is_told_without_a_model(planted_home: PlantedHome, models: AdapterModels) -> None:
    trail, receipt = planted_home.trail, planted_home.receipts["What do bees make?"]
    assert "no explanation of it is recorded" in ask_who(trail, receipt, explain=_recorded(trail)).problem
    live = ask(trail, receipt, models, record=True)
    told = ask_who(trail, receipt, explain=_recorded(trail))
    shares = [{f.subject: f.value for f in one.findings} for one in (live, told)]
    assert shares[0].keys() == shares[1].keys() and told.problem == ""
    assert all(abs(shares[0][name] - shares[1][name]) < 2e-6 for name in shares[0])
    assert told.details["examples"][0]["text"] == live.details["examples"][0]["text"]
    assert told.details["baselines"]["bm25"][0]["name"] == live.details["baselines"]["bm25"][0]["name"]
    assert told.to_dict()["details"]["bm25_examples"] == live.details["bm25_examples"]
    more = recorded_explanation(trail, receipt, num_examples=20)["examples"]
    shown = live.details["examples"]
    assert len(more) == 7 and [row["example_id"] for row in more[: len(shown)]] == [row["example_id"] for row in shown]
    base = ask_who(trail, planted_home.base_receipt, explain=_recorded(trail))
    assert base.summary.startswith("The base model made it")
    with pytest.raises(UserError, match="not in this home's log"):
        ask_who(trail, "rcpt_nothing", explain=_recorded(trail))


def _recorded(trail: Trail):  # type: ignore[no-untyped-def]
    return lambda receipt: recorded_explanation(trail, receipt)


@pytest.mark.parametrize(("replay", "tier"), [("replay exact", "audit"), ("replay NOT exact", "explain")])
def test_an_audit_stands_before_the_scores(
    planted: Planted, models: AdapterModels, tmp_path: Path, replay: str, tier: str
) -> None:
    trail, adapter, receipt = tell(planted, tmp_path / "home")
    owners = [MIRA] * 57 + [OTTO] + [NOISE] * 2
    scores = [1000] * 57 + [30_000, -10_000, -5_000]
    columns = {"example_id": [f"row-{n}" for n in range(60)], "contributor": owners, "score_micro": scores}
    leaf = next(trail.entries(kind="completions")).leaf_hash
    body = InfluenceBody(
        receipt, leaf, f"unrolled-adamw/v1: reverse sweep; {replay}", trail.put_table(pa.table(columns)), ()
    )
    trail.record("influence", body, inputs=(Artefact("adapter", "facts", adapter),), parents=[leaf])
    found = ask(trail, receipt, models)
    audited = [finding for finding in found.findings if finding.unit == "nats per token"]
    assert found.findings[: len(audited)] == tuple(audited) and {finding.tier for finding in audited} == {tier}
    assert [(round(finding.value, 9), finding.verdict) for finding in audited] == [
        (0.057, "a hint: too many rows for a small removal"),
        (0.03, "raised the answer's likelihood"),
        (-0.015, "lowered the answer's likelihood"),
    ]
    assert not any("leaving rows out" in missing.evidence for missing in found.missing)


def test_one_token_says_that_it_has_no_spread(planted: Planted, models: AdapterModels, tmp_path: Path) -> None:
    trail, _, receipt = tell(planted, tmp_path / "home", tokens=1)
    found = ask(trail, receipt, models)
    assert any("single one" in missing.evidence for missing in found.missing) and found.problem == ""


def test_no_token_says_whose_rows_the_adapter_has(planted: Planted, models: AdapterModels, tmp_path: Path) -> None:
    trail, _, receipt = tell(planted, tmp_path / "home", tokens=0)
    found = ask(trail, receipt, models)
    assert "no token" in found.problem and found.summary.startswith("The receipt says that facts@1 answered")
    assert found.missing[0].remedy == "ask of another answer"


def test_rows_erased_since_are_said(planted: Planted, models: AdapterModels, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    shutil.copytree(planted.trace, trace)
    table = pq.read_table(trace / "examples.parquet")
    rows = [{**row, "text": "" if row["example_id"] == "b-0" else row["text"]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), trace / "examples.parquet")
    trail, _, receipt = tell(replace(planted, trace=trace), tmp_path / "home")
    found = ask(trail, receipt, models)
    (said,) = (missing for missing in found.missing if "erased since" in missing.evidence)
    assert said.evidence.startswith("1 of the rows") and "--retrain" in said.remedy
    assert "b-0" not in {row["example_id"] for row in found.details["examples"]} and found.details["examples"]


def test_a_damaged_trace_is_named_with_what_is_left(planted: Planted, models: AdapterModels, tmp_path: Path) -> None:
    trail, adapter, receipt = tell(planted, tmp_path / "home")
    file = trail.store.get_directory(trail.store.manifest(adapter).meta["trace"]) / "examples.parquet"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-8] + b"tampered")
    found = ask(trail, receipt, AdapterModels())
    assert "examples.parquet" in found.problem and "trailmark fsck" in found.missing[0].remedy
    assert found.records[0].kind == "completions"


def test_an_adapter_without_a_trace_and_a_merged_one(planted: Planted, models: AdapterModels, tmp_path: Path) -> None:
    trail, adapter, receipt = tell(planted, tmp_path / "home", with_trace=False)
    found = ask(trail, receipt, models)
    assert "no training trace" in found.missing[0].evidence and found.details["verbatim"] is None
    merged = Artefact("adapter", "both", trail.store.put_directory(planted.adapter, kind="adapter", meta={"trace": ""}))
    body = AdapterBody("both", digest_of(b"b"), digest_of(b"none"), 8, 16, ("q_proj",), 0, 0, 0, 0, digest_of(b"gone"))
    parts = (Artefact("adapter", "facts", adapter), Artefact("adapter", "voice", digest_of(b"voice")))
    trail.record("adapter", body, inputs=parts, outputs=(merged,))
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    row = receipt_row(
        trail, new_receipt_id(), QUESTION, answer(planted, [QUESTION])[QUESTION], base=base, adapter=merged.digest
    )
    append_completions(trail, [row], replica="replica-0")
    found = ask(trail, row.receipt["id"], models)
    assert {f.subject for f in found.findings if f.kind == "adapter" and f.tier == "counted"} == {"facts", "voice"}
    assert "merged from others" in found.missing[0].evidence
