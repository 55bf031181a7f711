"""From gradients to credit: example scores, their stability under reweighting, contributors' shares. NumPy only.

Shape legend: c checkpoints, g token groups of the completion, n training examples, k contributors, b bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attribution.influence.rows import Rows

Normalise = Literal["none", "cosine"]
TINY = float(np.finfo(np.float32).tiny)
"""Put under a division whose divisor may be zero, as for an example without gradient."""


@dataclass(frozen=True)
class Interval:
    """A range at the stated confidence."""

    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0


@dataclass(frozen=True)
class Share:
    """One contributor's part. `score` is the net sum over their examples; `share` is 0 when it may be zero or less."""

    key_id: str
    score: float
    score_interval: Interval
    share: float
    share_interval: Interval


@dataclass(frozen=True)
class Split:
    """Shares by descending score; they and `unattributed` sum to 1."""

    shares: tuple[Share, ...]
    unattributed: float


def score_parts(query: NDArray[np.float32], rows: Rows, *, normalise: Normalise) -> NDArray[np.float64]:
    """Return float64 [c, g, n]: the part of each example's score that each checkpoint and token group contributes.

    The sum over c and g is the example's score, positive when including the example lowered the completion's loss.
    query is [c, g, dim], w the exposure (see Trace.exposure), h the stored gradients. Semantics:
    - "none": part[c, g, i] = sqrt(1 - beta2^c) w[c, i] <q[c, g], h[c, i]>. TracInCP (Pruthi et al. 2020) under Adam:
      to first order the nats by which example i raised the completion's log-likelihood.
    - "cosine": part[c, g, i] = K w[c, i] / sum_j w[c, j] <q[c, g], h[c, i]> / (|q[c]| |h[c, i]|), after LESS (Xia et
      al. 2024): an outlier's long gradient and an early checkpoint's long gradients buy nothing. Unlike LESS, all
      checkpoints weigh the same: under a rate that falls to zero, rates would silence the model that answered. K is
      one number that brings the mean magnitude back to that of "none".
    """
    exposure = rows.exposure()
    corrections = rows.corrections()
    parts = np.empty((*query.shape[:2], rows.num_examples))
    raw_size = 0.0
    for index in range(len(query)):
        dots, lengths = rows.dots(index, query[index])
        raw = dots * exposure[index] * corrections[index]
        raw_size += float(np.abs(raw.sum(axis=0)).sum())
        if normalise == "none":
            parts[index] = raw
        else:
            seen = exposure[index] / max(float(exposure[index].sum()), TINY)
            query_length = np.linalg.norm(query[index].sum(axis=0, dtype=np.float64))
            parts[index] = dots * seen / np.maximum(query_length * lengths, TINY)
    if normalise == "cosine":
        parts *= raw_size / max(float(np.abs(parts.sum(axis=1)).sum()), TINY)
    return parts


def sum_by_contributor(
    parts: NDArray[np.float64], contributors: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return (sorted key ids, float64 [c, g, k]) from parts [c, g, n] and the contributor of each example."""
    owners = np.asarray(contributors, dtype=str)
    key_ids = sorted(set(contributors))
    summed = np.stack([parts[:, :, owners == key_id].sum(axis=2) for key_id in key_ids], axis=2)
    return tuple(key_ids), summed


def bootstrap(parts: NDArray[np.float64], *, num_draws: int, seed: int) -> NDArray[np.float64]:
    """Return float64 [b, m]: totals of parts [c, g, m] under random weights on checkpoints and on token groups.

    Bayesian bootstrap (Rubin 1981): weights are Dirichlet(1, ..., 1), scaled to mean 1, drawn for each axis alone. The
    plain bootstrap would drop the one group that holds a fact's words in a third of the draws.
    """
    generator = np.random.default_rng(seed)
    num_checkpoints, num_groups, _ = parts.shape
    on_checkpoints = generator.dirichlet(np.ones(num_checkpoints), num_draws) * num_checkpoints
    on_groups = generator.dirichlet(np.ones(num_groups), num_draws) * num_groups
    weights = (on_checkpoints[:, :, None] * on_groups[:, None, :]).reshape(num_draws, -1)
    return weights @ parts.reshape(num_checkpoints * num_groups, -1)


def bootstrap_mean(values: NDArray[np.float64], *, num_draws: int, seed: int, confidence: float) -> Interval:
    """Return the interval of the mean of values [t] under Dirichlet weights. One value gives a range of no width."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(values)), num_draws)
    return interval(weights @ values, confidence=confidence)


def interval(draws: NDArray[np.float64], *, confidence: float) -> Interval:
    """Return the central interval of draws [b]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def split_shares(
    key_ids: Sequence[str], totals: NDArray[np.float64], draws: NDArray[np.float64], *, confidence: float
) -> Split:
    """Return shares from net scores [k] and their draws [b, k].

    A share is a positive net score over the sum of all positive ones, paid only when its interval lies above zero; what
    is not paid is unattributed. Netting comes first, then the threshold, then the clip: clipping first pays noise.
    """
    positive = np.maximum(totals, 0)
    pool = positive.sum()
    drawn = np.maximum(draws, 0)
    drawn_shares = drawn / np.maximum(drawn.sum(axis=1, keepdims=True), TINY)
    shares = []
    for column in sorted(range(len(key_ids)), key=lambda column: (-totals[column], key_ids[column])):
        scores = interval(draws[:, column], confidence=confidence)
        paid = bool(scores.is_above_zero and totals[column] > 0)
        shares.append(
            Share(
                key_id=key_ids[column],
                score=float(totals[column]),
                score_interval=scores,
                share=float(positive[column] / pool) if paid else 0.0,
                share_interval=interval(drawn_shares[:, column], confidence=confidence) if paid else Interval(0.0, 0.0),
            )
        )
    return Split(tuple(shares), unattributed=max(0.0, 1.0 - sum(share.share for share in shares)))


def in_micros(split: Split) -> tuple[tuple[int, ...], int]:
    """Return (shares in millionths, unattributed in millionths), rounded down and the rest unattributed: 1,000,000."""
    micros = tuple(int(share.share * 1_000_000) for share in split.shares)
    return micros, 1_000_000 - sum(micros)
