"""Forgetting: content, gradients, scores and words go; who learnt from it is named; every proof stays."""

import json
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from attribution.erasure import remaining
from attribution.fsck import check
from attribution.influence.codec import BLOCK, FactorCodec, GradientCodec
from attribution.influence.gradient_store import GradientStore
from attribution.influence.store import Trace
from attribution.monitor import Violation, watch
from attribution.monitor_sources import TrailSource
from attribution.monitor_state import Memory
from attribution.records import Artefact
from attribution.span_files import FOLDER
from attribution.spans import find_spans
from attribution.trail import Trail
from cluster.cli import app
from configs.errors import UserError
from pipelines.erase import erase, plan
from pipelines.forget import ForgetError, forget, plan_forget, train_again
from pipelines.train.driver import resolve_refined
from tests.pipelines.test_erase import SECRET, World, world

__all__ = ["world"]

NUM_STEPS, DIM = 1, 6
STORE = Path("gradients") / "store"


@pytest.fixture
def traced(world: World, tmp_path: Path) -> World:
    """The world's trace with gradients and in-run scores, as training leaves them, in place of the bare one."""
    trail, body = world.trail, world.adapter.record.body  # type: ignore[union-attr]
    folder = tmp_path / "traced"
    shutil.copytree(trail.store.get_directory(body.trace), folder)
    (folder / "manifest.json").unlink()
    num_rows = pq.read_metadata(folder / "examples.parquet").num_rows
    (folder / "gradients").mkdir()
    (folder / "gradients" / "meta.json").write_text(json.dumps({"steps": [1], "modules": [], "dim": DIM}))
    np.save(folder / "gradients" / "1.npy", np.arange(1, 1 + num_rows * DIM, dtype=np.float16).reshape(num_rows, DIM))
    factor = FactorCodec("q.lora_A", torch.eye(2), torch.eye(BLOCK), torch.ones(2, BLOCK), torch.arange(BLOCK))
    codec = GradientCodec("identity", (factor,), torch.arange(BLOCK), 1.0)
    store = GradientStore.create(folder / STORE, {"1": codec})
    ids = pq.read_table(folder / "examples.parquet").column("example_id").to_pylist()
    store.append(ids, {"1": np.ones((num_rows, store.dim("1")), dtype=np.float32)})
    (folder / "in_run").mkdir()
    np.save(folder / "in_run" / "steps.npy", np.ones((NUM_STEPS, 2, num_rows, 2), dtype=np.float32))
    trace = trail.store.put_directory(folder, kind="trace", meta={})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"again": secrets.token_hex(4)}))
    digest = trail.store.put_directory(adapter, kind="adapter", meta={"trace": trace})
    made = (Artefact("adapter", "traced", digest), Artefact("trace", "traced", trace))
    inputs = world.adapter.record.inputs  # type: ignore[union-attr]
    again = replace(body, name="traced", trace=trace)
    world.adapter = trail.record("adapter", again, inputs=inputs, outputs=made)
    return world


def trace_now(world: World) -> tuple[str, Trace]:
    digest = remaining(world.trail, world.adapter.record.body.trace)  # type: ignore[union-attr]
    return digest, Trace(world.trail.store.get_directory(digest))


def watched(world: World, folder: Path) -> list[Violation]:
    """What the monitor finds, which remembers what it saw before."""
    trail = Trail.open(world.trail.home)
    return watch(TrailSource(trail), Memory(folder / "memory"), world.trust.history(), trail=trail).violations


def test_content_gradients_scores_and_words_go(traced: World) -> None:
    trail, row_id = traced.trail, traced.secret_id()
    digest, before = trace_now(traced)
    row = [example.example_id for example in before.examples].index(row_id)
    kept = [other for other in range(len(before.examples)) if other != row]
    gradients = np.array(before.gradients(1))
    assert find_spans(trail.home, before, digest, f"They say {SECRET}!")[0].text == SECRET
    forgetting = plan_forget(trail, row_id)
    assert [(learner.label, learner.num_rows) for learner in forgetting.learners][1:] == [
        (f"traced ({traced.adapter.record.outputs[0].digest[7:19]})", 1)  # type: ignore[union-attr]
    ]
    assert forgetting.learners[0].references == ("facts@1",)
    (redaction,) = forget(trail, forgetting, reason="she asked", requester="operator")
    left, after = trace_now(traced)
    assert left != digest and not trail.store.has(digest) and not list((trail.home / FOLDER).glob("*.npz"))
    assert not np.any(after.gradients(1)[row]) and np.array_equal(after.gradients(1)[kept], gradients[kept])
    held = GradientStore(after.path / STORE)
    assert row_id not in held.ids() and held.num_examples == len(kept)
    scores = np.load(after.path / "in_run" / "steps.npy")
    assert not np.any(scores[0, :, row]) and np.all(scores[0, :, kept] == 1)
    assert find_spans(trail.home, after, left, f"They say {SECRET}!") == ()
    assert not traced.holds(SECRET) and not traced.holds(row_id)
    assert redaction.leaf.kind == "row_redaction"


def test_proofs_monitor_and_fsck_stand_afterwards(traced: World, tmp_path: Path) -> None:
    trail = traced.trail
    assert watched(traced, tmp_path) == []
    forget(trail, plan_forget(trail, traced.secret_id()), reason="x", requester="mira")
    forget(trail, plan_forget(trail, "otto"), reason="x", requester="operator")
    for entry in trail.entries():
        assert traced.verify(entry).checks
    assert check(trail.home).damage == []
    assert watched(traced, tmp_path) == []


def test_a_contributor_with_one_row_leaves_the_rest(traced: World) -> None:
    trail = traced.trail
    rows = pq.read_table(trace_now(traced)[1].path / "examples.parquet").to_pylist()
    otto = [row for row in rows if row["contributor"] == trail.keys.get("otto").key_id]
    assert len(otto) == 1, "of otto's two rows one repeats mira's"
    forgetting = plan_forget(trail, "otto")
    assert {learner.num_rows for learner in forgetting.learners} == {1}
    forget(trail, forgetting, reason="x", requester="operator")
    assert resolve_refined(trail, "facts").digest != ""
    assert sum(example.text == "" for example in trace_now(traced)[1].examples) == 1


def test_a_damaged_trace_stops_it_and_the_way_on_is_named(traced: World) -> None:
    trail, row_id = traced.trail, traced.secret_id()
    _, trace = trace_now(traced)
    (codes,) = (trace.path / STORE).rglob("*.codes.npy")
    codes.chmod(0o644)
    codes.write_bytes(codes.read_bytes()[:-1] + b"x")
    size = trail.log.size
    with pytest.raises(UserError, match=r"codes.npy was altered.*; nothing was erased: restore .* or erase the"):
        forget(trail, plan_forget(trail, row_id), reason="x", requester="operator")
    assert (trail.log.size, traced.secret_id()) == (size, row_id)
    erase(trail, plan(trail, traced.adapter.leaf_hash), reason="damaged")
    forget(trail, plan_forget(trail, row_id), reason="x", requester="operator")
    assert traced.holds(SECRET) == []


@pytest.mark.parametrize("target", ["nobody", "sha256:" + "0" * 64, "deadbeef"])
def test_what_is_unknown_is_said(traced: World, target: str) -> None:
    with pytest.raises(ForgetError, match="no contributor, row or record"):
        plan_forget(traced.trail, target)


def test_what_is_forgotten_already_leaves_a_trace_of_that(traced: World) -> None:
    row_id = traced.secret_id()
    forget(traced.trail, plan_forget(traced.trail, row_id), reason="x", requester="operator")
    with pytest.raises(ForgetError, match=r"forgotten already.*1 redactions stand in the log"):
        plan_forget(traced.trail, row_id)


def test_a_record_is_for_erase(traced: World) -> None:
    with pytest.raises(ForgetError, match=r"a record \(adapter\).*trailmark erase"):
        plan_forget(traced.trail, "facts@1")


def test_the_same_rows_without_a_trace_are_told_from_the_dataset(traced: World) -> None:
    trail = traced.trail
    digest, _ = trace_now(traced)
    trail.store.delete(digest)
    learners = plan_forget(trail, traced.secret_id()).learners
    assert {learner.name: learner.num_rows for learner in learners} == {"facts": 1, "traced": None}


def test_training_again_takes_what_is_left(traced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training is called with; that it trains is shown end to end where a cluster is."""
    from pipelines.train import driver

    trail, called = traced.trail, []

    def train(_: Trail, dataset: str, **rest: Any) -> None:
        called.append((dataset, rest["name"], rest["base"]))
        raise UserError("enough")

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr("pipelines.forget.recorded_settings", lambda *_: None)
    forgetting = plan_forget(trail, traced.secret_id())
    forget(trail, forgetting, reason="x", requester="operator")
    body = traced.adapter.record.body  # type: ignore[union-attr]
    with pytest.raises(UserError, match="enough"):
        train_again(trail, forgetting.learners[-1])
    assert called == [(remaining(trail, body.dataset), "traced", body.base)]
    for name in ("mira", "otto"):
        forget(trail, plan_forget(trail, name), reason="x", requester="operator")
    assert train_again(trail, forgetting.learners[-1]).why == "no row of its dataset is left"


def test_the_command(traced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_HOME", str(traced.trail.home))
    row_id = traced.secret_id()
    planned = CliRunner().invoke(app, ["forget", row_id[:20], "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "2 adapters learnt from it" in planned.output and "facts@1: 1 of its rows" in planned.output
    assert traced.holds(SECRET)
    refused = CliRunner().invoke(app, ["forget", row_id])
    assert isinstance(refused.exception, UserError) and "--reason" in str(refused.exception)
    done = CliRunner().invoke(app, ["forget", row_id, "--reason", "she asked"])
    assert done.exit_code == 0, done.output
    assert "row redaction recorded" in done.output and "optimizer states stay" in done.output
    assert not traced.holds(SECRET)
