"""What a codec's preconditioner leaves: examples that pull one way share what one of them alone would earn.

Rows already lie in the eigenbases of a block-diagonal curvature. Of what blocks cannot see, the leading directions in
which many examples agree are shrunk in a question's row, as ridge regression would: score = a_i^T (1 + A^T A / s)^-1 q,
a_i being an example's unit rows summed over the views by exposure (measured in docs/log.md, 2026-11-25).

Shape legend: n examples, m of them sampled, c views, d numbers in a row, r directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from attribution.influence.scores import TINY

if TYPE_CHECKING:
    from attribution.influence.shard import Shard

NUM_DIRECTIONS, NUM_SAMPLED = 64, 256
STRENGTH = 10.0
"""s, in squared lengths of a mean example; the lab's seed 0 prefers 6 on 5 % drops and 20 on half kept."""


@dataclass(frozen=True)
class Residual:
    """`directions` float32 [r, d], orthonormal; `shrink` float32 [r], the part of each that is taken away."""

    directions: NDArray[np.float32]
    shrink: NDArray[np.float32]

    def take_from(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return rows [.., d] without the shrunk parts."""
        taken = (rows @ self.directions.T * self.shrink) @ self.directions
        return (rows - taken).astype(np.float32, copy=False)

    def save(self, file: Path) -> None:
        """Write what `load` reads."""
        np.save(file, np.concatenate([self.shrink[:, None], self.directions], axis=1))

    @classmethod
    def load(cls, file: Path) -> "Residual":
        """Return what `save` wrote."""
        both: NDArray[np.float32] = np.load(file)
        return cls(both[:, 1:], both[:, 0])

    @classmethod
    def of(cls, shards: Sequence["Shard"], views: Sequence[str]) -> "Residual":
        """Return that of some shards' examples, `NUM_SAMPLED` at most, evenly spread."""
        rows = torch.from_numpy(_sample(shards, views))
        gram = rows @ rows.mT
        scale = float(gram.diagonal().mean().clamp_min(TINY)) * len(rows) / sum(shard.num_live for shard in shards)
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram / scale))
        num_kept = min(NUM_DIRECTIONS, int((values > values[0] * 1e-6).sum()))
        # What is not kept is not shrunk, so what is kept may not end up below it.
        rest = float(values[num_kept]) if num_kept < len(values) else 0.0
        kept = values[:num_kept]
        directions = vectors[:, :num_kept].mT @ rows / (kept * scale).sqrt()[:, None]
        return cls(directions.numpy(), (kept / (kept + max(STRENGTH, rest))).numpy())


def _sample(shards: Sequence["Shard"], views: Sequence[str]) -> NDArray[np.float32]:
    """Return [m, d]: examples' unit rows, summed over the views by exposure."""
    num = sum(shard.num_live for shard in shards)
    chosen = np.unique(np.linspace(0, num - 1, min(num, NUM_SAMPLED)).round().astype(np.int64))
    parts, first = [], 0
    for shard in shards:
        here = chosen[(chosen >= first) & (chosen < first + shard.num_live)] - first
        parts.append(_summed(shard, shard.live[here], views))
        first += shard.num_live
    return np.concatenate(parts)


def _summed(shard: "Shard", rows: NDArray[np.int64], views: Sequence[str]) -> NDArray[np.float32]:
    total = np.zeros((len(rows), shard.rows(views[0]).codes.shape[1]), np.float32)
    for column, view in enumerate(views):
        part = shard.rows(view).take(rows).values()
        part *= (shard.weights[rows, column] / np.maximum(shard.lengths(view)[rows], TINY))[:, None]
        total += part
    return total
