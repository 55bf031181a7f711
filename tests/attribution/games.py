"""Made-up games whose exact values are known: utilities of every coalition, and a callable that hands them out."""

import numpy as np
from numpy.typing import NDArray

from attribution.coalitions import Coalitions
from attribution.exact_values import all_coalitions

Array = NDArray[np.float64]


def concave_game(num_players: int, num_items: int, *, noise: float, seed: int) -> Array:
    """Utilities [2^n, q]: what players bring by themselves, less the more there are of them, pairs that help or hinder
    each other, and for each coalition something that follows from nothing."""
    draw = np.random.default_rng(seed)
    coalitions = all_coalitions(num_players)
    own = draw.normal(size=(num_players, num_items)) * 0.5 + draw.normal(size=(num_players, 1)) * 0.5
    utilities = coalitions @ own + 3 * np.sqrt(coalitions.sum(axis=1, keepdims=True)) * draw.uniform(
        0.5, 1.5, num_items
    )
    for _ in range(num_players**2 // 2):
        first, second = draw.choice(num_players, 2, replace=False)
        utilities += (coalitions[:, first] & coalitions[:, second])[:, None] * draw.normal(size=num_items) * 0.2
    shape = utilities.shape
    return np.asarray(utilities + noise * (draw.normal(size=shape) + draw.normal(size=(shape[0], 1))))


class TableUtility:
    """The utility that looks a coalition up; counts how often each was asked for."""

    def __init__(self, utilities: Array) -> None:
        self.utilities = utilities
        self.asked: list[int] = []

    def __call__(self, coalitions: Coalitions) -> Array:
        numbers = (coalitions * 2 ** np.arange(coalitions.shape[1])).sum(axis=1)
        self.asked += numbers.tolist()
        return self.utilities[numbers]
