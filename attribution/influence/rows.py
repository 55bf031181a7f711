"""The training side of a score: rows of gradients, as a trace's own store holds them or as older traces did.

Shape legend: c views (checkpoints of the run), g token groups or queries, n examples, d numbers in a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from attribution.influence.store import Trace, TraceError

if TYPE_CHECKING:
    from attribution.influence.gradient_store import GradientStore
    from attribution.influence.shard import Shard
    from kernels.native import Native

STORE_FOLDER = Path("gradients") / "store"
SHARD_ROWS = 4096
"""Gradients of older traces read at once: at 50,000 features and float32 this is 0.8 GB."""


class ShardsElsewhere(TraceError):
    """Shards of a trace's gradient store are not on this machine."""

    @classmethod
    def of(cls, trace: str, shards: Sequence[str]) -> "ShardsElsewhere":
        """Name the shards, and where to ask."""
        return cls(
            f"trace {trace}: shards {', '.join(shards[:3])} of its gradient store are not on this machine; ask the "
            "scorers that hold them (`trailmark up`), or copy them here"
        )


class Rows(Protocol):
    """What scoring needs of the training examples, in the trace's row order."""

    @property
    def num_examples(self) -> int: ...

    def exposure(self) -> NDArray[np.float64]:
        """Return [c, n]: how much of each example's learning a view stands for (see Trace.exposure)."""

    def corrections(self) -> NDArray[np.float64]:
        """Return [c]: what Adam's bias correction puts on the inner products of a view."""

    def dots(self, view: int, query: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (query [g, d] @ rows^T [g, n], lengths of the rows [n])."""


def rows_of(trace: Trace, *, verify: bool = True) -> "TraceRows | StoreRows":
    """Return the rows of a trace: of its store, or of the float16 tables of a trace from before there were stores."""
    if (trace.path / STORE_FOLDER).is_dir():
        from attribution.influence.gradient_store import GradientStore

        return StoreRows(trace, GradientStore(trace.path / STORE_FOLDER, verify=verify))
    return TraceRows(trace)


def shards_elsewhere(folder: Path, files: Iterable[str]) -> list[str]:
    """Return the names of the shards in a trace's list of files whose folders are not here."""
    shards = (STORE_FOLDER / "shards").parts
    names = {parts[len(shards)] for file in files if (parts := Path(file).parts)[: len(shards)] == shards}
    return sorted(name for name in names if not folder.joinpath(*shards, name).is_dir())


@dataclass(frozen=True)
class TraceRows:
    """Rows of gradients/<step>.npy."""

    trace: Trace

    @property
    def description(self) -> str:
        """How the rows were made."""
        preconditioner = "Adam-preconditioned" if self.trace.is_preconditioned else "plain"
        return f"{preconditioner}, projected to {self.trace.projection_dim}"

    @property
    def bytes_per_example(self) -> float:
        """Bytes on disk of all views."""
        steps = self.trace.checkpoint_steps
        return sum(self.trace.gradients(step).nbytes for step in steps) / max(1, self.num_examples)

    @property
    def num_examples(self) -> int:
        return len(self.trace.examples)

    def exposure(self) -> NDArray[np.float64]:
        return self.trace.exposure()

    def corrections(self) -> NDArray[np.float64]:
        return self.trace.bias_corrections()

    def dots(self, view: int, query: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        rows = self.trace.gradients(self.trace.checkpoint_steps[view])
        dots, lengths = np.empty((len(query), len(rows))), np.empty(len(rows))
        for start in range(0, len(rows), SHARD_ROWS):
            shard = np.asarray(rows[start : start + SHARD_ROWS], dtype=np.float32)
            stop = start + len(shard)
            dots[:, start:stop] = query @ shard.T
            lengths[start:stop] = np.linalg.norm(shard, axis=1)
        return dots, lengths


@dataclass(frozen=True)
class StoreRows:
    """Rows of a gradient store, put in the trace's order. An example whose gradient was deleted has a row of zeros."""

    trace: Trace
    store: "GradientStore"

    @property
    def description(self) -> str:
        """How the rows were made."""
        dims = sorted({self.store.dim(view) for view in self.store.views})
        summed = f" summed over {len(self.store.steps)} checkpoints" if self.store.is_summed else ""
        return f"{self.store.preconditioner}-preconditioned, {'/'.join(map(str, dims))} int8 numbers a row{summed}"

    @property
    def bytes_per_example(self) -> float:
        """Bytes on disk of all views."""
        return self.store.bytes_per_example

    @property
    def num_examples(self) -> int:
        return len(self.trace.examples)

    def exposure(self) -> NDArray[np.float64]:
        weights = np.concatenate([shard.weights[shard.live] for shard in self._shards]).astype(np.float64)
        if self.store.is_summed:  # each checkpoint's question meets the same rows: an equal part of what these earn
            weights = np.repeat(weights / len(self.store.steps), len(self.store.steps), axis=1)
        return self._in_order(weights.T)

    def corrections(self) -> NDArray[np.float64]:
        found = view_corrections(self.store)
        return np.repeat(found, len(self.store.steps)) if self.store.is_summed else found

    def dots(self, view: int, query: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        name = self.store.views[0 if self.store.is_summed else view]
        parts = [shard_dots(shard, name, query) for shard in self._shards]
        dots = np.concatenate([part[0] for part in parts], axis=1)
        return self._in_order(dots), self._in_order(np.concatenate([part[1] for part in parts])[None])[0]

    @cached_property
    def _shards(self) -> "list[Shard]":
        missing = [shard.name for shard in self.store.shards if not shard.is_here]
        if missing:
            raise ShardsElsewhere.of(self.trace.path.name, missing)
        return [shard for shard in self.store.shards if shard.num_live]

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Where each live row of the store stands among the trace's examples."""
        row_of = {example.example_id: row for row, example in enumerate(self.trace.examples)}
        ids = [shard.ids[row] for shard in self._shards for row in shard.live]
        unknown = next((name for name in ids if name not in row_of), None)
        if unknown is not None:
            raise TraceError(f"trace {self.trace.path.name}: its gradient store holds {unknown!r}, its examples do not")
        return np.asarray([row_of[name] for name in ids], dtype=np.int64)

    def _in_order(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [.., n] in the trace's order from [.., live rows]."""
        whole = np.zeros((len(values), self.num_examples))
        whole[:, self._places] = values
        return whole


def view_corrections(store: "GradientStore") -> NDArray[np.float64]:
    """Return float64 [views]: sqrt(1 - beta2^step), since rows are in units of Adam's raw second moment; 1 without one.

    A row that is a sum over checkpoints takes their mean.
    """
    beta2 = store.about.get("beta2")
    if beta2 is None:
        return np.ones(len(store.views))
    found = np.sqrt(1 - float(beta2) ** np.asarray([int(step) for step in store.steps], dtype=np.float64))
    return found.mean(keepdims=True) if store.is_summed else found


def shard_dots(
    shard: "Shard", view: str, query: NDArray[np.float32], *, device: str = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (query [g, d] @ rows^T [g, live rows], lengths [live rows]) of one view of a shard."""
    import torch

    from kernels.gradients import score_rows

    rows = shard.rows(view)
    arrays = (rows.codes, rows.scales, np.ascontiguousarray(rows.units), np.ascontiguousarray(query))
    codes, scales, units, queries = (torch.from_numpy(array).to(device) for array in arrays)
    dots = score_rows(codes, scales, units, queries, native=_native() if device == "cpu" else None)
    dots_here: NDArray[np.float64] = dots.cpu().numpy().astype(np.float64)
    lengths = shard.lengths(view).astype(np.float64)
    return (dots_here, lengths) if not shard.removed else (dots_here[:, shard.live], lengths[shard.live])


@cache
def _native() -> "Native | None":
    """The C kernels, opened once per process."""
    from configs import env
    from kernels.native import load

    return load(env.cache_home())
