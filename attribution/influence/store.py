"""What training wrote down for attribution: examples, steps, states, gradients of every example, in-run scores.

Layout of a trace directory (store kind `trace`); what a run without a recorder (format 1) lacks is marked +:
    run.json +                         RunFacts: optimizer, dtype, attention, threads, world size, attempts, versions
    steps.parquet                      step int, lr double, loss double, example_ids list<string>, time_us, grad_norm +
    examples.parquet                   row int32, example_id, contributor, num_target_tokens, text,
                                       input_ids +, labels + (list<int32>; empty once the row was erased)
    checkpoints/0/ +                   adapter_model.safetensors: the weights that training began with
    checkpoints/<step>/                adapter_model, exp_avg +, exp_avg_sq (.safetensors, PEFT parameter names)
    gradients/meta.json                projection, module order and the checkpoints
    gradients/<step>.npy               float16 [num_examples, dim]; row i belongs to row i of examples.parquet
    in_run/meta.json                   InRunMeta: the queries registered before training; absent when there were none
    in_run/steps.npy                   float32 [num_steps, 2 (sgd, adam), batch_size, num_queries], rows as in the step
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from attribution.influence.run_facts import (
    IN_RUN_META_FILE,
    IN_RUN_SCORES_FILE,
    METHODS,
    RUN_FILE,
    InRunMeta,
    RunFacts,
)
from configs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ADAM_BETA2 = 0.999


class TraceError(UserError):
    """A training trace is incomplete or does not fit the model it is used with."""


@dataclass(frozen=True)
class TraceExample:
    """One row that the adapter was trained on."""

    example_id: str
    contributor: str
    num_target_tokens: int
    text: str


@dataclass(frozen=True)
class TraceStep:
    """One optimizer step: its learning rate and whom it learned from; `rows` are places in `Trace.examples`."""

    step: int
    lr: float
    example_ids: tuple[str, ...]
    rows: tuple[int, ...] = ()
    grad_norm: float | None = None


@dataclass(frozen=True)
class TraceState:
    """All that the optimizer carried after `step` updates, float32 by PEFT parameter name."""

    step: int
    weights: "dict[str, Tensor]"
    exp_avg: "dict[str, Tensor]"
    exp_avg_sq: "dict[str, Tensor]"


class Trace:
    """Reads a trace directory; gradients stay memory-mapped. Raises TraceError for what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._meta: dict[str, Any] = json.loads(self._file("gradients/meta.json").read_text(encoding="utf-8"))
        if not self.checkpoint_steps:
            raise TraceError(
                f"trace {path.name}: gradients/meta.json lists no step; train with train.num_checkpoints >= 1"
            )

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        return tuple(int(step) for step in self._meta["steps"])

    @property
    def projection_dim(self) -> int:
        return int(self._meta["projection_dim"])

    @property
    def projection_seed(self) -> int:
        return int(self._meta["projection_seed"])

    @property
    def is_preconditioned(self) -> bool:
        return bool(self._meta["preconditioner"] == "adam")

    @property
    def beta2(self) -> float:
        return float(self._meta.get("beta2", ADAM_BETA2))

    @property
    def module_names(self) -> tuple[str, ...]:
        return tuple(entry["name"] for entry in self._meta["modules"])

    @cached_property
    def examples(self) -> tuple[TraceExample, ...]:
        """The training examples in row order."""
        columns = ["row", "example_id", "contributor", "num_target_tokens", "text"]
        table = pq.read_table(self._file("examples.parquet"), columns=columns)
        rows = sorted(table.to_pylist(), key=lambda row: row["row"])
        return tuple(
            TraceExample(row["example_id"], row["contributor"], int(row["num_target_tokens"]), row["text"])
            for row in rows
        )

    @cached_property
    def steps(self) -> tuple[TraceStep, ...]:
        """The optimizer steps in order."""
        file = self._file("steps.parquet")
        columns = ["step", "lr", "example_ids", *(["grad_norm"] if self.is_recorded else [])]
        rows = sorted(pq.read_table(file, columns=columns).to_pylist(), key=lambda row: row["step"])
        return tuple(
            TraceStep(
                int(row["step"]),
                float(row["lr"]),
                tuple(row["example_ids"]),
                tuple(self._row_of[example_id] for example_id in row["example_ids"]),
                row.get("grad_norm"),
            )
            for row in rows
        )

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {example.example_id: row for row, example in enumerate(self.examples)}

    @property
    def is_recorded(self) -> bool:
        """Whether a recorder wrote down all that a replay needs; a trace of format 1 has only the explain tier's."""
        return (self.path / RUN_FILE).is_file()

    @cached_property
    def facts(self) -> RunFacts:
        """The run's recipe. Raises TraceError for an adapter trained without a recorder, saying what is left."""
        if not self.is_recorded:
            raise TraceError(
                f"trace {self.path.name}: an adapter trained without a recorder: its run cannot be replayed, so there "
                f"are no audit and no in-run scores; its {len(self.checkpoint_steps)} gradient checkpoints still rank "
                "examples (`trailmark ask who`); train again for more"
            )
        return RunFacts.from_json(json.loads(self._file(RUN_FILE).read_text(encoding="utf-8")))

    @property
    def state_steps(self) -> tuple[int, ...]:
        """After how many updates the whole state is kept: 0, then about sqrt(steps) of them, the last one final."""
        return (0, *self.facts.state_steps)

    def state(self, step: int) -> TraceState:
        """Return the state after `step` updates. Raises TraceError for a step that is not one of `state_steps`."""
        if step not in self.state_steps:
            known = ", ".join(map(str, self.state_steps))
            raise TraceError(f"trace {self.path.name}: no state after step {step}; there are those after {known}")
        weights = self.adapter_weights(step)
        if step == 0:
            first, second = ({name: weight.new_zeros(weight.shape) for name, weight in weights.items()} for _ in "mv")
            return TraceState(0, weights, first, second)
        moments = (self._tensors(f"checkpoints/{step}/{name}.safetensors") for name in ("exp_avg", "exp_avg_sq"))
        return TraceState(step, weights, *moments)

    @cached_property
    def encoded(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """(input ids, labels) of the examples in row order, as training saw them.

        Raises TraceError when a row was erased since: the run can then no longer be replayed.
        """
        self.facts  # noqa: B018 - refuses a trace that has no tokens
        table = pq.read_table(self._file("examples.parquet"), columns=["row", "input_ids", "labels"])
        rows = sorted(table.to_pylist(), key=lambda row: row["row"])
        erased = [row["row"] for row in rows if not row["input_ids"]]
        if erased:
            raise TraceError(
                f"trace {self.path.name}: {len(erased)} rows were erased since (row {erased[0]} first), so the run "
                "cannot be replayed; stored gradients and in-run scores still hold"
            )
        return tuple((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)

    @cached_property
    def in_run(self) -> InRunMeta | None:
        """Which queries the run was scored against, and how; None when none was registered before it."""
        file = self.path / IN_RUN_META_FILE
        return InRunMeta.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def in_run_scores(
        self, query_set: str, *, query: str = "", method: Literal["sgd", "adam"] = "adam"
    ) -> NDArray[np.float32]:
        """Return float32 [num_examples]: nats per target token by which each example's updates lowered the set's loss.

        First order, summed over the steps that held the example; see `attribution.influence.in_run`. `query` names one
        query of a set that was scored query by query; '' is their mean over tokens.

        Raises TraceError for a set or query that was not registered before training.
        """
        columns = self._in_run_columns(query_set, query)
        queries = self.in_run.queries if self.in_run is not None else ()
        weights = np.asarray([queries[column].num_target_tokens for column in columns], dtype=np.float64)
        per_step = np.load(self._file(IN_RUN_SCORES_FILE), mmap_mode="r")[:, METHODS.index(method)]
        total = np.zeros(len(self.examples))
        for step in self.steps:
            scores = per_step[step.step - 1, : len(step.rows), columns[0] : columns[-1] + 1]
            np.add.at(total, list(step.rows), scores.astype(np.float64) @ (weights / weights.sum()))
        return total.astype(np.float32)

    def _in_run_columns(self, query_set: str, query: str) -> list[int]:
        queries = self.in_run.queries if self.in_run is not None else ()
        found = [i for i, q in enumerate(queries) if q.query_set == query_set and query in ("", q.query)]
        if found:
            return found
        sets = ", ".join(dict.fromkeys(q.query_set for q in queries)) or "none"
        inside = f", query {query!r}" if query else ""
        raise TraceError(
            f"query set {query_set!r}{inside}: the run was not scored against it; registered before training: {sets}. "
            "What arrives later is scored from the stored gradients (`trailmark ask who`)"
        )

    def gradients(self, step: int) -> NDArray[np.float16]:
        """Return the memory-mapped float16 [num_examples, dim] gradients of one checkpoint."""
        rows: NDArray[np.float16] = np.load(self._file(f"gradients/{step}.npy"), mmap_mode="r")
        expected = (len(self.examples), int(self._meta["dim"]))
        if rows.shape != expected:
            raise TraceError(
                f"trace {self.path.name}: gradients/{step}.npy is {rows.shape}, expected {expected}; train again"
            )
        return rows

    def adapter_weights(self, step: int) -> "dict[str, Tensor]":
        """Return the LoRA weights of one checkpoint by PEFT parameter name."""
        return self._tensors(f"checkpoints/{step}/adapter_model.safetensors")

    def exp_avg_sq(self, step: int) -> "dict[str, Tensor] | None":
        """Return Adam's raw second moment of one checkpoint, or None when the gradients are not preconditioned."""
        return self._tensors(f"checkpoints/{step}/exp_avg_sq.safetensors") if self.is_preconditioned else None

    def exposure(self) -> NDArray[np.float64]:
        """Return float64 [num_checkpoints, num_examples]: how much of each example's learning a checkpoint stands for.

        Semantics: w[c, i] = sum over the steps t nearest to c with i in B_t of lr_t / (target tokens of B_t). The loss
        of a step is a mean over its batch's target tokens and a feature is of a sum, hence the division.
        """
        checkpoints = np.asarray(self.checkpoint_steps)
        weights = np.zeros((len(checkpoints), len(self.examples)))
        for step in self.steps:
            rows = list(step.rows)
            num_tokens = sum(self.examples[row].num_target_tokens for row in rows)
            nearest = int(np.abs(checkpoints - step.step).argmin())
            np.add.at(weights[nearest], rows, step.lr / max(1, num_tokens))
        return weights

    def bias_corrections(self) -> NDArray[np.float64]:
        """Return float64 [num_checkpoints]: sqrt(1 - beta2^step), what Adam puts on the raw moment that is stored."""
        steps = np.asarray(self.checkpoint_steps, dtype=np.float64)
        return np.sqrt(1 - self.beta2**steps) if self.is_preconditioned else np.ones(len(steps))

    def _tensors(self, name: str) -> "dict[str, Tensor]":
        from safetensors.torch import load_file

        return load_file(self._file(name))

    def _file(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise TraceError(
                f"trace {self.path.name}: {name} is missing; train the adapter again to get a complete trace"
            )
        return file


def contributors_of(examples: Sequence[TraceExample]) -> tuple[str, ...]:
    """Return the contributors' key ids, sorted."""
    return tuple(sorted({example.contributor for example in examples}))
