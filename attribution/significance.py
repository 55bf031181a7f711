"""Whether an effect can be told from none: a paired test over items, and Holm's correction for a family of tests."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

MAX_EXACT_ITEMS = 12
NUM_FLIPS = 20_000


def sign_flip_p(effects: NDArray[np.float64], *, seed: int) -> float:
    """Return the two-sided p-value of a mean effect over paired items [q], were each as likely to be negative.

    Exact for up to MAX_EXACT_ITEMS items, else from NUM_FLIPS drawn flips with the observed one counted among them
    (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    shown = effects[effects != 0]
    if not len(shown):
        return 1.0
    observed = abs(shown.sum()) * (1 - 1e-12)
    if len(shown) <= MAX_EXACT_ITEMS:
        flips = np.array(list(product((-1.0, 1.0), repeat=len(shown))))
        return float((abs(flips @ shown) >= observed).mean())
    generator = np.random.default_rng(seed)
    flips = generator.choice([-1.0, 1.0], size=(NUM_FLIPS, len(shown)))
    return float((1 + (abs(flips @ shown) >= observed).sum()) / (1 + NUM_FLIPS))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values adjusted so that all of them below a level are wrong together at that level at most.

    Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(steps)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted
