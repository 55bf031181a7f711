"""What every peer runner reads and writes. Runs in the peers' environment and imports nothing of Trailmark.

python run_NAME.py LAB_FOLDER OUT.npz        scores [queries, rows] per method, and JSON of costs and settings
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class LabFiles:
    """The lab folder that benchmarks/attribution/export.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = json.loads((folder / "lab.json").read_text(encoding="utf-8"))
        with np.load(folder / "data.npz") as data:
            for name in ("row_ids", "row_labels", "query_ids", "query_labels", "steps", "lr"):
                setattr(self, name, data[name])
        self.num_checkpoints = len(self.facts["checkpoint_steps"])
        self.train = self.facts["train"]

    def adapter(self, checkpoint: int | None) -> Path:
        """Return the folder of a checkpoint; None is the adapter before the first step, -1 the last."""
        if checkpoint is None:
            return self.folder / "first"
        return self.folder / "checkpoints" / str(checkpoint % self.num_checkpoints)

    def model(self, checkpoint: int | None = -1) -> Any:
        """Return the PEFT model at a checkpoint, trainable, without dropout."""
        base = AutoModelForCausalLM.from_pretrained(self.facts["base"], dtype=torch.float32)
        base.config.use_cache = False
        return PeftModel.from_pretrained(base, str(self.adapter(checkpoint)), is_trainable=True).eval()

    def moments(self, checkpoint: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return Adam's (exp_avg, exp_avg_sq) by PEFT's saved names."""
        folder = self.adapter(checkpoint)
        return load_file(folder / "exp_avg.safetensors"), load_file(folder / "exp_avg_sq.safetensors")

    def lr_near(self, checkpoint: int) -> float:
        """Return the summed rates of the steps that this checkpoint stands for (the nearest one of each step)."""
        steps = np.asarray(self.facts["checkpoint_steps"])
        nearest = np.abs(np.arange(1, len(self.lr) + 1)[:, None] - steps).argmin(axis=1)
        return float(self.lr[nearest == checkpoint % len(steps)].sum())


@dataclass
class Method:
    """One method's result. `query_cpu_s` leaves the query's own forward and backward out."""

    scores: np.ndarray
    build_cpu_s: float
    query_cpu_s: float
    bytes_per_example: float
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


class Clock:
    """CPU seconds of all threads of this process, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's CPU time to a phase."""
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began

    def __getitem__(self, name: str) -> float:
        return self.seconds.get(name, 0.0)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def run_all(package: str, methods: dict[str, Callable[[LabFiles], Method]]) -> None:
    """Run the chosen methods (all, or those named after OUT.npz) and write the file; one failure ends the program."""
    torch.set_num_threads(1)
    lab, out = LabFiles(Path(sys.argv[1])), Path(sys.argv[2])
    wanted = sys.argv[3:] or list(methods)
    arrays: dict[str, np.ndarray] = {}
    costs: dict[str, Any] = {}
    for name in wanted:
        found = methods[name](lab)
        assert found.scores.shape == (len(lab.query_ids), len(lab.row_ids)), (name, found.scores.shape)
        assert np.isfinite(found.scores).all(), f"{name}: scores are not finite"
        arrays[name] = found.scores.astype(np.float32)
        costs[name] = {
            "kind": found.kind,
            "build_cpu_s": found.build_cpu_s,
            "query_cpu_s": found.query_cpu_s,
            "bytes_per_example": found.bytes_per_example,
            "settings": found.settings,
            "version": f"{package} {version(package)}",
        }
        print(f"{name}: {json.dumps(costs[name])}", flush=True)
    facts = json.dumps({"digest": lab.facts["digest"], "costs": costs})
    np.savez(out, facts=np.array(facts), **arrays)
