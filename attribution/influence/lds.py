"""How well influence scores foretell retrains: the linear datamodelling score with its uncertainty. NumPy only.

LDS (Park et al. 2023, https://arxiv.org/abs/2303.14186): for a query, the rank correlation over random subsets of the
training set between what the scores foretell (the sum over the rows kept) and what a model trained on that subset does.
Shape legend: q queries, n examples, m subsets, d bootstrap draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.errors import UserError

Floats = NDArray[np.float64]


class LdsError(UserError):
    """Scores, subsets and outcomes do not belong together."""


@dataclass(frozen=True)
class Lds:
    """The mean over queries with its interval from a nested bootstrap; `per_query` is [q], `draws` is [d]."""

    value: float
    low: float
    high: float
    per_query: Floats
    draws: Floats

    def minus(self, other: "Lds", *, confidence: float = 0.95) -> "Lds":
        """Return the difference; both must come from the same resampling, so that their draws are paired."""
        draws = self.draws - other.draws
        low, high = _central(draws, confidence)
        return Lds(self.value - other.value, low, high, self.per_query - other.per_query, draws)


@dataclass(frozen=True)
class Resamples:
    """How often each draw of the nested bootstrap takes each query [d, q] and each subset [d, m]."""

    queries: Floats
    subsets: Floats

    @classmethod
    def of(cls, *, num_queries: int, num_subsets: int, num_draws: int = 1000, seed: int = 0) -> "Resamples":
        """Draw queries and subsets with replacement, each for itself. One `Resamples` serves every method of a bank."""
        generator = np.random.default_rng(seed)
        return cls(
            queries=generator.multinomial(num_queries, _even(num_queries), size=num_draws).astype(np.float64),
            subsets=generator.multinomial(num_subsets, _even(num_subsets), size=num_draws).astype(np.float64),
        )


def lds(
    scores: ArrayLike, kept: NDArray[np.bool_], gains: ArrayLike, *, resamples: Resamples, confidence: float = 0.95
) -> Lds:
    """Return the score of a method on one bank of retrains.

    scores [q, n]: positive when including the example helps the query. kept [m, n]: which rows each retrain had.
    gains [m, q]: what the retrain does on the query, higher is better (for a loss, pass its negative). A query whose
    predictions or gains are all alike counts as 0: the scores say nothing about it. Raises LdsError for shapes that do
    not fit or numbers that are not finite.
    """
    tau, outcome = np.asarray(scores, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if tau.ndim != 2 or kept.ndim != 2 or outcome.shape != (len(kept), len(tau)) or tau.shape[1] != kept.shape[1]:
        raise LdsError(
            f"scores {tau.shape}, kept {kept.shape}, gains {outcome.shape}: expected [q, n], [m, n] and [m, q]"
        )
    return rank_agreement(kept.astype(np.float64) @ tau.T, outcome, resamples=resamples, confidence=confidence)


def rank_agreement(predicted: Floats, gains: Floats, *, resamples: Resamples, confidence: float = 0.95) -> Lds:
    """Return the mean over queries of the rank correlation of two tables [m, q]. Between two banks of the same subsets
    under different data orders this is the noise ceiling's square: no method that ignores the order can be expected to
    do better than its root."""
    if predicted.shape != gains.shape:
        raise LdsError(f"predicted {predicted.shape} and gains {gains.shape}: they must be alike")
    for name, table in (("scores", predicted), ("gains", gains)):
        if not np.isfinite(table).all():
            raise LdsError(f"{name}: {int((~np.isfinite(table)).sum())} numbers are not finite; leave such queries out")
    once = np.ones((1, len(predicted)))
    columns = range(predicted.shape[1])
    per_query = np.array([weighted_spearman(predicted[:, j], gains[:, j], once)[0] for j in columns])
    drawn = np.stack([weighted_spearman(predicted[:, j], gains[:, j], resamples.subsets) for j in columns], axis=1)
    draws = (drawn * resamples.queries).sum(axis=1) / resamples.queries.sum(axis=1)
    return Lds(float(per_query.mean()), *_central(draws, confidence), per_query, draws)


def mean_over_banks(found: "list[Lds]", *, confidence: float = 0.95) -> Lds:
    """Return the mean of independent banks (say, of several seeds), their draws matched at random."""
    generator = np.random.default_rng(0)
    draws = np.mean([generator.permutation(one.draws) for one in found], axis=0)
    value = float(np.mean([one.value for one in found]))
    return Lds(value, *_central(draws, confidence), np.concatenate([one.per_query for one in found]), draws)


def weighted_spearman(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return [d]: Spearman's correlation of x and y [m], item j taken weights[:, j] times; ties share their mean rank.

    The ranks are those within the resample: an item taken thrice is three equal items.
    """
    ranks_x, ranks_y = _mean_ranks(x, weights), _mean_ranks(y, weights)
    total = weights.sum(axis=1, keepdims=True)
    centred_x = ranks_x - (weights * ranks_x).sum(axis=1, keepdims=True) / total
    centred_y = ranks_y - (weights * ranks_y).sum(axis=1, keepdims=True) / total
    covariance = (weights * centred_x * centred_y).sum(axis=1)
    scale = np.sqrt((weights * centred_x**2).sum(axis=1) * (weights * centred_y**2).sum(axis=1))
    found: Floats = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-9)
    return found


def _mean_ranks(values: Floats, weights: Floats) -> Floats:
    """Return [d, m]: each item's mean rank (less a constant) among items repeated `weights` times."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    in_group = np.add.reduceat(weights[:, order], starts, axis=1)
    middle: Floats = np.cumsum(in_group, axis=1) - in_group / 2
    return middle[:, group]


def _even(count: int) -> Floats:
    return np.full(count, 1 / count)


def _central(draws: Floats, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
