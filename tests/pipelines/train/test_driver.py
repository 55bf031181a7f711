"""Real Ray Train runs on the tiny base, against a plain torch loop."""

import io
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attribution.bodies import AdapterBody
from attribution.influence.encode import encode_example, num_targets
from attribution.influence.factors import LoraFactors, pad_batch
from attribution.influence.gradient_store import GradientStore
from attribution.influence.rows import STORE_FOLDER
from attribution.influence.store import Trace, TraceError
from attribution.store import StoreError
from attribution.trail import Trail
from configs.schema import TrainSettings
from pipelines.base_model import resolve_base
from pipelines.replay import replay_from
from pipelines.train import lora
from pipelines.train.data import Example, encode_rows, learning_rate, plan_steps
from pipelines.train.driver import Planned, TrainReport, train
from pipelines.train.refined import TrainError
from pipelines.train.segment import SegmentError
from pipelines.train.trace import AttemptStarted, GradientsTaken, StepTaken
from tests.pipelines.train.refined import FACTS, add_refined
from tests.tiny_model import conversation

pytestmark = pytest.mark.ray

# 13 rows in batches of 4: the last batch of each epoch has one row, so one of two workers has none.
SETTINGS = TrainSettings(
    rank=4,
    alpha=8,
    learning_rate=5e-3,
    epochs=3,
    batch_size=4,
    max_length=64,
    num_workers=2,
    num_states=6,
    in_run_refresh_steps=1,
    in_run_per_query=True,
)
QUERIES = (("What is the capital of Norway, please?", "Oslo."), ("And what do cows eat?", "Cows eat grass."))
LOSS_TOLERANCE = 1e-5
# Adam divides by the root of the second moment, so an element whose gradient is nearly zero turns rounding into
# movement: the plain loop in float32 differs from itself in float64 by 6.5e-5 at most, against steps of up to 5e-3.
WEIGHT_TOLERANCE, MEAN_WEIGHT_TOLERANCE = 2e-4, 1e-6


@dataclass(frozen=True)
class Trained:
    trail: Trail
    base: str
    dataset: str
    settings: TrainSettings
    report: TrainReport
    events: tuple[object, ...]

    @property
    def folder(self) -> Path:
        return self.trail.store.get_directory(self.report.digest)

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / lora.ADAPTER_WEIGHTS_FILE)

    @property
    def trace(self) -> Path:
        return self.trail.store.get_directory(self.report.trace_digest)

    def examples(self) -> tuple[Example, ...]:
        import pyarrow.parquet as pq
        from transformers import AutoTokenizer

        rows = pq.read_table(self.trail.store.get_directory(self.dataset) / "rows.parquet")
        return encode_rows(rows, AutoTokenizer.from_pretrained(self.base), max_length=SETTINGS.max_length).examples

    def queries(self) -> list[Example]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        encoded = [encode_example(tokenizer, conversation(*pair), max_length=64) for pair in QUERIES]
        return [Example(i, f"q{i}", "", "", tuple(ids), tuple(labels)) for i, (ids, labels) in enumerate(encoded)]


def assert_close(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert weights.keys() == others.keys()
    differences = torch.cat([(weights[name] - others[name]).abs().flatten() for name in weights])
    assert differences.max().item() < WEIGHT_TOLERANCE and differences.mean().item() < MEAN_WEIGHT_TOLERANCE


@pytest.fixture(scope="module")
def trained(ray_cluster: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("train")
    trail = Trail.open(folder / "home")
    dataset = add_refined(trail, folder / "rows")
    settings = SETTINGS.model_copy(update={"query_sets": (str(write_suite(folder / "held-out.jsonl")),)})
    events: list[object] = []
    report = train(trail, "facts", name="tiny", base=str(tiny_base), settings=settings, progress=events.append)
    return Trained(trail, str(tiny_base), dataset, settings, report, tuple(events))


def write_suite(path: Path) -> Path:
    rows = [{"id": f"q{i}", "prompt": q, "expected": [a], "reference": a} for i, (q, a) in enumerate(QUERIES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_loss_falls_and_progress_tells_of_every_step(trained: Trained) -> None:
    losses = trained.report.losses
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])
    assert trained.events[0] == Planned(12, len(FACTS), (), refresh_steps=1)
    assert [event.step for event in trained.events if isinstance(event, StepTaken)] == list(range(1, 13))
    assert [event.world_size for event in trained.events if isinstance(event, AttemptStarted)] == [2]
    assert isinstance(trained.events[-1], GradientsTaken)
    assert trained.events[-1].num_done == trained.events[-1].num_total == 3 * len(FACTS)
    assert not list((trained.trail.home / "run" / "train").iterdir())


def test_equals_a_plain_torch_loop(trained: Trained) -> None:
    torch.set_num_threads(1)
    model = lora.build_model(lora.load_base(trained.base, dtype="float32"), base_name="", settings=SETTINGS)
    optimizer = torch.optim.AdamW(lora.trainable(model).values(), lr=0.0, weight_decay=0.0)
    examples = trained.examples()
    steps = plan_steps(examples, SETTINGS)
    losses, norms = [], []
    names, queries = list(lora.trainable(model)), trained.queries()
    scores = np.zeros((2, len(examples), len(queries)))
    for step in steps:
        optimizer.param_groups[0]["lr"] = learning_rate(step.number, num_steps=len(steps), settings=SETTINGS)
        input_ids, labels, mask = pad_batch([examples[row].encoded for row in step.rows])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        along = [flat_gradient(model, [query]) for query in queries]
        num_targets = sum(examples[row].num_target_tokens for row in step.rows)
        alone = {row: flat_gradient(model, [examples[row]]) for row in step.rows}
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(lora.trainable(model).values(), SETTINGS.max_grad_norm).item())
        optimizer.step()
        losses.append(loss.item())
        second = torch.cat([optimizer.state[lora.trainable(model)[name]]["exp_avg_sq"].flatten() for name in names])
        divisor = (second / (1 - 0.999**step.number)).sqrt() + 1e-8
        scale = optimizer.param_groups[0]["lr"] * min(1.0, SETTINGS.max_grad_norm / (norms[-1] + 1e-6))
        for j, query in enumerate(along):
            for row, own in alone.items():
                share = examples[row].num_target_tokens / num_targets
                scores[0, row, j] += scale * share * float(own @ query)
                scores[1, row, j] += scale * share * float(own @ (query / divisor))
    trace = Trace(trained.trace)
    assert [step.grad_norm for step in trace.steps] == pytest.approx(norms, rel=1e-3)
    for m, method in enumerate(("sgd", "adam")):
        found = np.stack([trace.in_run_scores("held-out", query=f"q{j}", method=method) for j in range(2)], axis=1)  # type: ignore[arg-type]
        assert np.corrcoef(found.ravel(), scores[m].ravel())[0, 1] > 0.999
        assert np.abs(found - scores[m]).max() < 0.01 * np.abs(scores[m]).max()
    assert trained.report.losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert_close(trained.weights, {name: p.detach() for name, p in lora.trainable(model).items()})


def flat_gradient(model: nn.Module, rows: list[Example]) -> Tensor:
    """The gradient of the rows' mean loss per target token, by torch alone."""
    input_ids, labels, mask = pad_batch([row.encoded for row in rows])
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lora.trainable(model).values()))])


def test_record_names_what_went_in_and_came_out(trained: Trained) -> None:
    record = trained.report.entry.record
    assert record is not None and isinstance(record.body, AdapterBody)
    base = resolve_base(trained.trail, trained.base)
    assert record.body.base == base.digest and record.body.dataset == trained.dataset
    assert record.body.num_steps == 12 and record.body.num_examples == len(FACTS)
    assert record.body.final_loss_micro == round(trained.report.losses[-1] * 1e6)
    assert record.attempt == 1 and record.seed == SETTINGS.seed
    (queried,) = [a for a in record.inputs if a.kind == "suite"]
    assert queried.name == "held-out" and trained.trail.store.get_blob(queried.digest).count(b"\n") == len(QUERIES)
    others = {(a.kind, a.digest) for a in record.inputs} - {(queried.kind, queried.digest)}
    assert others == {("base_model", base.digest), ("refined", trained.dataset)}
    made = {a.kind: a.digest for a in record.outputs}
    assert made == {"adapter": trained.report.digest, "trace": trained.report.trace_digest}
    parents = {trained.trail.entry(parent).leaf.kind for parent in trained.report.entry.leaf.parents}
    assert parents == {"base_model", "refinement"}
    meta = trained.trail.store.manifest(trained.report.digest).meta
    assert meta == {"base": base.digest, "dataset": trained.dataset, "trace": trained.report.trace_digest}
    config = trained.trail.store.get_blob(record.config)
    assert f'"query_sets":["{queried.digest}"]'.encode() in config
    assert b'"learning_rate":"0.005"' in config


def test_trace_tells_which_example_was_seen_when(trained: Trained) -> None:
    trace = Trace(trained.trace)
    examples = trained.examples()
    planned = plan_steps(examples, SETTINGS)
    assert [step.example_ids for step in trace.steps] == [
        tuple(examples[row].example_id for row in step.rows) for step in planned
    ]
    assert [step.lr for step in trace.steps] == pytest.approx(
        [learning_rate(step.number, num_steps=12, settings=SETTINGS) for step in planned]
    )
    assert [e.example_id for e in trace.examples] == [e.example_id for e in examples]
    assert [e.num_target_tokens for e in trace.examples] == [e.num_target_tokens for e in examples]
    assert trace.checkpoint_steps == (4, 8, 12) and set(trace.checkpoint_steps) < set(trace.state_steps)
    assert [step.rows for step in trace.steps] == [step.rows for step in planned]
    assert list(trace.encoded) == [example.encoded for example in examples]
    final = trace.adapter_weights(12)
    assert all(torch.equal(final[name], weight) for name, weight in trained.weights.items())


def test_trace_holds_all_that_decides_the_bits(trained: Trained) -> None:
    facts = Trace(trained.trace).facts
    assert facts == trained.report.facts
    assert (facts.adam.beta1, facts.adam.beta2, facts.adam.eps) == (0.9, 0.999, 1e-8)
    assert (facts.weight_decay, facts.max_grad_norm, facts.world_size, facts.threads_per_worker) == (0, 1, 2, 1)
    assert (facts.dtype, facts.attention, facts.deterministic, facts.device) == ("float32", "sdpa", False, "cpu")
    assert facts.num_parameters == sum(weight.numel() for weight in trained.weights.values())
    assert [(attempt.step, attempt.world_size) for attempt in facts.attempts] == [(0, 2)]
    assert facts.versions["torch"] == torch.__version__
    start = Trace(trained.trace).state(0)
    fresh = lora.build_model(lora.load_base(trained.base, dtype="float32"), base_name="", settings=SETTINGS)
    assert all(torch.equal(start.weights[name], p.detach()) for name, p in lora.trainable(fresh).items())
    assert not any(moment.any() for moment in (*start.exp_avg.values(), *start.exp_avg_sq.values()))


def test_a_stretch_replays_to_the_same_bits(trained: Trained) -> None:
    """Without the query set, too: watching changes nothing."""
    assert trained.report.facts.state_steps == (2, 4, 6, 8, 10, 12)
    report = replay_from(trained.trail, trained.report.entry, 6)
    assert report.equal and report.largest_difference is None, report.facts
    assert report.facts[0].fact == "weights after step 8"


def test_an_end_and_a_step_without_a_state_are_refused(trained: Trained) -> None:
    with pytest.raises(SegmentError, match="step 12: the run ended there"):
        replay_from(trained.trail, trained.report.entry, 12)
    with pytest.raises(TraceError, match="no state after step 5; there are those after 0, 2, 4, 6"):
        replay_from(trained.trail, trained.report.entry, 5)


def test_a_set_that_was_not_registered_is_named(trained: Trained) -> None:
    trace = Trace(trained.trace)
    assert trained.report.in_run is not None and trained.report.in_run.num_refreshes == 12
    assert trained.report.in_run.overhead > 0
    both = sum(
        trace.in_run_scores("held-out", query=f"q{i}") * num_targets(query.labels)
        for i, query in enumerate(trained.queries())
    )
    total = sum(num_targets(query.labels) for query in trained.queries())
    assert trace.in_run_scores("held-out") == pytest.approx(both / total, rel=1e-4)
    with pytest.raises(TraceError, match=r"'other': the run was not scored against it; registered .*: held-out"):
        trace.in_run_scores("other")
    with pytest.raises(TraceError, match="query 'q7'"):
        trace.in_run_scores("held-out", query="q7")


def test_the_trace_command_shows_what_there_is(trained: Trained) -> None:
    from rich.console import Console

    from cluster.commands.trace_tables import trace_view

    console = Console(record=True, width=200, file=io.StringIO())
    console.print(*trace_view(trained.trail, "tiny", top=2))
    shown = console.export_text()
    assert "after steps 0, 2, 4, 6, 8, 10, 12; 0.1 MB each" in shown, shown
    assert "2 workers of 1 threads, ZeRO-2" in shown and "float32 on cpu, sdpa attention" in shown
    scores = Trace(trained.trace).in_run_scores("held-out")
    best = trained.examples()[int(scores.argmax())]
    assert f"{scores.max():+.2e}" in shown and best.example_id[:19] in shown


def test_gradients_are_those_of_each_example(trained: Trained) -> None:
    trace = Trace(trained.trace)
    model = lora.reload_adapter(lora.load_base(trained.base, dtype="float32"), trained.folder)
    factors = LoraFactors(model)
    assert tuple(module.name for module in factors.modules) == trace.module_names
    examples = trained.examples()
    store = GradientStore(trained.trace / STORE_FOLDER)
    assert store.ids() == tuple(example.example_id for example in examples)
    assert store.steps == tuple(map(str, trace.checkpoint_steps)) and store.views == store.steps[-1:]
    np.testing.assert_allclose(store.shards[0].weights, trace.exposure().sum(axis=0)[:, None], rtol=1e-6)
    exposure = torch.from_numpy(trace.exposure()).float()
    codec, stored = store.codec(store.views[0]), torch.from_numpy(store.shards[0].rows(store.views[0]).values())
    assert stored.shape == (len(FACTS), codec.dim)
    for row in (0, 5, 12):
        summed = torch.zeros(codec.dim)
        for number, step in enumerate(trace.checkpoint_steps):
            lora.set_weights(model, trace.adapter_weights(step))
            pairs = factors.pairs([examples[row].encoded])
            length = sum(pair.gradient().square().sum() for pair in pairs.values()) ** 0.5
            summed += exposure[number, row] / exposure[:, row].sum() * codec.encode(pairs)[0] / length
        assert nn.functional.cosine_similarity(summed, stored[row], dim=0) > 0.999
        unit = stored[row].norm() / float(store.shards[0].lengths(store.views[0])[row])
        assert unit.item() == pytest.approx(summed.norm().item(), rel=1e-2)
    assert store.residual is not None


def test_reloads_as_any_peft_adapter_and_changes_the_base(trained: Trained) -> None:
    from peft import PeftModel

    assert trained.report.reload_max_abs_diff <= SETTINGS.reload_tolerance
    model = PeftModel.from_pretrained(lora.load_base(trained.base, dtype="float32"), str(trained.folder))
    examples = trained.examples()[:4]
    tuned = lora.probe_logits(model, examples)
    with model.disable_adapter():
        plain = lora.probe_logits(model, examples)
    assert (tuned - plain).abs().max() > 1.0


def test_killed_worker_resumes_to_the_same_bits(trained: Trained) -> None:
    def die_once(attempt: int, rank: int, step: int) -> None:
        import os

        if (attempt, rank, step) == (1, 1, 6):
            os._exit(1)

    events: list[object] = []
    run = partial(train, trained.trail, "facts", name="survivor", base=trained.base, settings=trained.settings)
    report = run(hook=die_once, progress=events.append)
    assert report.num_attempts == 2
    assert report.entry.record is not None and report.entry.record.attempt == 2
    assert [event.step for event in events if isinstance(event, AttemptStarted)] == [0, 4]
    assert report.losses == trained.report.losses
    files = {file.path: file.sha256 for file in trained.trail.store.manifest(report.digest).files}
    assert files == {file.path: file.sha256 for file in trained.trail.store.manifest(trained.report.digest).files}
    resumed, trace = Trace(trained.trail.store.get_directory(report.trace_digest)), Trace(trained.trace)
    assert [attempt.step for attempt in resumed.facts.attempts] == [0, 4]
    assert np.array_equal(resumed.in_run_scores("held-out"), trace.in_run_scores("held-out"))


def test_loss_does_not_depend_on_the_number_of_workers(trained: Trained) -> None:
    rarely = {"in_run_refresh_steps": 5, "in_run_per_query": False}
    settings = trained.settings.model_copy(
        update={"num_workers": 1, "zero_stage": 1, "num_checkpoints": 1, "num_states": None, **rarely}
    )
    report = train(trained.trail, trained.dataset, name="alone", base=trained.base, settings=settings)
    assert report.in_run is not None and report.in_run.num_refreshes == 3  # before steps 1, 6 and 11
    scores = [
        Trace(trained.trail.store.get_directory(one.trace_digest)).in_run_scores("held-out", method="sgd")
        for one in (report, trained.report)
    ]
    assert np.corrcoef(scores)[0, 1] > 0.7
    assert report.losses == pytest.approx(trained.report.losses, abs=LOSS_TOLERANCE)
    alone = load_file(trained.trail.store.get_directory(report.digest) / lora.ADAPTER_WEIGHTS_FILE)
    assert_close(alone, trained.weights)


def test_a_hopeless_run_stops_at_once_and_records_nothing(trained: Trained) -> None:
    before = trained.trail.log.size
    settings = SETTINGS.model_copy(update={"num_workers": 1, "learning_rate": 1e30, "warmup_ratio": 0.0})
    events: list[object] = []
    with pytest.raises(TrainError, match=r"loss is (nan|inf) at step [23]; lower train.learning_rate=1e\+30"):
        train(trained.trail, "facts", name="nan", base=trained.base, settings=settings, progress=events.append)
    assert sum(isinstance(event, AttemptStarted) for event in events) == 1
    assert trained.trail.log.size == before


def test_unknown_module_is_named(trained: Trained) -> None:
    settings = SETTINGS.model_copy(update={"num_workers": 1, "target_modules": ("nose_proj",)})
    with pytest.raises(TrainError, match="nose_proj"):
        train(trained.trail, "facts", name="bad", base=trained.base, settings=settings)


def test_unknown_dataset_is_named(trained: Trained) -> None:
    with pytest.raises(TrainError, match="dataset 'facst': no such refined dataset; known: facts"):
        train(trained.trail, "facst", name="bad", base=trained.base, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_3_trains_and_reloads(trained: Trained, dtype: str) -> None:
    settings = trained.settings.model_copy(update={"zero_stage": 3, "dtype": dtype})
    report = train(trained.trail, "facts", name="zero3", base=trained.base, settings=settings)
    trace = Trace(trained.trail.store.get_directory(report.trace_digest))
    pairs = [t.in_run_scores("held-out", method="sgd") for t in (trace, Trace(trained.trace))]
    assert np.corrcoef(pairs)[0, 1] > (0.999 if dtype == "float32" else 0.9)
    assert trace.state(12).exp_avg.keys() == trace.state(0).weights.keys()
    assert report.losses == pytest.approx(trained.report.losses, abs=1e-4 if dtype == "float32" else 0.3)


def test_altered_adapter_is_refused(trained: Trained, tmp_path: Path) -> None:
    from attribution.store import Store

    copy = Store(tmp_path / "store")
    shutil.copytree(trained.trail.store.root, tmp_path / "store", dirs_exist_ok=True)
    weights = copy.path_of(trained.report.digest) / lora.ADAPTER_WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StoreError, match=lora.ADAPTER_WEIGHTS_FILE):
        copy.get_directory(trained.report.digest)
