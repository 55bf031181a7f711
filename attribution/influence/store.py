"""What training wrote down for attribution: examples, steps, checkpoints, and gradients of every example.

Layout of a trace directory (store kind `trace`):
    steps.parquet                      step int, lr double, loss double, example_ids list<string>, time_us
    examples.parquet                   row int32, example_id, contributor, num_target_tokens, text
    checkpoints/<step>/                adapter_model.safetensors, exp_avg_sq.safetensors (PEFT parameter names)
    gradients/meta.json                projection, module order and the checkpoints
    gradients/<step>.npy               float16 [num_examples, dim]; row i belongs to row i of examples.parquet
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

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
    """One optimizer step: its learning rate and whom it learned from."""

    step: int
    lr: float
    example_ids: tuple[str, ...]


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
        rows = sorted(pq.read_table(self._file("examples.parquet")).to_pylist(), key=lambda row: row["row"])
        return tuple(
            TraceExample(row["example_id"], row["contributor"], int(row["num_target_tokens"]), row["text"])
            for row in rows
        )

    @cached_property
    def steps(self) -> tuple[TraceStep, ...]:
        """The optimizer steps in order."""
        rows = pq.read_table(self._file("steps.parquet"), columns=["step", "lr", "example_ids"]).to_pylist()
        return tuple(
            TraceStep(int(row["step"]), float(row["lr"]), tuple(row["example_ids"]))
            for row in sorted(rows, key=lambda row: row["step"])
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
        row_of = {example.example_id: row for row, example in enumerate(self.examples)}
        weights = np.zeros((len(checkpoints), len(self.examples)))
        for step in self.steps:
            rows = [row_of[example_id] for example_id in step.example_ids]
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
