"""A benchmark on the tiny base, against transformers and PEFT asked one question at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from attribution.bodies import AdapterBody, BenchmarkBody
from attribution.influence.encode import encode_example, encode_prompt
from attribution.records import Artefact
from attribution.trail import Trail
from configs.schema import BenchmarkSettings
from pipelines.base_model import resolve_base
from pipelines.benchmark.run import BenchmarkError, BenchmarkProgress, BenchmarkReport, benchmark
from pipelines.publish import publish
from tests.tiny_model import QUESTIONS

SETTINGS = BenchmarkSettings(max_new_tokens=12, num_bootstrap=200, batch_size=8)


@dataclass(frozen=True)
class Benchmarked:
    trail: Trail
    base: Path
    adapter: Path
    digest: str
    suite: Path
    report: BenchmarkReport
    events: tuple[BenchmarkProgress, ...]


def record_adapter(trail: Trail, base: Path, adapter: Path) -> str:
    """Put a ready-made PEFT folder into the trail as training would."""
    model = resolve_base(trail, str(base))
    trace = trail.store.put_blob(b"a trace that this test does not read")
    digest = trail.store.put_directory(adapter, kind="adapter", meta={"base": model.digest})
    body = AdapterBody("voice", model.digest, trace, 8, 16, ("q_proj",), 1, 1, 0, 0, trace)
    inputs = (Artefact("base_model", model.name, model.digest),)
    trail.record("adapter", body, inputs=inputs, outputs=(Artefact("adapter", "voice", digest),))
    return digest


@pytest.fixture(scope="module")
def done(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Benchmarked:
    folder = tmp_path_factory.mktemp("benchmark")
    trail = Trail.open(folder / "home")
    adapter = tiny_adapters["rank8-all"]
    digest = record_adapter(trail, tiny_base, adapter)
    suite = folder / "held-out.jsonl"
    rows = [
        {"id": f"q{i}", "prompt": question, "expected": [answer.split()[-1].strip(".?!")], "reference": answer}
        for i, (question, answer) in enumerate(QUESTIONS)
    ]
    suite.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    events: list[BenchmarkProgress] = []
    report = benchmark(trail, "voice", suite=suite, settings=SETTINGS, progress=events.append)
    return Benchmarked(trail, tiny_base, adapter, digest, suite, report, tuple(events))


def test_answers_and_losses_equal_transformers_alone(done: Benchmarked) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.base)
    plain = AutoModelForCausalLM.from_pretrained(done.base, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(done.base, dtype=torch.float32), str(done.adapter)
    ).eval()
    rows = done.trail.get_table(done.report.details).to_pylist()
    assert [row["prompt"] for row in rows] == [question for question, _ in QUESTIONS]
    for side, model in (("base", plain), ("adapter", tuned)):
        for row in rows:
            user = {"role": "user", "content": row["prompt"]}
            prompt = torch.tensor([encode_prompt(tokenizer, [user])])
            out = model.generate(input_ids=prompt, max_new_tokens=SETTINGS.max_new_tokens, do_sample=False)
            text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
            assert row[f"{side}_answer"] == text
            assert row[f"{side}_contains"] == (row["expected"][0].casefold() in text.casefold())
            answer = {"role": "assistant", "content": row["reference"]}
            ids, labels = encode_example(tokenizer, [user, answer], max_length=None)
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            assert row[f"{side}_loss"] == pytest.approx(loss, abs=1e-5)


def test_metrics_are_means_over_the_table(done: Benchmarked) -> None:
    rows = done.trail.get_table(done.report.details).to_pylist()
    assert [m.metric for m in done.report.metrics] == ["loss", "exact_match", "contains"]
    for m in done.report.metrics:
        assert m.base == pytest.approx(sum(row[f"base_{m.metric}"] for row in rows) / len(rows))
        assert m.adapter == pytest.approx(sum(row[f"adapter_{m.metric}"] for row in rows) / len(rows))
        assert m.low <= m.delta <= m.high
    loss, exact, contains = done.report.metrics
    assert exact.base == contains.base == 1.0, "the tiny base knows its questions by heart"
    assert loss.delta > 0 and exact.adapter < 1.0, "a random adapter makes it worse"


def test_record_names_suite_base_and_adapter(done: Benchmarked) -> None:
    record = done.report.entry.record
    assert record is not None and isinstance(record.body, BenchmarkBody)
    assert record.body.adapter == done.digest and record.body.num_items == len(QUESTIONS)
    assert done.trail.store.get_blob(record.body.suite) == done.suite.read_bytes()
    (loss, *_) = record.body.metrics
    assert loss.delta_micro == round(done.report.metrics[0].delta * 1e6)
    parents = {done.trail.entry(leaf).leaf.kind for leaf in done.report.entry.leaf.parents}
    assert parents == {"adapter", "base_model"}


def test_progress_counts_every_item_twice(done: Benchmarked) -> None:
    for stage in ("loss", "answers"):
        counts = [event.num_done for event in done.events if event.stage == stage]
        assert counts == sorted(counts) and counts[-1] == 2 * len(QUESTIONS)


def test_adapter_by_digest_and_by_published_name(done: Benchmarked) -> None:
    from pipelines.benchmark.run import resolve_adapter

    publish(done.trail, "house-voice", done.digest)
    for reference in (done.digest, "voice", "house-voice", "house-voice@1"):
        assert resolve_adapter(done.trail, reference).digest == done.digest
    with pytest.raises(BenchmarkError, match="did you mean house-voice"):
        resolve_adapter(done.trail, "house-voise")
    with pytest.raises(BenchmarkError, match="not of an adapter"):
        resolve_adapter(done.trail, resolve_adapter(done.trail, "voice").base_digest)


def test_too_long_prompt_names_the_item(done: Benchmarked, tmp_path: Path) -> None:
    suite = tmp_path / "long.jsonl"
    row = {"id": "endless", "prompt": "again " * 900, "expected": ["x"], "reference": "x"}
    suite.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="suite item 'endless'"):
        benchmark(done.trail, "voice", suite=suite, settings=SETTINGS)
