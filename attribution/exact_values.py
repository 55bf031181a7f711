"""Values of players from all coalitions, and the plain estimate from some: what every faster method is held to.

Shape legend: n players, m coalitions, q items. Row c of a table of all coalitions is that whose bits are c, player 0
being the lowest bit.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_PLAYERS = 16


def all_coalitions(num_players: int) -> NDArray[np.bool_]:
    """Return every coalition, bool [2^n, n]."""
    assert num_players <= MAX_PLAYERS, "2^n coalitions are too many to list"
    return ((np.arange(2**num_players)[:, None] >> np.arange(num_players)) & 1).astype(bool)


def exact_banzhaf(utilities: Array) -> Array:
    """Return [n, q]: each player's marginal utility averaged over all coalitions of the others; utilities [2^n, q]."""
    return np.stack([gains.mean(axis=0) for gains in _marginals(utilities)])


def exact_shapley(utilities: Array) -> Array:
    """Return [n, q]: the same, each coalition size weighing alike; the values add up to full minus empty."""
    n = _num_players(utilities)
    sizes = all_coalitions(n).sum(axis=1)
    weights = np.array([1 / (n * comb(n - 1, size)) for size in range(n)])
    return np.stack(
        [
            np.tensordot(weights[sizes[~_has(n, player)]], gains, axes=1)
            for player, gains in enumerate(_marginals(utilities))
        ]
    )


def leave_one_out(utilities: Array) -> Array:
    """Return [n, q]: the full coalition less all but one player."""
    full = len(utilities) - 1
    return np.stack([utilities[full] - utilities[full - 2**player] for player in range(_num_players(utilities))])


def msr_banzhaf(coalitions: NDArray[np.bool_], utilities: Array) -> Array:
    """Return [n, q]: mean utility with a player less mean without, over m sampled coalitions [m, n].

    Maximum sample reuse: Wang and Jia, Data Banzhaf (2023), arXiv:2205.15466. A player always or never drawn gets 0.
    """
    values = np.zeros((coalitions.shape[1], utilities.shape[1]))
    for player, chosen in enumerate(coalitions.T):
        if chosen.any() and not chosen.all():
            values[player] = utilities[chosen].mean(axis=0) - utilities[~chosen].mean(axis=0)
    return values


def _marginals(utilities: Array) -> list[Array]:
    """For each player [2^(n-1), q]: utility with it less without it."""
    n = _num_players(utilities)
    return [utilities[_has(n, player)] - utilities[~_has(n, player)] for player in range(n)]


def _has(num_players: int, player: int) -> NDArray[np.bool_]:
    return ((np.arange(2**num_players) >> player) & 1).astype(bool)


def _num_players(utilities: Array) -> int:
    n = len(utilities).bit_length() - 1
    assert len(utilities) == 2**n, "one row for each of the 2^n coalitions"
    return n
