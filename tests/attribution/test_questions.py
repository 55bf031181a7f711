"""The five questions on a home whose answers are known."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from attribution.bodies import (
    AdapterBody,
    BenchmarkBody,
    CompletionsBody,
    ContributorBody,
    ContributorRows,
    DatasetBody,
    InfluenceBody,
    Metric,
    PublicationBody,
    RefinementBody,
)
from attribution.evidence import TOO_FEW
from attribution.questions import (
    NO_EFFECT,
    Answer,
    Resampling,
    ask_adapter,
    ask_dataset,
    ask_improved,
    ask_value,
    ask_who,
)
from attribution.receipts import ReceiptRow, append_completions, new_receipt_id
from attribution.records import Artefact, Party
from attribution.registry import RegistryError
from attribution.store import digest_of
from attribution.trail import Trail

ANA, BEN = "a" * 64, "b" * 64
BASE, SUITE = digest_of(b"base"), digest_of(b"suite")


def digest(name: str) -> str:
    return digest_of(name.encode())


def contribute(trail: Trail, name: str, key_id: str, num_rows: int) -> str:
    body = DatasetBody(name, "CC0-1.0", "jsonl", num_rows, 0, digest(f"rows of {name}"), f"{name}.jsonl")
    outputs = (Artefact("dataset", name, body.rows),)
    return trail.record("dataset", body, outputs=outputs, contributors=(Party(key_id, "contributor"),)).leaf_hash


def refine(trail: Trail, name: str, datasets: dict[str, int]) -> str:
    """Record a refined dataset that keeps so many rows of each contribution; return its digest."""
    ids = [(f"{leaf[:8]}-{row}", leaf) for leaf, kept in datasets.items() for row in range(kept)]
    rows = trail.put_table(pa.table({"example_id": [i for i, _ in ids], "dataset": [leaf for _, leaf in ids]}))
    refined = digest(f"refined {name}")
    body = RefinementBody(name, (), len(ids), len(ids), (), (ContributorRows(ANA, 1, 1),), digest("decisions"), rows)
    outputs = (Artefact("refined", name, refined),)
    return (trail.record("refinement", body, outputs=outputs, parents=list(datasets)).record and refined) or ""


def train(trail: Trail, name: str, refined: str) -> str:
    adapter = digest(f"adapter {name}")
    body = AdapterBody("facts", BASE, refined, 8, 16, ("q_proj",), 10, 4, 0, 0, digest("trace"))
    inputs = (Artefact("refined", name, refined),)
    trail.record("adapter", body, inputs=inputs, outputs=(Artefact("adapter", name, adapter),))
    artefact = Artefact("adapter", "facts", adapter)
    version = trail.registry.next_version("facts")
    trail.record(
        "publication", PublicationBody("facts", version, "adapter", adapter), inputs=(artefact,), outputs=(artefact,)
    )
    return adapter


def measure(trail: Trail, adapter: str, correct: list[bool], metrics: tuple[Metric, ...]) -> str:
    details = trail.put_table(pa.table({"id": [str(i) for i in range(len(correct))], "adapter_contains": correct}))
    body = BenchmarkBody("ferries", SUITE, BASE, adapter, len(correct), metrics, details)
    return trail.record("benchmark", body, inputs=(Artefact("adapter", "facts", adapter),)).leaf_hash


def contains(delta: float, low: float, high: float) -> Metric:
    return Metric("contains", 0, int(delta * 1e6), int(delta * 1e6), int(low * 1e6), int(high * 1e6), 10)


def loss(delta: float, low: float, high: float) -> Metric:
    return Metric("loss", 0, 0, int(delta * 1e6), int(low * 1e6), int(high * 1e6), 10)


def serve(trail: Trail, adapter: str | None, num_tokens: int) -> str:
    receipt: dict[str, Any] = {
        "v": 1,
        "id": new_receipt_id(),
        "time_us": 1,
        "model": "facts" if adapter else "base",
        "base": BASE,
        "adapter": adapter,
        "adapter_name": "facts@1" if adapter else None,
        "adapter_record": None,
        "prompt_version": None,
        "retrieved": [],
        "request_digest": digest("q"),
        "output_digest": digest("a"),
        "prompt_tokens": 7,
        "completion_tokens": num_tokens,
        "finish_reason": "stop",
        "replica": "r",
        "tenant": "t",
    }
    append_completions(trail, [ReceiptRow(receipt, bytes(32), trail.put_json({}))], replica="r")
    return str(receipt["id"])


def influence(trail: Trail, adapter: str, receipt_id: str, scores: dict[str, float]) -> None:
    table = trail.put_table(
        pa.table({"example_id": list(scores), "score_micro": [round(score * 1e6) for score in scores.values()]})
    )
    body = InfluenceBody(receipt_id, "0" * 64, "test", table, ())
    trail.record("influence", body, inputs=(Artefact("adapter", "facts", adapter),))


@pytest.fixture
def told(trail: Trail) -> dict[str, str]:
    """Two versions of an adapter: the second adds Ben's rows and answers 10 of 10 where the first answered 2."""
    for key_id, name in ((ANA, "ana"), (BEN, "ben")):
        trail.record("contributor", ContributorBody(name, key_id, "c" * 64))
    ana, ben = contribute(trail, "ana-rows", ANA, 6), contribute(trail, "ben-rows", BEN, 4)
    copied = contribute(trail, "copied-rows", BEN, 3)
    first = train(trail, "first", refine(trail, "first", {ana: 5}))
    second = train(trail, "second", refine(trail, "second", {ana: 5, ben: 4, copied: 0}))
    measure(trail, first, [True] * 2 + [False] * 8, (contains(0.2, -0.1, 0.5),))
    measure(trail, second, [True] * 10, (contains(1.0, 0.9, 1.0), loss(-1.5, -2.0, -1.0)))
    return {"first": first, "second": second, "ana": ana, "ben": ben, "copied": copied}


def verdicts(answer: Answer) -> dict[tuple[str, str], str]:
    return {(finding.subject, finding.measure): finding.verdict for finding in answer.findings}


def test_an_interval_that_holds_zero_is_no_effect(trail: Trail, told: dict[str, str]) -> None:
    found = ask_adapter(trail)
    assert verdicts(found) == {
        ("facts@1", "contains on ferries (10 items), against the base"): NO_EFFECT,
        ("facts@2", "contains on ferries (10 items), against the base"): "improved",
        ("facts@2", "loss on ferries (10 items), against the base"): "improved",
    }
    assert "1 of 2 adapters changed a measure: facts@2" in found.summary
    leaves = {entry.leaf_hash for entry in trail.entries(kind="benchmark")}
    assert leaves <= set(found.links)


def test_one_adapter_can_be_asked_for(trail: Trail, told: dict[str, str]) -> None:
    for reference in ("facts@1", told["first"]):
        assert {finding.subject for finding in ask_adapter(trail, reference).findings} == {"facts@1"}
    with pytest.raises(RegistryError, match="did you mean"):
        ask_adapter(trail, "fact")


def test_a_version_is_compared_with_the_one_before(trail: Trail, told: dict[str, str]) -> None:
    found = ask_improved(trail)
    measure = "contains on ferries, against version 1 (+4 rows, with ben-rows, with copied-rows)"
    (change,) = (finding for finding in found.findings if finding.measure == measure)
    assert change.value == pytest.approx(0.8)
    assert change.low is not None and 0.5 < change.low < 0.8 < change.high <= 1.0  # type: ignore[operator]
    assert change.verdict == "improved" and change.subject == "facts@2"
    assert "3 of 4" in found.summary
    assert any("cause" in missing.evidence for missing in found.missing)
    assert found == ask_improved(trail), "the same log gives the same answer"


def test_a_dataset_matters_when_its_rows_were_found_to(trail: Trail, told: dict[str, str]) -> None:
    silent = ask_dataset(trail, "facts@2")
    assert any("no influence is recorded" in missing.evidence for missing in silent.missing)
    assert {f.subject: f.value for f in silent.findings} == {"ana-rows": 5, "ben-rows": 4, "copied-rows": 0}
    assert "dropped by refinement" in {f.verdict for f in silent.findings if f.subject == "copied-rows"}
    for number in range(6):
        helpful = {f"{told['ben'][:8]}-{row}": 0.5 for row in range(4)}
        mixed = {f"{told['ana'][:8]}-0": (-1) ** number * 0.1}
        influence(trail, told["second"], f"rcpt_{number}", helpful | mixed)
    found = ask_dataset(trail, "facts@2")
    scored = {finding.subject: finding for finding in found.findings if finding.low is not None}
    assert scored["ben-rows"].value == pytest.approx(2.0) and scored["ben-rows"].verdict == "helped"
    assert scored["ana-rows"].verdict == NO_EFFECT
    assert "over 6 explained answers these datasets helped: ben-rows" in found.summary


def test_few_explained_answers_prove_nothing(trail: Trail, told: dict[str, str]) -> None:
    verdicts_after = []
    for number in range(5):
        influence(trail, told["second"], f"rcpt_{number}", {f"{told['ben'][:8]}-0": 1.0 + number})
        scored = [one for one in ask_dataset(trail, "facts@2").findings if one.unit == "nats per answer"]
        (ben,) = (one for one in scored if one.subject == "ben-rows")
        assert (ben.low is None, ben.confidence is None) == (number == 0, number == 0)
        verdicts_after.append(ben.verdict)
    assert verdicts_after == [TOO_FEW] * 4 + ["helped"]


def test_value_counts_what_was_served(trail: Trail, told: dict[str, str]) -> None:
    assert any("no completion" in missing.evidence for missing in ask_value(trail).missing)
    for adapter, num_tokens in ((told["second"], 30), (told["second"], 30), (None, 40)):
        serve(trail, adapter, num_tokens)
    found = ask_value(trail)
    figures = {(finding.subject, finding.measure): finding.value for finding in found.findings}
    assert figures["facts@2", "completions"] == 2
    assert figures["facts@2", "completion tokens"] == 60
    assert figures["facts@2", "share of completion tokens"] == pytest.approx(0.6)
    assert "3 completions served, 2 through an adapter, 1 by a base alone" in found.summary
    assert any("settled credit" in missing.evidence for missing in found.missing)
    entries = trail.entries(kind="completions")
    assert {e.leaf_hash for e in entries if e.record and isinstance(e.record.body, CompletionsBody)} <= set(found.links)


@pytest.mark.parametrize("ask", [ask_improved, ask_adapter, ask_dataset, ask_value])
def test_an_empty_log_says_what_would_fill_it(trail: Trail, ask: Callable[[Trail], Answer]) -> None:
    found = ask(trail)
    assert found.findings == ()
    assert found.missing and all(missing.remedy for missing in found.missing)


def attribution(**changes: Any) -> dict[str, Any]:
    part = {"key_id": ANA, "name": "ana", "share": 0.7, "low": 0.5, "high": 0.9, "score": 3.0}
    other = {**part, "key_id": BEN, "name": "ben", "share": 0.0, "low": 0.0, "high": 0.0, "score": 1.0}
    bounds = {"score_low": 1.0, "score_high": 5.0}
    return {
        "receipt_id": "rcpt_1",
        "receipt_leaf": "e" * 64,
        "model": "facts",
        "base": BASE,
        "adapter": digest("adapter second"),
        "adapter_name": "facts@2",
        "base_did_it": False,
        "reason": "shares of the predicted gain",
        "gain_nats": {"mean": 1.5, "low": 0.4, "high": 2.0, "num_tokens": 9, "threshold": 0.05, "is_of_base": False},
        "contributors": [{**part, **bounds}, {**other, **bounds}],
        "unattributed": 0.3,
        "examples": [],
        "baselines": {"bm25": [{"name": "ana"}], "random": [{"name": "ben"}]},
        "method": "test",
        "label": "stability",
        "confidence": 0.9,
        "seed": 0,
        **changes,
    }


def test_who_names_those_that_are_credited(trail: Trail, told: dict[str, str]) -> None:
    found = ask_who(trail, "rcpt_1", explain=lambda _: attribution())
    assert found.summary == "The adapter facts@2 made it, mostly on rows of ana 70%."
    assert [(f.subject, f.verdict) for f in found.findings] == [
        ("ana", "credited"),
        ("ben", "cannot be told from zero"),
    ]
    made = trail.find(told["second"])
    assert made is not None and found.links == ("e" * 64, made.leaf_hash)


def test_who_may_be_the_base(trail: Trail) -> None:
    base = attribution(base_did_it=True, contributors=[], adapter=None, gain_nats=None, reason="it was asked")
    found = ask_who(trail, "rcpt_1", explain=lambda _: base)
    assert found.summary == "The base model made it: it was asked."
    assert [finding.verdict for finding in found.findings] == ["the base made it"]


def test_the_command_prints_tables_and_json(
    trail: Trail, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import typer

    from cluster.commands import ask

    monkeypatch.setenv("TRAILMARK_HOME", str(trail.home))
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    ask.register(app)
    for name in ("improved", "dataset", "adapter", "value"):
        printed = CliRunner().invoke(app, ["ask", name])
        assert printed.exit_code == 0, printed.output
        assert "Missing" in printed.output
        parsed = json.loads(CliRunner().invoke(app, ["ask", name, "--json"]).output)
        assert parsed["summary"] in " ".join(printed.output.split())
        assert {"findings", "missing", "method", "seed", "confidence", "links"} <= parsed.keys()


def test_the_bar_is_as_long_as_the_share() -> None:
    from cluster.commands.ask_tables import bar

    assert [bar(share, width=4) for share in (0, 0.25, 0.5, 1, 2)] == ["", "█", "██", "████", "████"]
    assert bar(1 / 32, width=4) == "▏"


def test_the_intervals_are_those_asked_for(trail: Trail, told: dict[str, str]) -> None:
    def width(confidence: float) -> float:
        found = ask_improved(trail, resampling=Resampling(confidence=confidence))
        (change,) = (finding for finding in found.findings if "version 1" in finding.measure)
        assert change.low is not None and change.high is not None
        return change.high - change.low

    assert width(0.5) < width(0.99)
