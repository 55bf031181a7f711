"""Banks of retrains: the same run on many subsets of its rows. Subset lists are hashed before any score exists."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.attribution.lab import Lab

CHUNK = 20
"""Retrains between two writes of the cache: what an interrupted run loses at most."""


@dataclass(frozen=True)
class Drop:
    """A rule for subsets: leave `share` of the rows out, at random."""

    name: str
    share: float

    def subsets(self, num_rows: int, count: int, *, seed: int) -> NDArray[np.bool_]:
        """Return [count, num_rows]: which rows each subset keeps."""
        generator = np.random.default_rng([seed, round(1000 * self.share)])
        kept = np.ones((count, num_rows), dtype=bool)
        for row in kept:
            row[generator.choice(num_rows, round(self.share * num_rows), replace=False)] = False
        return kept


DROPS = (Drop("keep-50%", 0.5), Drop("drop-5%", 0.05), Drop("drop-1%", 0.01))


@dataclass(frozen=True)
class Plan:
    """A bank to be made: the subsets and the data order (0 is that of the recorded run)."""

    drop: Drop
    order: int
    kept: NDArray[np.bool_]

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.drop.name + (", other order" if self.order else "")

    @property
    def digest(self) -> str:
        """SHA-256 of the subset list."""
        shape = f"{self.kept.shape}:{self.order}:".encode()
        return hashlib.sha256(shape + np.packbits(self.kept).tobytes()).hexdigest()


@dataclass(frozen=True)
class Bank:
    """Retrains and what came out: `losses` [m, q] in nats per answer token, and the CPU seconds of one retrain."""

    plan: Plan
    losses: NDArray[np.float64]
    retrain_cpu_s: float

    @property
    def gains(self) -> NDArray[np.float64]:
        """Higher is better."""
        return -self.losses


def plan_banks(lab: Lab, drops: tuple[Drop, ...], *, num_subsets: int, num_orders: int) -> tuple[Plan, ...]:
    """Return the banks of a lab; the same subsets under every order."""
    num_rows = len(lab.examples)
    subsets = {drop: drop.subsets(num_rows, num_subsets, seed=lab.seed) for drop in drops}
    return tuple(Plan(drop, order, subsets[drop]) for order in range(num_orders) for drop in drops)


def make_bank(lab: Lab, plan: Plan, *, cache: Path) -> Bank:
    """Retrain on every subset, or read what an earlier call has done; stops and resumes at any chunk."""
    from time import process_time

    folder = cache / lab.digest[:16] / plan.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    run = lab.run(plan.order)
    losses, seconds = [], 0.0
    for start in range(0, len(plan.kept), CHUNK):
        file = folder / f"{start}.npz"
        kept = plan.kept[start : start + CHUNK]
        if not file.exists():
            began = process_time()
            state = run.run_many(torch.from_numpy(kept.astype(np.float32)))
            found = run.query_losses(state, lab.queries).double().numpy()
            _write(file, losses=found, cpu_s=np.array(process_time() - began))
        with np.load(file) as stored:
            losses.append(stored["losses"])
            seconds += float(stored["cpu_s"])
    return Bank(plan, np.concatenate(losses), seconds / len(plan.kept))


def _write(file: Path, **arrays: NDArray[np.generic]) -> None:
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.rename(file)


def announce(lab: Lab, plans: tuple[Plan, ...]) -> Iterator[str]:
    """Yield what is fixed before the first score: the digests of experiment and subset lists."""
    yield f"seed {lab.seed}: experiment sha256 {lab.digest}"
    for plan in plans:
        yield f"seed {lab.seed}: {plan.name}, {len(plan.kept)} subsets, sha256 {plan.digest}"
