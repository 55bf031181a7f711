"""The gradient store of a finished run, made by all of its workers together: fit on a sample, then every example."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from attribution.influence.build import (
    EncodedRows,
    View,
    create_store,
    encode,
    fit_facts,
    row_passes,
    row_weights,
    sample_rows,
)
from attribution.influence.codec import GradientCodec
from attribution.influence.ekfac import CodecFit, CodecSettings
from attribution.influence.factors import LoraFactors
from attribution.influence.gradient_store import Addition, GradientStoreError
from attribution.influence.rows import STORE_FOLDER
from attribution.influence.store import Trace
from configs.schema import TrainSettings
from pipelines.train import lora
from pipelines.train.data import Example

if TYPE_CHECKING:
    from pipelines.train.checkpoint import Checkpoint


def codec_settings(settings: TrainSettings) -> CodecSettings:
    """Return how rows are made, out of a run's settings."""
    return CodecSettings(
        preconditioner=settings.gradient_preconditioner,
        dim=settings.gradient_row_dim,
        basis_dim=settings.gradient_projection_dim,
        damping=settings.gradient_damping,
        seed=settings.seed,
    )


@dataclass(frozen=True)
class GradientPass:
    """One rank's part in it; the ranks share sample and examples. `load` returns a checkpoint's state by step."""

    model: nn.Module
    examples: Sequence[Example]
    steps: Sequence[int]
    load: "Callable[[int], Checkpoint]"
    settings: TrainSettings
    rank: int
    world_size: int

    def fit(self) -> GradientCodec:
        """Return the codec, the same on all ranks. Collective."""
        fit = CodecFit(self._factors, codec_settings(self.settings))
        for take in (fit.add_bases, fit.add_squares):
            for number, view in enumerate(self.views):
                view.enter()
                seed = self.settings.seed * 1009 + number
                sample = sample_rows(len(self.examples), size=self.settings.gradient_fit_examples, seed=seed)
                # A rank without a row of its own would take no part in the sums; a small sample is everybody's.
                mine = sample[self.rank :: self.world_size] if len(sample) >= 2 * self.world_size else sample
                take([self.examples[row].encoded for row in mine], exp_avg_sq=view.exp_avg_sq)
            for tensor in fit.sums():
                dist.all_reduce(tensor)
            if take == fit.add_bases:
                # Rank 0's, for an eigenvector's sign is anybody's choice.
                for tensor in fit.settle_bases():
                    dist.broadcast(tensor, 0)
        codec = _of_rank_0(fit.codec() if self.rank == 0 else None)
        assert isinstance(codec, GradientCodec)
        return codec

    @cached_property
    def views(self) -> list[View]:
        """The checkpoints, held in memory: each batch of examples goes through all of them."""
        loaded = [self.load(step) for step in self.steps]
        return [
            View(str(one.step), partial(lora.set_weights, self.model, one.weights), one.exp_avg_sq) for one in loaded
        ]

    @cached_property
    def _factors(self) -> LoraFactors:
        return LoraFactors(self.model)

    def rows(
        self,
        codec: GradientCodec,
        views: Sequence[View],
        exposure: NDArray[np.float64],
        *,
        took: Callable[[int], None],
    ) -> EncodedRows:
        """Return, on rank 0, the rows of every example made at some checkpoints, as `encode` does. Collective.

        `took` hears, on every rank after each batch, how many more gradients it has taken.
        """
        order = sorted(range(len(self.examples)), key=lambda row: -self.examples[row].num_tokens)
        mine = order[self.rank :: self.world_size]
        encoded = [self.examples[row].encoded for row in mine]
        found: list[EncodedRows] = []
        for rows, values, lengths in encode(self._factors, codec, encoded, views, exposure=exposure[mine]):
            found.append(([mine[row] for row in rows], values, lengths))
            took(len(rows) * len(views))
        return self._collect(found, codec.dim)

    def _collect(self, found: list[EncodedRows], dim: int) -> EncodedRows:
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(found, gathered)
        parts = [part for one in gathered or [found] for part in one]
        lengths = [part[2] for part in parts if part[2] is not None]
        return (
            [row for part in parts for row in part[0]],
            np.concatenate([part[1] for part in parts] or [np.zeros((0, dim), np.float32)]),
            np.concatenate(lengths) if lengths else None,
        )


def write_gradient_store(
    run: GradientPass,
    codec: GradientCodec,
    trace_folder: Path,
    *,
    tell: Callable[[int], None],
    stop_together: Callable[[str], None],
) -> None:
    """Make the store in a trace's folder, whose other files are there. Collective.

    `tell` hears, on every rank after each batch, how many gradients it has taken. `stop_together` is called by all
    ranks after each view of the store with the problem of theirs, '' for none.
    """
    num_taken = 0

    def took(number: int) -> None:
        nonlocal num_taken
        num_taken += number
        tell(num_taken)

    exposure = _of_rank_0(Trace(trace_folder).exposure().T if run.rank == 0 else None)
    with ExitStack() as stack:
        addition = stack.enter_context(_adding(run, codec, trace_folder, exposure)) if run.rank == 0 else None
        for name, views in row_passes(run.views, codec):
            places, rows, lengths = run.rows(codec, views, exposure, took=took)
            problem = ""
            if addition is not None:
                try:
                    addition.put(name, places, rows, lengths=lengths)
                except GradientStoreError as error:
                    rate = f"train.learning_rate={run.settings.learning_rate:g}"
                    problem = f"{error}; lower {rate}, or leave that row out"
            stop_together(problem)


@contextmanager
def _adding(
    run: GradientPass, codec: GradientCodec, trace_folder: Path, exposure: NDArray[np.float64]
) -> Iterator[Addition]:
    size = min(run.settings.gradient_fit_examples, len(run.examples)) * len(run.steps)
    about = {**fit_facts(codec_settings(run.settings), size), "beta2": repr(Trace(trace_folder).beta2)}
    store = create_store(trace_folder / STORE_FOLDER, codec, [str(step) for step in run.steps], about=about)
    ids = [example.example_id for example in run.examples]
    with store.adding(ids, weights=row_weights(codec, exposure)) as addition:
        yield addition


def _of_rank_0(value: Any) -> Any:
    """Return what rank 0 passes in, on all ranks: the others may come before its files are there. Collective."""
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]
