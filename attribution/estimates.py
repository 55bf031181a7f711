"""From measured utilities to values with intervals: Banzhaf from pairs, leave-one-out from near-full coalitions.

Shape legend: n players, k observations, q items. Two things are uncertain: which coalitions were drawn, and which items
the suite holds. A cell (player, item) has the first alone; a player's value over the suite has both.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attribution.ridge import RidgeFit, fit_ridge, scaled_prior
from attribution.significance import sign_flip_p

Array = NDArray[np.float64]


SPARE_OBSERVATIONS = 4
"""Observations beyond the number of players from which on they are fitted together."""


@dataclass(frozen=True)
class Estimate:
    """Values [n] over the suite and cells [n, q] of single items, each with its interval; `p_values` [n], unadjusted.

    `coalition_width` [n]: half the part of a value's interval that further coalitions could narrow; `item_width` [n]:
    half the part that only more items could.
    """

    values: Array
    low: Array
    high: Array
    cells: Array
    cell_low: Array
    cell_high: Array
    p_values: Array
    coalition_width: Array
    item_width: Array


@dataclass(frozen=True)
class Observed:
    """What a fit starts from: outcomes [k, q], in expectation design [k, n] times the cells [n, q].

    `share`: the part of all possible observations that these are. 1 means that nothing is left to estimate.
    """

    design: Array
    outcomes: Array
    share: float = 0.0

    @property
    def is_exact(self) -> bool:
        return self.share >= 1


@dataclass(frozen=True)
class _Fitted:
    """cells [n, q], their variances over coalitions, those of their means [n], and the degrees of freedom of both."""

    cells: Array
    cell_variance: Array
    mean_variance: Array
    shrinkage: Array
    df: float


def banzhaf_estimate(observed: Observed, *, prior: Array | None = None, confidence: float, seed: int) -> Estimate:
    """Return what pairs tell; `prior` [n, q] points where a cell is drawn to as far as data allow.

    The p-values use no prior: what a gradient predicted is no evidence that retraining found it.
    """
    fitted = _fit(observed, prior)
    return _estimate(fitted, fitted if prior is None else _fit(observed, None), confidence=confidence, seed=seed)


def left_out_estimate(observed: Observed, *, prior: Array, confidence: float, seed: int) -> Estimate:
    """Return leave-one-out values; each player stands in exactly one observation, which is a sum over its part.

    A part of several is divided by the prior, what it is off by going to all alike. How far single values may then be
    off is read from how far the sums are. A part of one player is exact.
    """
    design, outcomes = observed.design, observed.outcomes
    mean = scaled_prior(design, outcomes, prior)
    size = design.sum(axis=1)
    off = outcomes - design @ mean
    unit = 1 - 1 / (design.T @ size)
    fitted = _Fitted(
        cells=mean + design.T @ (off / size[:, None]),
        cell_variance=np.outer(unit, (off**2 / size[:, None]).mean(axis=0)),
        mean_variance=unit * float((off.mean(axis=1) ** 2 / size).mean()),
        shrinkage=np.ones(design.shape[1]),
        df=float(len(design)),
    )
    return _estimate(fitted, fitted, confidence=confidence, seed=seed)


def _estimate(fitted: _Fitted, plain: _Fitted, *, confidence: float, seed: int) -> Estimate:
    """Intervals from `fitted`; p-values from `plain`."""
    tail = (1 + confidence) / 2
    cell_half = stats.t.ppf(tail, fitted.df) * np.sqrt(fitted.cell_variance)
    item_variance = _item_variance(fitted)
    half = stats.t.ppf(tail, _joint_df(fitted, item_variance)) * np.sqrt(fitted.mean_variance + item_variance)
    values = fitted.cells.mean(axis=1)
    return Estimate(
        values=values,
        low=values - half,
        high=values + half,
        cells=fitted.cells,
        cell_low=fitted.cells - cell_half,
        cell_high=fitted.cells + cell_half,
        p_values=_p_values(plain, seed=seed),
        coalition_width=stats.t.ppf(tail, fitted.df) * np.sqrt(fitted.mean_variance),
        item_width=stats.t.ppf(tail, fitted.cells.shape[1] - 1) * np.sqrt(item_variance),
    )


def _fit(observed: Observed, prior: Array | None) -> _Fitted:
    design, outcomes = observed.design, observed.outcomes
    if observed.is_exact:
        cells: Array = np.asarray(np.linalg.lstsq(design, outcomes, rcond=None)[0], dtype=np.float64)
        none = np.zeros_like(cells)
        return _Fitted(cells, none, none[:, 0], np.ones(len(cells)), np.inf)
    mean = None if prior is None else scaled_prior(design, outcomes, prior)
    if len(design) < design.shape[1] + SPARE_OBSERVATIONS:
        return _fit_contrasts(observed, np.zeros_like(design.T @ outcomes) if mean is None else mean)
    fit = fit_ridge(design, outcomes, prior=mean)
    unit = np.diag(fit.scale) * (1 - observed.share)
    return _Fitted(
        cells=fit.coefficients,
        cell_variance=np.outer(unit, fit.variance()),
        mean_variance=unit * float(fit.variance(fit.residuals.mean(axis=1, keepdims=True))[0]),
        shrinkage=_kept(fit),
        df=fit.residual_df,
    )


def _fit_contrasts(observed: Observed, mean: Array) -> _Fitted:
    """Each player by itself, the others' effects counting as noise: all that fewer observations than players allow.

    Then nothing tells what is noise: a fit of all players together would follow every observation.
    """
    design, left = observed.design, observed.outcomes - observed.design @ mean
    k = len(design)
    shares = design[:, :, None] * left[:, None, :]  # [k, n, q]: each observation's own estimate, signs being +-1
    unit = (1 - observed.share) / k
    return _Fitted(
        cells=mean + shares.mean(axis=0),
        cell_variance=shares.var(axis=0, ddof=1) * unit,
        mean_variance=shares.mean(axis=2).var(axis=0, ddof=1) * unit,
        shrinkage=np.ones(design.shape[1]),
        df=float(k - 1),
    )


def _kept(fit: RidgeFit) -> Array:
    """The part of each coefficient's deviation from its prior that the data kept: 1 without a penalty."""
    return np.clip(1 - fit.penalty * np.diag(fit.scale), 0, 1)


def _item_variance(fitted: _Fitted) -> Array:
    """The variance of a mean over items drawn from many, [n].

    The spread of estimated cells holds their own noise too (to be taken off where they are not shrunk, added where they
    are shrunk to nothing); noise that all items share moves the mean, not the spread.
    """
    num_items = fitted.cells.shape[1]
    noise = np.maximum(0.0, fitted.cell_variance.mean(axis=1) - fitted.mean_variance)
    spread = fitted.cells.var(axis=1, ddof=1) + (1 - 2 * fitted.shrinkage) * noise
    return np.asarray(np.maximum(0.0, spread) / num_items)


def _joint_df(fitted: _Fitted, item_variance: Array) -> Array:
    """Degrees of freedom of the sum of both variances (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    items_df = fitted.cells.shape[1] - 1
    total = fitted.mean_variance + item_variance
    parts = fitted.mean_variance**2 / fitted.df + item_variance**2 / items_df
    return np.where(parts > 0, total**2 / np.where(parts > 0, parts, 1), items_df)


def _p_values(fitted: _Fitted, *, seed: int) -> Array:
    """The larger of a t-test over coalitions and items and of a sign-flip test over items: few cannot seem many."""
    item_variance = _item_variance(fitted)
    deviation = np.sqrt(fitted.mean_variance + item_variance)
    values = fitted.cells.mean(axis=1)
    ratio = np.divide(abs(values), deviation, out=np.full_like(values, np.inf), where=deviation > 0)
    by_t = 2 * stats.t.sf(ratio, _joint_df(fitted, item_variance))
    return np.where(values == 0, 1.0, np.maximum(by_t, sign_flip_p(fitted.cells, seed=seed)))
