"""What the driver hands to its workers and gets back. Light to import: a driver needs no PEFT and no DeepSpeed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import TrainSettings

if TYPE_CHECKING:
    from pipelines.train.queries import Registered

StepHook = Callable[[int, int, int], None]
"""Called by every worker before each step with (attempt, rank, step); a test's way to fail on purpose."""


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs; the run folder is on a file system that all nodes share.

    `stop_after`: end after that many updates, with the state saved and nothing exported; None runs to the end.
    """

    run_folder: Path
    base_path: str
    base_name: str
    settings: TrainSettings
    queries: "Registered | None" = None
    stop_after: int | None = None

    @property
    def examples_file(self) -> Path:
        return self.run_folder / "examples.parquet"

    @property
    def adapter_folder(self) -> Path:
        return self.run_folder / "adapter"

    @property
    def trace_folder(self) -> Path:
        return self.run_folder / "trace"

    @property
    def in_run_file(self) -> Path:
        return self.run_folder / "in_run.npy"

    def checkpoint_folder(self, step: int) -> Path:
        return self.run_folder / "checkpoints" / str(step)


@dataclass(frozen=True)
class Outcome:
    """What rank 0 hands back. `problem` is set when a retry could not help; nothing else is valid then."""

    reload_max_abs_diff: float = 0.0
    problem: str = ""


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry point in each worker. `config`: {"plan": Plan, "hook": StepHook | None}; returns an Outcome."""
    from pipelines.train.loop import run_attempt

    return asdict(run_attempt(config["plan"], hook=config["hook"]))
