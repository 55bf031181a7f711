"""The MLflow view against a real server: what it writes, that it writes it once, and that nothing is lost."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attribution import bodies
from attribution.bodies import ApprovalBody, MetricChange, WorkflowEffectBody, WorkflowRunBody
from attribution.erasure import erase
from attribution.mlflow_datasets import TAG_ROWS
from attribution.mlflow_notes import Credit, credits_json, escape, note
from attribution.mlflow_server import TAG_CONTRIBUTORS, TAG_DIGEST, TAG_LEAF, TAG_NOTE, ViewUnavailable
from attribution.mlflow_traces import ASSESSMENT, ASSESSMENT_SHARES, NOBODY, trace_id_of
from attribution.mlflow_view import MlflowView
from attribution.records import Artefact, Party
from attribution.trail import Trail
from attribution.workflow_patches import record_patch
from pipelines.contribute import add_contributor
from tests.attribution.mlflow_process import MlflowProcess
from tests.attribution.records_example import (
    NUM_STEPS,
    PEOPLE,
    ExampleLog,
    answer,
    build_example_log,
    digest_of,
    explain,
    prompt,
    settle,
)
from tests.browser import Browser, needs_browser

QUESTIONS = {"Which lamp burns at Vellmoor?": "A green one.", "Who keeps Cape Ostrel?": "Ines Varga."}
SHARES = {"Mira, lighthouses": (0.71, 0.56, 0.83), "Noor, lighthouses": (0.12, 0.02, 0.26)}
PROMPT_TEXTS = ("Answer as a keeper: {{question}}", "Answer as a keeper, in one line: {{question}}")
# Contributions, refinement, base, adapter, benchmark, publication, settlement, two batches, two influences, two
# prompts; a patch, a workflow's run, what the patch did, an approval.
NUM_SHOWN = len(PEOPLE) + 12 + 4
DEAD_URI = "http://127.0.0.1:9"  # the discard port: nothing listens
CATCH_UP_TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, log: ExampleLog) -> Iterator[MlflowProcess]:
    process = MlflowProcess(tmp_path_factory.mktemp("server") / "data", home=log.trail.home)
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    folder = tmp_path_factory.mktemp("example")
    example = build_example_log(Trail.open(folder / "home"), folder / "scratch")
    answer(example, QUESTIONS)
    answer(example, {"Which lamp burns at Vellmoor?": "I do not know."}, adapter=False)
    explain(example, example.receipt_ids[0], SHARES)
    explain(example, example.receipt_ids[1], {"Mira, lighthouses": (0.0, 0.0, 0.3)})
    for text in PROMPT_TEXTS:
        prompt(example, "greeting", text, by="Mira, lighthouses")
    settle(example, {"Mira, lighthouses": (1.25, 0.75, 1.5), "</script><script>alert('x')</script>": (0.0, -0.5, 0.5)})
    work(example)
    return example


def work(example: ExampleLog) -> None:
    """A patched workflow that failed, what the patch did all the same, and an approval."""
    trail, author = example.trail, "keeper_1"
    add_contributor(trail, author)
    definition = trail.store.put_blob(b"name: road\n")
    patch = record_patch(trail, "road", before="", after=definition, author=author, reason="fewer *steps*")
    steps = ("refine: done", "train: failed: out of memory")
    trail.record("workflow_run", WorkflowRunBody("road", "failed", steps), parents=[patch.leaf_hash])
    change = MetricChange("facts", "accuracy", 400_000, 600_000, 200_000, 50_000, 350_000, 40)
    effect = WorkflowEffectBody("road", (patch.leaf_hash,), "improved", "0 lies outside", 950_000, (change,), ("seed",))
    trail.record("workflow_effect", effect, parents=[patch.leaf_hash])
    key = trail.keys.get(author)
    party = [Party(key.key_id, "approver")]
    trail.record("approval", ApprovalBody(definition, "approved", "read it"), contributors=party, signer=key)


@pytest.fixture(scope="module")
def view(log: ExampleLog, server: MlflowProcess) -> Iterator[MlflowView]:
    """The view after its first sync."""
    opened = MlflowView(log.trail, server.uri)
    assert opened.sync() == NUM_SHOWN
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(view: MlflowView, server: MlflowProcess) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.uri, server.uri)


@pytest.fixture(scope="module")
def experiment_id(client: Any) -> str:
    return str(client.get_experiment_by_name("trailmark").experiment_id)


def run_of(client: Any, experiment_id: str, leaf: str) -> Any:
    runs = client.search_runs([experiment_id], f"tags.`{TAG_LEAF}` = '{leaf}'")
    assert len(runs) == 1
    return client.get_run(runs[0].info.run_id)  # a search leaves out model inputs


def model_of(client: Any, experiment_id: str, leaf: str) -> Any:
    models = client.search_logged_models([experiment_id], filter_string=f"tags.`{TAG_LEAF}` = '{leaf}'")
    assert len(models) == 1
    return models[0]


def counts(client: Any, experiment_id: str, log: ExampleLog) -> dict[str, int]:
    train = run_of(client, experiment_id, log.adapter.leaf_hash)
    traces = client.search_traces(locations=[experiment_id])
    return {
        "runs": len(client.search_runs([experiment_id])),
        "models": len(client.search_logged_models([experiment_id])),
        "versions": len(client.search_model_versions("name = 'facts'")),
        "traces": len(traces),
        "spans": sum(len(trace.data.spans) for trace in traces),
        "assessments": sum(len(trace.info.assessments) for trace in traces),
        "loss": len(client.get_metric_history(train.info.run_id, "loss")),
        "inputs": len(train.inputs.dataset_inputs) + len(train.inputs.model_inputs),
        "outputs": len(train.outputs.model_outputs),
        "rows": [dataset.profile for dataset in rows_of(client, experiment_id)],
        "prompts": len(client.search_prompt_versions("greeting.prompt")),
    }


def rows_of(client: Any, experiment_id: str) -> Any:
    return client.search_datasets([experiment_id])


def test_training_is_a_run_with_its_curve_inputs_and_output(client: Any, experiment_id: str, log: ExampleLog) -> None:
    run = run_of(client, experiment_id, log.adapter.leaf_hash)
    steps = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in steps] == list(range(1, NUM_STEPS + 1))
    assert steps[0].timestamp == run.info.start_time < steps[-1].timestamp <= run.info.end_time
    assert run.info.status == "FINISHED" and run.info.end_time == log.adapter.leaf.time_us // 1000
    assert run.data.params["config.optimizer.lr"] == "0.001" and run.data.params["seed"] == "7"
    assert run.data.tags[TAG_DIGEST] == digest_of(log.adapter)
    people = json.loads(run.data.tags[TAG_CONTRIBUTORS])
    assert {person["name"]: (person["given"], person["kept"]) for person in people} == PEOPLE
    (refined,) = run.inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in refined.tags}
    assert refined.dataset.digest == digest_of(log.refinement).removeprefix("sha256:")[:32]
    assert tags[TAG_DIGEST] == digest_of(log.refinement) and tags["mlflow.data.context"] == "training"
    base = model_of(client, experiment_id, log.base.leaf_hash)
    adapter = model_of(client, experiment_id, log.adapter.leaf_hash)
    assert [item.model_id for item in run.inputs.model_inputs] == [base.model_id]
    assert [item.model_id for item in run.outputs.model_outputs] == [adapter.model_id]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"lineage.html", "record.json", "config.json"}


def test_refinement_lists_every_contribution(client: Any, experiment_id: str, log: ExampleLog) -> None:
    run = run_of(client, experiment_id, log.refinement.leaf_hash)
    contexts = [
        next(tag.value for tag in item.tags if tag.key == "mlflow.data.context") for item in run.inputs.dataset_inputs
    ]
    assert sorted(contexts) == ["contributed"] * len(PEOPLE) + ["refined"]
    assert run.data.metrics["rows.kept"] == sum(kept for _, kept in PEOPLE.values())
    assert run.data.metrics["rows.dropped.exact_duplicate"] == 24


def test_a_contribution_is_a_run_of_whoever_gave_it(client: Any, experiment_id: str, log: ExampleLog) -> None:
    hostile = list(PEOPLE).index("</script><script>alert('x')</script>")
    run = run_of(client, experiment_id, log.datasets[hostile].leaf_hash)
    assert run.data.params["contributor"] == list(PEOPLE)[hostile] and run.data.params["licence"] == "CC-BY-4.0"
    assert "<script>" not in run.data.tags[TAG_NOTE] and "contributed 4 rows" in run.data.tags[TAG_NOTE]
    (made,) = run.inputs.dataset_inputs
    assert {tag.key: tag.value for tag in made.tags}[TAG_LEAF] == log.datasets[hostile].leaf_hash
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"lineage.html", "record.json"}


def test_rows_of_a_refined_dataset_name_their_contributors(
    view: MlflowView, client: Any, experiment_id: str, log: ExampleLog
) -> None:
    (dataset,) = rows_of(client, experiment_id)
    num_kept = sum(kept for _, kept in PEOPLE.values())
    assert dataset.tags[TAG_LEAF] == log.refinement.leaf_hash and dataset.tags[TAG_ROWS] == f"{num_kept} of {num_kept}"
    assert view.trail.log.size > log.refinement.index
    store = view._connect().server.traces.store
    records, _ = store._load_dataset_records(dataset.dataset_id)
    assert Counter(record.tags["contributor"] for record in records) == {
        name: kept for name, (_, kept) in PEOPLE.items() if kept
    }
    mira = next(
        record
        for record in records
        if record.inputs["messages"][0]["content"].endswith("Mira, lighthouses say in line 3?")
    )
    leaf = log.datasets[list(PEOPLE).index("Mira, lighthouses")].leaf_hash
    assert mira.expectations == {"expected_response": "Line 3 of Mira, lighthouses."}
    assert mira.tags["contribution"] == leaf and mira.source.source_data == {"doc_uri": f"trailmark:{leaf}#line=3"}


def test_prompt_records_are_prompt_versions(client: Any, log: ExampleLog, experiment_id: str) -> None:
    versions = client.search_prompt_versions("greeting.prompt")
    assert {version.version: version.template for version in versions} == {1: PROMPT_TEXTS[0], 2: PROMPT_TEXTS[1]}
    newest = client.get_prompt_version_by_alias("greeting.prompt", "current")
    assert newest.version == 2 and newest.description.startswith("By Mira, lighthouses, log entry ")
    assert [item.name for item in client.search_prompts(f'experiment_id = "{experiment_id}"')] == ["greeting.prompt"]


def test_adapter_is_a_model_with_its_benchmark_page_and_note(
    client: Any, experiment_id: str, log: ExampleLog, tmp_path: Path
) -> None:
    adapter = model_of(client, experiment_id, log.adapter.leaf_hash)
    metrics = {metric.key: metric for metric in adapter.metrics}
    assert metrics["contains"].value == pytest.approx(0.9)
    assert metrics["contains"].dataset_name == "fictional-facts"
    assert metrics["final_loss"].dataset_name == "facts-refined"
    assert adapter.status == "READY" and adapter.tags["trailmark.published"] == "facts@1"
    text = adapter.tags[TAG_NOTE]
    assert "Mira, lighthouses: 30 of 30 rows kept" in text and log.adapter.leaf_hash in text
    assert "<script>" not in text
    page = client.download_artifacts(
        run_of(client, experiment_id, log.adapter.leaf_hash).info.run_id, "lineage.html", str(tmp_path)
    )
    assert log.adapter.leaf_hash in Path(page).read_text(encoding="utf-8")
    assert [item.path for item in client.list_logged_model_artifacts(adapter.model_id)] == ["lineage.html"]


def test_benchmark_run_takes_both_models_and_puts_out_none(client: Any, experiment_id: str, log: ExampleLog) -> None:
    run = run_of(client, experiment_id, log.benchmark.leaf_hash)
    models = {model_of(client, experiment_id, entry.leaf_hash).model_id for entry in (log.adapter, log.base)}
    assert {item.model_id for item in run.inputs.model_inputs} == models
    assert not run.outputs or not run.outputs.model_outputs
    assert run.data.metrics["contains.base"] == 0.0
    assert run.data.metrics["loss.change"] == pytest.approx(-3.5)


def test_settlement_run_names_what_each_player_was_worth(client: Any, experiment_id: str, log: ExampleLog) -> None:
    (entry,) = log.trail.entries(kind="settlement")
    run = run_of(client, experiment_id, entry.leaf_hash)
    models = {model_of(client, experiment_id, made.leaf_hash).model_id for made in (log.adapter, log.base)}
    assert {item.model_id for item in run.inputs.model_inputs} == models
    assert run.data.metrics["utility.with_all"] == pytest.approx(-0.812345)
    assert run.data.params["num_players"] == "2"
    note = run.data.tags[TAG_NOTE]
    assert "Mira, lighthouses (contributor): **+1.2500** (+0.7500 to +1.5000), helped" in note
    assert "<script>" not in note and "no measurable effect" in note


def test_publication_is_a_version_with_alias(client: Any, experiment_id: str, log: ExampleLog) -> None:
    version = client.get_model_version_by_alias("facts", "current")
    assert client.get_model_version_by_alias("facts", "release-1").version == version.version
    assert version.tags[TAG_LEAF] == log.publication.leaf_hash and version.tags["trailmark.version"] == "1"
    adapter = model_of(client, experiment_id, log.adapter.leaf_hash)
    assert version.source == f"models:/{adapter.model_id}" and version.run_id == adapter.source_run_id


def test_workflows_patches_effects_and_approvals_are_runs(client: Any, experiment_id: str, log: ExampleLog) -> None:
    runs = {}
    for kind in ("workflow_patch", "workflow_run", "workflow_effect", "approval"):
        (entry,) = log.trail.entries(kind=kind)
        runs[kind] = run_of(client, experiment_id, entry.leaf_hash)
        assert {file.path for file in client.list_artifacts(runs[kind].info.run_id)} >= {"lineage.html", "record.json"}
    assert {kind: run.info.status for kind, run in runs.items() if run.info.status != "FINISHED"} == {
        "workflow_run": "FAILED"
    }
    notes = {kind: run.data.tags[TAG_NOTE] for kind, run in runs.items()}
    assert "- train: failed: out of memory" in notes["workflow_run"]
    assert notes["workflow_patch"].startswith("keeper&#95;1 changed workflow road: fewer &#42;steps&#42;")
    assert "0.400 to **0.600**, change +0.200 (+0.050 to +0.350, 40 items)" in notes["workflow_effect"]
    assert runs["workflow_effect"].data.metrics["facts.accuracy.change"] == 0.2
    assert notes["approval"].startswith("keeper&#95;1 **approved** `sha256:")
    diff = client.download_artifacts(runs["workflow_patch"].info.run_id, "patch.diff")
    assert "+name: road" in Path(diff).read_text()


def test_completions_are_traces_of_the_model_that_answered(client: Any, experiment_id: str, log: ExampleLog) -> None:
    adapter = model_of(client, experiment_id, log.adapter.leaf_hash).model_id
    base = model_of(client, experiment_id, log.base.leaf_hash).model_id
    by_adapter = client.search_traces(
        locations=[experiment_id], filter_string=f"metadata.`mlflow.modelId` = '{adapter}'"
    )
    by_base = client.search_traces(locations=[experiment_id], filter_string=f"metadata.`mlflow.modelId` = '{base}'")
    assert {trace.info.client_request_id for trace in by_adapter} == set(log.receipt_ids[:2])
    assert [trace.info.client_request_id for trace in by_base] == log.receipt_ids[2:]
    trace = client.get_trace(trace_id_of(log.receipt_ids[0]))
    assert (
        trace.info.request_preview == "Which lamp burns at Vellmoor?" and trace.info.response_preview == "A green one."
    )
    assert trace.info.token_usage == {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    completion, provenance = sorted(trace.data.spans, key=lambda span: span.name)
    assert completion.parent_id is None and provenance.parent_id == completion.span_id
    assert provenance.inputs["log_leaf"] == log.completions[0].leaf_hash
    assert provenance.outputs["adapter_record"] == log.adapter.leaf_hash
    assert {person["name"] for person in provenance.outputs["contributors"]} == set(PEOPLE)
    assert "- Mira, lighthouses: 30 of 30 rows kept" in provenance.outputs["summary"]
    assert "base model alone" in by_base[0].data.spans[-1].outputs["summary"]


@needs_browser
def test_mlflow_shows_provenance_and_the_page_that_proves_itself_in_its_frame(
    view: MlflowView, server: MlflowProcess, log: ExampleLog, experiment_id: str
) -> None:
    """The format of custom views is MLflow's own and undocumented: a real browser says whether it still draws ours."""
    place = f"{server.uri}/#/experiments/{experiment_id}"
    shown = "[...document.querySelectorAll('button, div, span')].filter((e) => e.offsetParent)"
    with Browser() as browser:
        browser.call("Page.navigate", url=f"{place}/traces/{trace_id_of(log.receipt_ids[0])}")
        browser.click(f"{shown}.filter((e) => e.innerText.trim() === 'Default view').at(-1)")
        items = "[...document.querySelectorAll('[role^=menuitem], [role=option]')]"
        browser.click(f"{items}.filter((e) => e.innerText.includes('Provenance'))[0]")
        browser.wait("document.body.innerText.includes('Mira, lighthouses: 30 of 30 rows kept')")
        assert log.receipt_ids[0] in browser.evaluate("document.body.innerText")
        browser.call("Page.navigate", url="about:blank")
        model_id = view.cursor.get(log.adapter.leaf_hash, "model")
        browser.call("Page.navigate", url=f"{place}/models/{model_id}/artifacts")
        browser.click(f"{shown}.filter((e) => e.innerText.trim() === 'lineage.html').at(-1)")
        browser.wait("document.querySelector('iframe[sandbox=allow-scripts]')")
        deadline = time.monotonic() + 60
        while browser.in_frame("document.body.dataset.proof", "#proof") != "good":
            assert time.monotonic() < deadline, browser.in_frame("document.body.innerText", "#proof")


def test_influence_is_assessed_on_its_trace(client: Any, log: ExampleLog) -> None:
    items = {item.name: item for item in client.get_trace(trace_id_of(log.receipt_ids[0])).info.assessments}
    assert items[ASSESSMENT].value == "Mira, lighthouses"
    assert items[ASSESSMENT_SHARES].value == {"Mira, lighthouses": 0.71, "Noor, lighthouses": 0.12}
    assert items[ASSESSMENT].metadata[TAG_LEAF] == log.influences[0].leaf_hash
    assert "71.0% (56.0% to 83.0%)" in items[ASSESSMENT].rationale


def test_a_share_of_nothing_names_nobody(client: Any, log: ExampleLog) -> None:
    items = {item.name: item.value for item in client.get_trace(trace_id_of(log.receipt_ids[1])).info.assessments}
    assert items == {ASSESSMENT: NOBODY, ASSESSMENT_SHARES: {"Mira, lighthouses": 0.0}}


def test_a_second_sync_adds_nothing_even_without_its_cursor(
    view: MlflowView, client: Any, experiment_id: str, log: ExampleLog, server: MlflowProcess, tmp_path: Path
) -> None:
    before = counts(client, experiment_id, log)
    assert view.sync() == 0
    fresh = MlflowView(log.trail, server.uri, cursor_file=tmp_path / "lost.sqlite")
    assert fresh.sync() == NUM_SHOWN
    fresh.close()
    assert counts(client, experiment_id, log) == before


def test_what_was_altered_or_deleted_is_found_and_mended(
    view: MlflowView, client: Any, experiment_id: str, log: ExampleLog
) -> None:
    assert view.reconcile(repair=False) == []
    adapter = model_of(client, experiment_id, log.adapter.leaf_hash)
    client.set_logged_model_tags(adapter.model_id, {TAG_CONTRIBUTORS: "[]"})
    benchmark = run_of(client, experiment_id, log.benchmark.leaf_hash)
    client.delete_run(benchmark.info.run_id)
    client.delete_traces(experiment_id, trace_ids=[trace_id_of(log.receipt_ids[0])])
    stranger = client.create_run(experiment_id, run_name="not ours")
    (rows,) = rows_of(client, experiment_id)
    store = view._connect().server.traces.store
    (record, *_), _ = store._load_dataset_records(rows.dataset_id)
    forged = {"inputs": record.inputs, "tags": {"contributor": "Copycat"}}
    store.upsert_dataset_records(rows.dataset_id, [forged])
    client.set_prompt_version_tag("greeting.prompt", 1, "mlflow.prompt.text", "Answer as you like.")
    found = {(item.problem, item.role) for item in view.reconcile(repair=False)}
    assert found == {
        ("altered", "model"),
        ("missing", "run"),
        ("missing", "trace"),
        ("missing", "assessment"),
        ("altered", "dataset"),
        ("altered", "prompt"),
        ("unknown", "run"),
    }
    left = view.reconcile()
    assert [(item.problem, item.mlflow_id) for item in left] == [("unknown", stranger.info.run_id)]
    client.delete_run(stranger.info.run_id)
    assert view.reconcile(repair=False) == []


def test_a_refused_record_is_set_aside_and_the_next_ones_go_on(
    view: MlflowView, client: Any, experiment_id: str, log: ExampleLog
) -> None:
    assert log.benchmark.record is not None
    body: Any = log.benchmark.record.body
    spoiled = replace(body, metrics=(replace(body.metrics[0], metric="100% right?"),))
    inputs = log.benchmark.record.inputs
    refused = log.trail.record("benchmark", spoiled, inputs=inputs, outputs=[Artefact("table", "d", body.details)])
    batch = answer(log, {"And then?": "It goes on."})
    assert view.sync() == 1
    assert [aside.log_index for aside in view.asides()] == [refused.index] and "100% right?" in view.asides()[0].error
    assert client.get_trace(trace_id_of(log.receipt_ids[-1])).info.trace_metadata[TAG_LEAF] == batch.leaf_hash


def test_a_record_that_cannot_be_read_does_not_stop_the_next_ones(view: MlflowView, log: ExampleLog) -> None:
    broken = log.trail.store.put_blob(b"no table")
    assert log.completions[0].record is not None
    body: Any = log.completions[0].record.body
    damaged = log.trail.record("completions", replace(body, table=broken), parents=log.completions[0].leaf.parents)
    batch = answer(log, {"Still there?": "Still here."})
    assert view.sync() == 1
    assert damaged.index in [aside.log_index for aside in view.asides()]
    assert view.cursor.next_index == batch.index + 1


def test_away_server_moves_nothing_and_an_emptied_one_is_refilled_by_the_follower(
    view: MlflowView, log: ExampleLog, server: MlflowProcess
) -> None:
    position = view.cursor.next_index
    batch = answer(log, {"Is anyone there?": "Not now."})
    away = MlflowView(log.trail, DEAD_URI)
    with pytest.raises(ViewUnavailable, match="does not answer"):
        away.sync()
    assert away.cursor.next_index == position == batch.index
    away.close()
    view.close()
    server.stop()
    stop, caught_up = threading.Event(), threading.Event()

    def follow() -> None:
        follower = MlflowView(log.trail, server.uri)
        follower.follow(
            stop, interval_s=0.2, on_record=lambda entry: caught_up.set() if entry.index == batch.index else None
        )
        follower.close()

    thread = threading.Thread(target=follow)
    thread.start()
    server.empty()
    server.start()
    reached = caught_up.wait(CATCH_UP_TIMEOUT_S)
    stop.set()
    thread.join()
    assert reached, "the follower did not write the newest record"
    refilled = MlflowView(log.trail, server.uri)
    assert refilled.sync() == 0
    differences = refilled.reconcile(repair=False)
    asides = {log.trail.entry(aside.log_index).leaf_hash for aside in refilled.asides()}
    damaged = next(log.trail.entry(aside.log_index) for aside in refilled.asides() if "100%" not in aside.error)
    assert len(asides) == 2 and [item.leaf for item in differences] == [damaged.leaf_hash]  # the other has its run
    refilled.close()


def test_an_erased_row_leaves_a_real_server(log: ExampleLog, server: MlflowProcess, client: Any) -> None:
    trail, leaf = log.trail, log.refinement.leaf_hash
    view = MlflowView(trail, server.uri)
    view.sync()
    before = log.refinement.record.body.rows  # type: ignore[union-attr]
    table = trail.get_table(before)
    gone, after = table.slice(0, 1).to_pylist()[0], trail.put_table(table.slice(1))
    rewritten = (bodies.TableRewrite("refined", leaf, before, after, len(table) - 1),)
    body = bodies.RowRedactionBody(gone["dataset"], (gone["line_number"],), rewritten, "she asked")
    assert trail.record("row_redaction", body, parents=[gone["dataset"], leaf]) and view.sync() == 1
    (dataset,) = rows_of(client, str(client.get_experiment_by_name("trailmark").experiment_id))
    records, _ = view._connect().server.traces.store._load_dataset_records(dataset.dataset_id)
    left = set(table.column("example_id").to_pylist()) - {gone["example_id"]}
    assert {record.inputs["example_id"] for record in records} == left
    assert "dataset" not in {item.role for item in view.reconcile(repair=False)}
    view.close()


def test_what_was_erased_leaves_a_real_server(log: ExampleLog, server: MlflowProcess, client: Any) -> None:
    """Run, model, registered version, prompt version, traces, and the page's record; the rest stays as it was."""
    trail = log.trail
    (prompt_entry, *_) = trail.entries(kind="prompt")
    batch = log.completions[0]
    operator = Party(trail.keys.get("operator").key_id, "operator")
    view = MlflowView(trail, server.uri)
    before = view.reconcile(repair=False)
    experiment = str(client.get_experiment_by_name("trailmark").experiment_id)
    doomed = [log.adapter, prompt_entry, batch]
    erase(trail, [entry.leaf_hash for entry in doomed], reason="she asked", requester=operator)
    assert view.sync() == len(doomed)
    assert client.search_runs([experiment], f"tags.`{TAG_LEAF}` = '{log.adapter.leaf_hash}'") == []
    filters = f"tags.`{TAG_LEAF}` = '{log.adapter.leaf_hash}'"
    assert list(client.search_logged_models([experiment], filter_string=filters)) == []
    assert list(client.search_model_versions("name = 'facts'")) == []
    assert [version.version for version in client.search_prompt_versions("greeting.prompt")] == [2]
    shown = {trace.info.trace_metadata[TAG_LEAF] for trace in client.search_traces(locations=[experiment])}
    assert batch.leaf_hash not in shown and shown
    assert {item.leaf for item in view.reconcile(repair=False)} <= {item.leaf for item in before}
    view.close()


def test_names_stay_text_in_notes_and_fit_into_tags(log: ExampleLog) -> None:
    assert (
        escape("a|b <i> [x](y) `z` _u_\nv") == "a&#124;b &#60;i&#62; &#91;x&#93;&#40;y&#41; &#96;z&#96; &#95;u&#95; v"
    )
    people = [Credit(f"{number:064x}", f"Person {number}", 10, number) for number in range(500)]
    text = note("Summary.", log.adapter, people, digest=digest_of(log.adapter))
    assert "- Person 499: 499 of 10 rows kept" in text and "- 470 more: " in text
    tag = credits_json(people, max_chars=2000)
    assert len(tag) <= 2000
    shown = json.loads(tag)
    assert shown[0]["name"] == "Person 499" and shown[-1]["more"] == 500 - len(shown) + 1
