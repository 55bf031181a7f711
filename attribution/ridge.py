"""Ridge regression in closed form, many outcomes at once, its penalty by generalised cross-validation.

Shape legend: k observations, n coefficients, q outcomes that share the penalty.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTIES = np.logspace(-6, 4, 81)
"""Candidates, in units of the mean squared column length of the design."""
MIN_RESIDUAL_DF = 1.0


@dataclass(frozen=True)
class RidgeFit:
    """coefficients [n, q]; `scale` [n, n]: their covariance per unit of residual variance; residuals [k, q]."""

    coefficients: Array
    scale: Array
    residuals: Array
    penalty: float
    residual_df: float

    def variance(self, residuals: Array | None = None) -> Array:
        """Return the residual variance of each outcome [q], or of other outcomes fitted alike."""
        left = self.residuals if residuals is None else residuals
        return np.asarray((left**2).sum(axis=0) / self.residual_df)


def fit_ridge(design: Array, outcomes: Array, *, prior: Array | None = None, penalty: float | None = None) -> RidgeFit:
    """Minimise |outcomes - design b|^2 + penalty |b - prior|^2 for design [k, n], outcomes [k, q], prior [n, q].

    Without a `penalty`, the one of least generalised cross-validation error is taken, each outcome counting by its own
    size (Golub, Heath and Wahba, Technometrics 21, 1979, doi:10.1080/00401706.1979.10489751). `scale` is that of the
    Bayesian model behind ridge, whose intervals keep their level across coefficients though each one is shrunk (Wahba,
    J. R. Stat. Soc. B 45, 1983, doi:10.1111/j.2517-6161.1983.tb01239.x).
    """
    mean = np.zeros((design.shape[1], outcomes.shape[1])) if prior is None else prior
    left, singular, right = np.linalg.svd(design, full_matrices=False)
    off = outcomes - design @ mean
    chosen = _best_penalty(design, left, singular, off) if penalty is None else penalty
    shrink = _shrinkage(singular, chosen)
    shift = right.T @ ((shrink / np.where(singular > 0, singular, 1.0))[:, None] * (left.T @ off))
    gram = design.T @ design + chosen * np.eye(design.shape[1])
    return RidgeFit(
        coefficients=mean + shift,
        scale=np.asarray(np.linalg.pinv(gram, hermitian=True), dtype=np.float64),
        residuals=off - design @ shift,
        penalty=chosen,
        residual_df=max(MIN_RESIDUAL_DF, len(design) - float(shrink.sum())),
    )


def scaled_prior(design: Array, outcomes: Array, direction: Array) -> Array:
    """Return `direction` [n, q] times the one factor, zero or more, by which it fits the outcomes best."""
    predicted = design @ direction
    size = (outcomes**2).sum(axis=0)
    weight = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    power = float((predicted**2 * weight).sum())
    factor = float((predicted * outcomes * weight).sum()) / power if power > 0 else 0.0
    return direction * max(0.0, factor)


def _best_penalty(design: Array, left: Array, singular: Array, off: Array) -> float:
    """GCV over PENALTIES; those that leave less than MIN_RESIDUAL_DF are passed over, the largest excepted."""
    unit = float((design**2).sum(axis=0).mean()) or 1.0
    size = (off**2).sum(axis=0)
    weight = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    seen = (left.T @ off) ** 2 @ weight
    outside = float(weight @ size - seen.sum())
    best, least = float(PENALTIES[-1]) * unit, np.inf
    for penalty in PENALTIES * unit:
        shrink = _shrinkage(singular, float(penalty))
        df = len(design) - float(shrink.sum())
        error = (outside + float(((1 - shrink) ** 2) @ seen)) / df**2
        if df >= MIN_RESIDUAL_DF and error < least:
            best, least = float(penalty), error
    return best


def _shrinkage(singular: Array, penalty: float) -> Array:
    power = singular**2
    return np.divide(power, power + penalty, out=np.zeros_like(power), where=power > 0)
