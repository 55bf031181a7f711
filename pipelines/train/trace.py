"""What a run writes down: a journal while it trains, and from it the trace directory that attribution reads.

run.json          attribution.influence.store.RunFacts
steps.parquet     step, lr, loss (mean nats per target token before the update), example_ids, time_us, grad_norm
examples.parquet  row, example_id, contributor, num_target_tokens, text, input_ids, labels
checkpoints/0/adapter_model.safetensors                       the weights that training began with
checkpoints/<step>/{adapter_model,exp_avg,exp_avg_sq}.safetensors
gradients/store/  see attribution/influence/gradient_store.py      gradients/meta.json
in_run/steps.npy  float32 [num_steps, 2 (sgd, adam), batch_size, num_queries]      in_run/meta.json
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.influence.run_facts import (
    IN_RUN_META_FILE,
    IN_RUN_SCORES_FILE,
    RUN_FILE,
    AdamConstants,
    Attempt,
    InRunMeta,
    RunFacts,
)
from configs.schema import TrainSettings
from pipelines.train.data import Example, write_examples

if TYPE_CHECKING:
    import torch

    from attribution.influence.codec import GradientCodec
    from pipelines.train.queries import Registered

JOURNAL_FILE = "journal.jsonl"
ADAM = AdamConstants(beta1=0.9, beta2=0.999, eps=1e-8)

STEPS_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("lr", pa.float64()),
        ("loss", pa.float64()),
        ("example_ids", pa.list_(pa.string())),
        ("time_us", pa.int64()),
        ("grad_norm", pa.float64()),
    ]
)


@dataclass(frozen=True)
class AttemptStarted:
    """A worker group began; `step` is the cursor: updates already in its checkpoint."""

    attempt: int
    world_size: int
    step: int
    time_us: int
    event: Literal["attempt"] = "attempt"


@dataclass(frozen=True)
class StepTaken:
    """One update. `loss` and `grad_norm` (before the clip) are of the weights before it; tokens of all workers.

    `in_run_seconds` of its `seconds` went into in-run scores; `refreshed`: the queries' gradients were taken anew.
    """

    step: int
    lr: float
    loss: float
    rows: tuple[int, ...]
    num_tokens: int
    padding_share: float
    seconds: float
    time_us: int
    grad_norm: float = 0.0
    in_run_seconds: float = 0.0
    refreshed: bool = False
    event: Literal["step"] = "step"


@dataclass(frozen=True)
class GradientsTaken:
    """`num_done` of `num_total` example gradients are computed on rank 0."""

    num_done: int
    num_total: int
    event: Literal["gradients"] = "gradients"


Event = AttemptStarted | StepTaken | GradientsTaken
_EVENTS: dict[str, type[Any]] = {"attempt": AttemptStarted, "step": StepTaken, "gradients": GradientsTaken}


class Journal:
    """An append-only file of events in a run's folder; written by rank 0, followed by the driver."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / JOURNAL_FILE

    def append(self, event: Event) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")

    def read(self) -> list[Event]:
        return list(JournalFollower(self.path).new_events())

    def attempts(self) -> list[AttemptStarted]:
        return [event for event in self.read() if isinstance(event, AttemptStarted)]

    def steps(self) -> list[StepTaken]:
        """Return the steps that led to the final weights: of a step taken twice, the later."""
        latest = {event.step: event for event in self.read() if isinstance(event, StepTaken)}
        return [latest[number] for number in sorted(latest)]


class JournalFollower:
    """Reads a journal while it grows; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new_events(self) -> Iterator[Event]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield _event(json.loads(line))


@dataclass(frozen=True)
class GradientMeta:
    """How the rows of a trace's gradient store were made; `module_dims`: numbers of a row that are of each module."""

    projection_seed: int
    projection_dim: int
    module_dims: Mapping[str, int]
    steps: Sequence[int]
    lr: Sequence[float]
    preconditioner: str

    def to_json(self) -> dict[str, Any]:
        return {
            "v": 2,
            "projection_seed": self.projection_seed,
            "projection_dim": self.projection_dim,
            "modules": [{"name": name, "dim": dim} for name, dim in self.module_dims.items()],
            "dim": sum(self.module_dims.values()),
            "preconditioner": self.preconditioner,
            "beta2": ADAM.beta2,
            "dtype": "int8",
            "steps": list(self.steps),
            "lr": {str(step): lr for step, lr in zip(self.steps, self.lr, strict=True)},
        }


class TraceWriter:
    """Fills a trace directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "gradients").mkdir(parents=True)

    def write_examples(self, examples: Sequence[Example]) -> None:
        write_examples(self.folder / "examples.parquet", examples)

    def write_steps(self, steps: Sequence[StepTaken], examples: Sequence[Example]) -> None:
        columns: dict[str, list[Any]] = {
            name: [getattr(step, name) for step in steps] for name in ("step", "lr", "loss", "time_us", "grad_norm")
        }
        columns["example_ids"] = [[examples[row].example_id for row in step.rows] for step in steps]
        pq.write_table(pa.table(columns, schema=STEPS_SCHEMA), self.folder / "steps.parquet")

    def write_checkpoint(self, step: int, checkpoint: Path) -> None:
        """Take in the tensors of a checkpoint folder."""
        target = self.folder / "checkpoints" / str(step)
        target.mkdir(parents=True)
        for file in checkpoint.glob("*.safetensors"):
            shutil.copyfile(file, target / file.name)

    def write_meta(self, meta: GradientMeta) -> None:
        self._write_json("gradients/meta.json", meta.to_json())

    def write_facts(self, facts: RunFacts) -> None:
        self._write_json(RUN_FILE, facts.to_json())

    def write_in_run(self, scores: Path, meta: InRunMeta) -> None:
        """Take in the file of per-step scores and say what its last axis means."""
        (self.folder / "in_run").mkdir()
        shutil.copyfile(scores, self.folder / IN_RUN_SCORES_FILE)
        self._write_json(IN_RUN_META_FILE, meta.to_json())

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def run_facts(
    settings: TrainSettings,
    *,
    device: "torch.device",
    world_size: int,
    num_parameters: int,
    state_steps: tuple[int, ...],
    attempts: Sequence[AttemptStarted],
) -> RunFacts:
    """Return what a trace says about the run as a whole."""
    import torch

    return RunFacts(
        adam=ADAM,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lora_dropout=settings.lora_dropout,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=tuple(settings.target_modules),
        seed=settings.seed,
        dtype=settings.dtype,
        attention=settings.attention,
        deterministic=settings.deterministic,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        world_size=world_size,
        threads_per_worker=settings.threads_per_worker,
        zero_stage=settings.zero_stage,
        num_parameters=num_parameters,
        state_steps=state_steps,
        attempts=tuple(Attempt(a.attempt, a.world_size, a.step, a.time_us) for a in attempts),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
    )


def gradient_meta(
    codec: "GradientCodec", settings: TrainSettings, *, steps: Sequence[int], lr: Sequence[float]
) -> GradientMeta:
    """Describe the rows that a codec makes."""
    dims: dict[str, int] = {}
    for factor in codec.factors:
        module = factor.name.rpartition(".")[0]
        dims[module] = dims.get(module, 0) + len(factor.kept)
    return GradientMeta(settings.seed, settings.gradient_projection_dim, dims, steps, lr, codec.preconditioner)


def in_run_meta(registered: "Registered", steps: Sequence[StepTaken]) -> InRunMeta:
    """Return what a trace says about its in-run scores."""
    return InRunMeta(
        registered.columns,
        registered.refresh_steps,
        num_refreshes=sum(step.refreshed for step in steps),
        overhead=sum(step.in_run_seconds for step in steps) / sum(step.seconds - step.in_run_seconds for step in steps),
    )


def _event(fields: dict[str, Any]) -> Event:
    kind = _EVENTS[fields["event"]]
    event = kind(**{name: tuple(value) if name == "rows" else value for name, value in fields.items()})
    assert isinstance(event, AttemptStarted | StepTaken | GradientsTaken)
    return event
