"""In-run scores under DeepSpeed: every rank keeps its rows' gradients, only the queries' gradients are shared."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.format import open_memmap

from attribution.influence.in_run import QUERY_BATCH, InRunScorer
from attribution.influence.run_facts import METHODS
from pipelines.train.data import Step
from pipelines.train.queries import Registered
from pipelines.train.trace import ADAM


def create_scores(path: Path, *, num_steps: int, batch_size: int, num_queries: int) -> None:
    """Make the file of per-step scores, zero all over: a step that is taken again after a failure replaces its own."""
    open_memmap(path, mode="w+", dtype=np.float32, shape=(num_steps, len(METHODS), batch_size, num_queries)).flush()


def deal_queries(registered: Registered, *, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
    """Return a rank's batches of queries, longest first; ranks run equally many, filled up with a query marked -1."""
    order = sorted(range(len(registered.queries)), key=lambda j: -len(registered.queries[j][0]))
    num_batches = -(-len(order) // (QUERY_BATCH * world_size))
    mine = order[rank::world_size]
    batches = [tuple(mine[i * QUERY_BATCH : (i + 1) * QUERY_BATCH]) for i in range(num_batches)]
    return tuple(batch or (-1,) for batch in batches)


class InRun:
    """Scores the steps of one attempt on one rank."""

    def __init__(self, engine: Any, registered: Registered, path: Path, *, rank: int, world_size: int) -> None:
        self._engine, self._registered = engine, registered
        self._rank, self._world_size = rank, world_size
        self._scorer = InRunScorer(engine.module, groups=registered.groups, adam=ADAM)
        self._mine = deal_queries(registered, rank=rank, world_size=world_size)
        self._scores = open_memmap(path, mode="r+") if rank == 0 else None
        self._refreshed_at: int | None = None
        self._preconditioned_at = 0

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Observe the forward and backward pass of the block, after taking the queries' gradients when it is time.

        They are taken at the first step of an attempt and `refresh_steps` after the last time. Collective.
        """
        last = self._refreshed_at
        if last is None or step.number - last >= self._registered.refresh_steps:
            with self._scorer.stopwatch:
                self._scorer.take_query_gradients(self._engine.module, self._registered.queries, self._mine)
                dist.all_reduce(self._scorer.plain)
            self._refreshed_at = step.number
        with self._scorer.observing():
            yield

    def take_scores(self, step: Step, *, lr: float, clip: float, num_rows: int) -> tuple[float, bool]:
        """Write down a step's scores, after its update; return the seconds all of it took, and whether it refreshed.

        `num_rows`: of the step's rows, how many are this rank's. Collective.
        """
        refreshed = self._refreshed_at == step.number
        with self._scorer.stopwatch:
            if refreshed or self._moments_moved(step.number):
                self._precondition(step.number)
            # The loss was scaled by the world size, see Worker._take.
            mine = self._scorer.scores(lr * clip / self._world_size)
            whole = torch.zeros(len(METHODS), len(step.rows), mine.shape[2], device=mine.device)
            whole[:, self._rank :: self._world_size] = mine[:, :num_rows]
            dist.all_reduce(whole)
        if self._scores is not None:
            self._scores[step.number - 1] = 0
            self._scores[step.number - 1, :, : len(step.rows)] = whole.cpu().numpy()
        return self._scorer.stopwatch.take(), refreshed

    def flush(self) -> None:
        """Make what is written durable, as a checkpoint is."""
        if self._scores is not None:
            self._scores.flush()

    def _moments_moved(self, step: int) -> bool:
        """Adam's second moment is a mean over all steps so far: early on it doubles in a few, and so must we follow."""
        return step >= 2 * self._preconditioned_at

    def _precondition(self, step: int) -> None:
        from pipelines.train.checkpoint import gather_flat

        sizes = self._scorer.gradients.sizes
        self._scorer.precondition(gather_flat(self._engine, "exp_avg_sq", list(sizes)), step)
        self._preconditioned_at = step


def observing(in_run: InRun | None, step: Step) -> AbstractContextManager[None]:
    """Return `in_run.step(step)`, or a context that does nothing without query sets."""
    return nullcontext() if in_run is None else in_run.step(step)
