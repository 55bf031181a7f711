"""The gradient store of a finished run, made by all of its workers together: fit on a sample, then every example."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attribution.influence.build import encode, fit_facts, sample_rows
from attribution.influence.codec import GradientCodec
from attribution.influence.ekfac import CodecFit, CodecSettings
from attribution.influence.factors import LoraFactors
from attribution.influence.gradient_store import Addition, GradientStore, GradientStoreError
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
        fit = CodecFit(LoraFactors(self.model), codec_settings(self.settings))
        for take in (fit.add_bases, fit.add_squares):
            for number, step in enumerate(self.steps):
                checkpoint = self._enter(step)
                seed = self.settings.seed * 1009 + number
                sample = sample_rows(len(self.examples), size=self.settings.gradient_fit_examples, seed=seed)
                # A rank without a row of its own would take no part in the sums; a small sample is everybody's.
                mine = sample[self.rank :: self.world_size] if len(sample) >= 2 * self.world_size else sample
                take([self.examples[row].encoded for row in mine], exp_avg_sq=checkpoint.exp_avg_sq)
            for tensor in fit.sums():
                dist.all_reduce(tensor)
            if take == fit.add_bases:
                # Rank 0's, for an eigenvector's sign is anybody's choice.
                for tensor in fit.settle_bases():
                    dist.broadcast(tensor, 0)
        shared = [fit.codec()] if self.rank == 0 else [None]
        dist.broadcast_object_list(shared, 0)
        assert isinstance(shared[0], GradientCodec)
        return shared[0]

    def rows(
        self, codec: GradientCodec, index: int, *, tell: Callable[[int], None]
    ) -> "tuple[list[int], np.ndarray[Any, Any]]":
        """Return, on rank 0, the rows of every example at checkpoint `index` and what they belong to. Collective.

        `tell` hears, on every rank after each batch, how many examples it has done over all checkpoints.
        """
        checkpoint = self._enter(self.steps[index])
        factors = LoraFactors(self.model)
        order = sorted(range(len(self.examples)), key=lambda row: -self.examples[row].num_tokens)
        mine = order[self.rank :: self.world_size]
        encoded = [self.examples[row].encoded for row in mine]
        done, places, parts = index * len(mine), [], [torch.zeros(0, codec.dim)]
        for rows, values in encode(factors, codec, encoded, exp_avg_sq=checkpoint.exp_avg_sq):
            places += [mine[row] for row in rows]
            parts.append(values)
            done += len(rows)
            tell(done)
        return self._collect(places, torch.cat(parts))

    def _enter(self, step: int) -> "Checkpoint":
        checkpoint = self.load(step)
        lora.set_weights(self.model, checkpoint.weights)
        return checkpoint

    def _collect(self, places: list[int], part: Tensor) -> "tuple[list[int], np.ndarray[Any, Any]]":
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object((places, part.numpy()), gathered)
        whole = gathered or [(places, part.numpy())]
        return [place for found, _ in whole for place in found], np.concatenate([values for _, values in whole])


def write_gradient_store(
    run: GradientPass,
    codec: GradientCodec,
    trace_folder: Path,
    *,
    tell: Callable[[int], None],
    stop_together: Callable[[str], None],
) -> None:
    """Make the store in a trace's folder, whose other files are there. Collective.

    `stop_together` is called by all ranks after each checkpoint with the problem of theirs, '' for none.
    """
    with ExitStack() as stack:
        addition = stack.enter_context(_adding(run, codec, trace_folder)) if run.rank == 0 else None
        for index, step in enumerate(run.steps):
            places, rows = run.rows(codec, index, tell=tell)
            problem = ""
            if addition is not None:
                try:
                    addition.put(str(step), places, rows)
                except GradientStoreError as error:
                    rate = f"train.learning_rate={run.settings.learning_rate:g}"
                    problem = f"{error}; lower {rate}, or leave that row out"
            stop_together(problem)


@contextmanager
def _adding(run: GradientPass, codec: GradientCodec, trace_folder: Path) -> Iterator[Addition]:
    trace = Trace(trace_folder)
    size = min(run.settings.gradient_fit_examples, len(run.examples)) * len(run.steps)
    about = {**fit_facts(codec_settings(run.settings), size), "beta2": repr(trace.beta2)}
    store = GradientStore.create(trace_folder / STORE_FOLDER, {str(step): codec for step in run.steps}, about=about)
    with store.adding([example.example_id for example in run.examples], weights=trace.exposure().T) as addition:
        yield addition
    if store.preconditioner != "adam":
        store.fit_residual()
