"""A recorded run, run again from nothing but its record: the same result, and no trace of the second run."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attribution.bodies import AdapterBody, BenchmarkBody
from attribution.records import Artefact
from attribution.trail import Trail
from attribution.workflow_patches import record_patch
from attribution.workflow_runs import definition_artefact
from cluster.cli import app
from configs.schema import BenchmarkSettings, RefineSettings, TrainSettings
from pipelines.base_model import resolve_base
from pipelines.contribute import add_contributor, contribute
from pipelines.replay import ReplayError, differences, find_run, replay
from tests.pipelines.train.refined import add_refined
from tests.tiny_model import QUESTIONS


def stored_files(trail: Trail) -> set[Path]:
    return {path for path in trail.store.root.rglob("*") if path.is_file()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_refinement_is_equal_and_leaves_nothing_behind(
    trail: Trail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.refine.driver import refine

    add_contributor(trail, "ann")
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}, I think."} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    contribute(trail, file, contributor="ann", licence="CC-BY-4.0")
    # The recorded rule drops the rows whose sum has two digits; the defaults would keep all.
    settings = RefineSettings(max_chars=33, max_repetition=0.25, block_rows=2)
    definition = trail.store.put_blob(b"name: road")  # a workflow's patch, a parent that is no dataset
    record_patch(trail, "road", before="", after=definition, author="ann", reason="first")
    workflow = definition_artefact("road", definition)
    report = refine(trail, ["all"], settings, name="sums", workflow=workflow)
    kinds = [trail.entry(parent).leaf.kind for parent in report.entry.leaf.parents]
    assert sorted(kinds) == ["dataset", "workflow_patch"]
    assert 0 < report.num_kept < report.num_in
    contribute(trail, file, contributor="ann", licence="CC-BY-4.0", name="later")
    before, size = stored_files(trail), trail.log.size
    again = replay(trail, find_run(trail, "sums"))
    assert again.equal and again.facts[0].recorded == again.facts[0].replayed == report.digest
    assert trail.log.size == size and stored_files(trail) == before
    assert list((trail.home / "run" / "replay").iterdir()) == []
    monkeypatch.setenv("TRAILMARK_HOME", str(trail.home))
    outcome = CliRunner().invoke(app, ["replay", report.entry.leaf_hash[:12]], catch_exceptions=False)
    assert outcome.exit_code == 0 and "yes" in outcome.output


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_adapter_is_equal_bit_for_bit(trail: Trail, tiny_base: Path, tmp_path: Path) -> None:
    from pipelines.train.driver import train

    add_refined(trail, tmp_path / "rows")
    settings = TrainSettings(rank=4, learning_rate=5e-3, max_steps=2, batch_size=4, max_length=64, num_checkpoints=1)
    report = train(trail, "facts", name="tiny", base=str(tiny_base), settings=settings)
    before, size = stored_files(trail), trail.log.size
    again = replay(trail, find_run(trail, "tiny"))
    assert again.equal and again.largest_difference is None
    assert [fact.fact for fact in again.facts][:2] == ["adapter_model.safetensors", "steps"]
    assert trail.log.size == size and stored_files(trail) == before
    # The same record with another seed in its configuration: other weights, and the difference is told.
    record = report.entry.record
    assert record is not None
    other = trail.run_config(settings.model_copy(update={"seed": 1}))
    entry = dataclasses.replace(report.entry, record=dataclasses.replace(record, config=other))
    differing = replay(trail, entry)
    assert not differing.equal and differing.largest_difference is not None and differing.largest_difference > 1e-4


def test_benchmark_is_equal_and_an_altered_record_is_told(
    trail: Trail, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.benchmark.run import benchmark

    model = resolve_base(trail, str(tiny_base))
    digest = trail.store.put_directory(tiny_adapters["rank8-all"], kind="adapter", meta={"base": model.digest})
    body = AdapterBody("voice", model.digest, digest, 8, 16, ("q_proj",), 1, 1, 0, 0, digest)
    inputs = (Artefact("base_model", model.name, model.digest),)
    trail.record("adapter", body, inputs=inputs, outputs=(Artefact("adapter", "voice", digest),))
    suite = tmp_path / "held-out.jsonl"
    rows = [{"id": q, "prompt": q, "expected": [a], "reference": a} for q, a in QUESTIONS[:3]]
    suite.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = BenchmarkSettings(max_new_tokens=4, num_bootstrap=50)
    report = benchmark(trail, "voice", suite=suite, settings=settings)
    suite.unlink()
    size = trail.log.size
    again = replay(trail, find_run(trail, "held-out"))
    assert again.equal and [fact.fact for fact in again.facts] == ["loss", "exact_match", "contains"]
    assert trail.log.size == size

    record = report.entry.record
    assert record is not None and isinstance(record.body, BenchmarkBody)
    loss, *others = record.body.metrics
    better = dataclasses.replace(record.body, metrics=(dataclasses.replace(loss, adapter_micro=1), *others))
    trail.record("benchmark", better, inputs=record.inputs, outputs=record.outputs, config=record.config)
    monkeypatch.setenv("TRAILMARK_HOME", str(trail.home))
    outcome = CliRunner().invoke(app, ["replay", "held-out"], catch_exceptions=False)
    assert outcome.exit_code == 1 and "no" in outcome.output


def test_other_code_or_environment_is_warned_of(trail: Trail, tmp_path: Path) -> None:
    digest = add_refined(trail, tmp_path / "rows")
    entry = find_run(trail, digest)
    record = entry.record
    assert record is not None
    assert not any(line.startswith(("git commit", "environment")) for line in differences(entry))
    code = dataclasses.replace(record.code, commit="0" * 40, dirty=not record.code.dirty)
    changed = dataclasses.replace(record, code=code, environment="sha256:" + "1" * 64)
    commit, dirty, environment = differences(dataclasses.replace(entry, record=changed))
    assert f"recorded {'0' * 40}, now {record.code.commit or 'none'}" in commit
    assert "uncommitted changes" in dirty
    assert f"recorded sha256:{'1' * 64}, now {record.environment}" in environment


def test_what_cannot_be_replayed_is_said(trail: Trail, tmp_path: Path) -> None:
    digest = add_refined(trail, tmp_path / "rows")
    body = AdapterBody("facts", digest, digest, 8, 16, ("q_proj",), 1, 1, 0, 0, digest)
    old = trail.put_json({"rank": 8, "flux": "0.5"})
    weights = trail.store.put_blob(b"weights")
    trail.record("adapter", body, outputs=(Artefact("adapter", "facts", weights),), config=old)
    with pytest.raises(ReplayError, match="refinement and adapter are called so; pass --kind"):
        find_run(trail, "facts")
    assert find_run(trail, "facts", kind="refinement").leaf.kind == "refinement"
    with pytest.raises(ReplayError, match="it names no configuration"):
        replay(trail, find_run(trail, digest))
    with pytest.raises(ReplayError, match="this code does not take its flux; replay it with the code"):
        replay(trail, find_run(trail, weights))
    with pytest.raises(ReplayError, match="no record of this trail made it"):
        find_run(trail, "sha256:" + "0" * 64)
