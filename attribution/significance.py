"""Whether an effect can be told from none: a paired test over items, and Holm's correction for a family of tests."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

MAX_EXACT_ITEMS = 12
NUM_FLIPS = 10_000


def sign_flip_p(effects: NDArray[np.float64], *, seed: int) -> NDArray[np.float64]:
    """Return [n]: two-sided p-values of mean effects [n, q] over paired items, were each as likely to be negative.

    Exact for up to MAX_EXACT_ITEMS items, else from NUM_FLIPS drawn flips with the observed one counted among them
    (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    num_items = effects.shape[1]
    observed = abs(effects.sum(axis=1)) * (1 - 1e-12)
    if num_items <= MAX_EXACT_ITEMS:
        flips = np.array(list(product((-1.0, 1.0), repeat=num_items)))
        return np.asarray((abs(flips @ effects.T) >= observed).mean(axis=0))
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(NUM_FLIPS, num_items))
    return np.asarray((1 + (abs(flips @ effects.T) >= observed).sum(axis=0)) / (1 + NUM_FLIPS))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values adjusted so that all of them below a level are wrong together at that level at most.

    Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(steps)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted
