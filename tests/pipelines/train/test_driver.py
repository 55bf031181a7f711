"""Real Ray Train runs on the tiny base, against a plain torch loop."""

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
from attribution.influence.gradients import GradientFeatures, pad_batch
from attribution.influence.store import Trace
from attribution.store import StoreError
from attribution.trail import Trail
from configs.schema import TrainSettings
from pipelines.base_model import resolve_base
from pipelines.train import lora
from pipelines.train.data import Example, encode_rows, learning_rate, plan_steps
from pipelines.train.driver import Planned, TrainReport, train
from pipelines.train.refined import TrainError
from pipelines.train.trace import AttemptStarted, GradientsTaken, StepTaken
from tests.pipelines.train.refined import FACTS, add_refined

pytestmark = pytest.mark.ray

# 13 rows in batches of 4: the last batch of each epoch has one row, so one of two workers has none.
SETTINGS = TrainSettings(rank=4, alpha=8, learning_rate=5e-3, epochs=3, batch_size=4, max_length=64, num_workers=2)
LOSS_TOLERANCE = 1e-5
# Adam divides by the root of the second moment, so an element whose gradient is nearly zero turns rounding into
# movement: the plain loop in float32 differs from itself in float64 by 6.5e-5 at most, against steps of up to 5e-3.
WEIGHT_TOLERANCE, MEAN_WEIGHT_TOLERANCE = 2e-4, 1e-6


@dataclass(frozen=True)
class Trained:
    trail: Trail
    base: str
    dataset: str
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


def assert_close(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert weights.keys() == others.keys()
    differences = torch.cat([(weights[name] - others[name]).abs().flatten() for name in weights])
    assert differences.max().item() < WEIGHT_TOLERANCE and differences.mean().item() < MEAN_WEIGHT_TOLERANCE


@pytest.fixture(scope="module")
def trained(ray_cluster: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("train")
    trail = Trail.open(folder / "home")
    dataset = add_refined(trail, folder / "rows")
    events: list[object] = []
    report = train(trail, "facts", name="tiny", base=str(tiny_base), settings=SETTINGS, progress=events.append)
    return Trained(trail, str(tiny_base), dataset, report, tuple(events))


def test_loss_falls_and_progress_tells_of_every_step(trained: Trained) -> None:
    losses = trained.report.losses
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])
    assert trained.events[0] == Planned(12, len(FACTS), ())
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
    losses = []
    for step in steps:
        optimizer.param_groups[0]["lr"] = learning_rate(step.number, num_steps=len(steps), settings=SETTINGS)
        input_ids, labels, mask = pad_batch([examples[row].encoded for row in step.rows])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lora.trainable(model).values(), SETTINGS.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    assert trained.report.losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert_close(trained.weights, {name: p.detach() for name, p in lora.trainable(model).items()})


def test_record_names_what_went_in_and_came_out(trained: Trained) -> None:
    record = trained.report.entry.record
    assert record is not None and isinstance(record.body, AdapterBody)
    base = resolve_base(trained.trail, trained.base)
    assert record.body.base == base.digest and record.body.dataset == trained.dataset
    assert record.body.num_steps == 12 and record.body.num_examples == len(FACTS)
    assert record.body.final_loss_micro == round(trained.report.losses[-1] * 1e6)
    assert record.attempt == 1 and record.seed == SETTINGS.seed
    assert {(a.kind, a.digest) for a in record.inputs} == {("base_model", base.digest), ("refined", trained.dataset)}
    made = {a.kind: a.digest for a in record.outputs}
    assert made == {"adapter": trained.report.digest, "trace": trained.report.trace_digest}
    parents = {trained.trail.entry(parent).leaf.kind for parent in trained.report.entry.leaf.parents}
    assert parents == {"base_model", "refinement"}
    meta = trained.trail.store.manifest(trained.report.digest).meta
    assert meta == {"base": base.digest, "dataset": trained.dataset, "trace": trained.report.trace_digest}
    config = trained.trail.store.get_blob(record.config)
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
    assert trace.checkpoint_steps == (4, 8, 12)
    final = trace.adapter_weights(12)
    assert all(torch.equal(final[name], weight) for name, weight in trained.weights.items())


def test_gradients_are_those_of_each_example(trained: Trained) -> None:
    trace = Trace(trained.trace)
    model = lora.reload_adapter(lora.load_base(trained.base, dtype="float32"), trained.folder)
    features = GradientFeatures(model, projection_dim=trace.projection_dim, seed=trace.projection_seed)
    assert tuple(features.module_dims) == trace.module_names
    examples = trained.examples()
    for step in trace.checkpoint_steps:
        lora.set_weights(model, trace.adapter_weights(step))
        stored = torch.from_numpy(np.array(trace.gradients(step), dtype=np.float32))
        assert stored.shape == (len(FACTS), features.dim)
        for row in (0, 5, 12):
            (fresh,) = features.features([examples[row].encoded], exp_avg_sq=trace.exp_avg_sq(step))
            assert nn.functional.cosine_similarity(fresh, stored[row], dim=0) > 0.9999
            assert fresh.norm().item() == pytest.approx(stored[row].norm().item(), rel=1e-3)


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

        if (attempt, rank, step) == (1, 1, 7):
            os._exit(1)

    events: list[object] = []
    run = partial(train, trained.trail, "facts", name="survivor", base=trained.base, settings=SETTINGS)
    report = run(hook=die_once, progress=events.append)
    assert report.num_attempts == 2
    assert report.entry.record is not None and report.entry.record.attempt == 2
    assert [event.step for event in events if isinstance(event, AttemptStarted)] == [0, 4]
    assert report.losses == trained.report.losses
    files = {file.path: file.sha256 for file in trained.trail.store.manifest(report.digest).files}
    assert files == {file.path: file.sha256 for file in trained.trail.store.manifest(trained.report.digest).files}


def test_loss_does_not_depend_on_the_number_of_workers(trained: Trained) -> None:
    settings = SETTINGS.model_copy(update={"num_workers": 1, "zero_stage": 1, "num_checkpoints": 1})
    report = train(trained.trail, trained.dataset, name="alone", base=trained.base, settings=settings)
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
    settings = SETTINGS.model_copy(update={"zero_stage": 3, "dtype": dtype})
    report = train(trained.trail, "facts", name="zero3", base=trained.base, settings=settings)
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
