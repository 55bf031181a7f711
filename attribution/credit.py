"""What each player is worth to a utility: coalitions are measured until the values are known well enough.

The utility is injected: a callable that trains coalitions again, or a table of them. Nothing here knows of models,
cluster or log. Shape legend: n players, b coalitions measured at once, m in all, q items; higher utility is better.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attribution.coalitions import Coalitions, PairDesign, near_full
from attribution.estimates import Array, Estimate, Observed, banzhaf_estimate, left_out_estimate
from attribution.settlement import SettledVerdict
from attribution.significance import holm
from configs.errors import UserError

Utility = Callable[[Coalitions], Array]
"""Coalitions bool [b, n] to the utility of each item, float64 [b, q]."""

RULE = 1
"""Version of how coalitions are drawn and values fitted, to be counted up with every change of either: what another
version settled cannot be fitted again by this one."""
MIN_PAIRS = 4
MIN_ITEMS = 2
NEGLIGIBLE = 1 / 3
"""Coalitions are enough where their part of an interval is this part of what the items leave open: then the whole is at
most 6 % wider than with all coalitions."""


class CreditError(UserError):
    """Nothing can be said about the players' values: too small a budget, or too few items."""


@dataclass(frozen=True)
class Search:
    """How long to look. `budget`: retrains, the empty coalition being free (nothing is trained).

    `precision`: half an interval's width, as a part of |full - empty|, that is narrow enough; 0 never is. `batch`:
    retrains that run at once. Whether a value can be told from zero never stops the search.
    """

    budget: int
    precision: float = 0.05
    confidence: float = 0.9
    seed: int = 0
    batch: int = 8

    @classmethod
    def of(cls, section: Any) -> "Search":
        """Return the search that a `settle` section of the configuration asks for."""
        at_once = section.num_workers * section.runs_at_once
        return cls(section.budget, section.precision, section.confidence, section.seed, batch=at_once)


@dataclass(frozen=True)
class Credit:
    """Banzhaf and leave-one-out values, the utilities [q] without and with all players, and all that was measured.

    `p_values` [n] belong to the Banzhaf values and are adjusted by Holm. `stopped`: why no further coalition was taken.
    """

    banzhaf: Estimate
    leave_one_out: Estimate
    p_values: Array
    empty: Array
    full: Array
    coalitions: Coalitions
    utilities: Array
    num_pairs: int
    confidence: float
    stopped: Literal["exact", "narrow", "budget"]

    def verdict(self, player: int) -> SettledVerdict:
        """Say what a player did, at the family-wise level of the confidence."""
        if self.p_values[player] >= 1 - self.confidence:
            return "no measurable effect"
        return "helped" if self.banzhaf.values[player] > 0 else "hindered"


Progress = Callable[[Credit], None]


def least_budget(num_players: int) -> int:
    """Return the retrains without which nothing can be said of so many players."""
    all_but_empty = 2**num_players - 1
    return min(all_but_empty, 1 + min(num_players, 2) + 2 * MIN_PAIRS)


def least_items(num_players: int, confidence: float) -> int:
    """Return the items below which no player can be told from nothing, were its effect of one sign on all of them.

    The sign-flip test over q items cannot go below 2^(1 - q), which Holm multiplies by the number of players.
    """
    return max(MIN_ITEMS, math.floor(math.log2(num_players / (1 - confidence))) + 2)


def num_near_full(num_players: int, budget: int) -> int:
    """Return the retrains for leave-one-out: one a player where a fifth of the budget suffices, else an eighth.

    Banzhaf values, which are what is paid, lose by it: with 8 players and 32 retrains a quarter spent here left them at
    r = .95 with the exact ones, an eighth at .97 (benchmarks/contributor_credit.py).
    """
    if num_players <= budget // 5 or 2**num_players - 1 <= budget:
        return num_players
    return max(2, min(num_players, budget // 8))


def measure_credit(
    utility: Utility,
    num_players: int,
    *,
    search: Search,
    prior: Array | None = None,
    progress: Progress | None = None,
) -> Credit:
    """Measure coalitions until intervals are narrow or the budget is spent. `prior` [n, q]: predicted gains, any scale.

    Raises:
        CreditError: no players, a budget below `least_budget`, or fewer than two items.
    """
    require_measurable(num_players, search, num_items=MIN_ITEMS)
    table = Table(utility, num_players)
    full = np.ones((1, num_players), dtype=bool)
    left_out = near_full(num_players, num_near_full(num_players, search.budget), seed=search.seed)
    table.measure(np.concatenate([~full, full, left_out]))
    require_measurable(num_players, search, num_items=table.utilities.shape[1])
    design = PairDesign(num_players, search.seed)
    weights = np.ones(num_players)
    while True:
        table.measure(design.draw(_next_pairs(table, design, search), weights=weights))
        credit = _credit(table, design, left_out, search=search, prior=prior)
        if progress is not None:
            progress(credit)
        if credit.stopped != "budget" or _next_pairs(table, design, search) == 0:
            return credit
        weights = np.where(_is_narrow(credit, search), 1e-3, 1.0)


class Table:
    """The coalitions measured so far, each once, in the order in which they were."""

    def __init__(self, utility: Utility, num_players: int) -> None:
        self._utility = utility
        self._rows: dict[bytes, int] = {}
        self.coalitions: Coalitions = np.empty((0, num_players), dtype=bool)
        self.utilities: Array = np.empty((0, 0))

    @property
    def num_trained(self) -> int:
        """Coalitions with somebody in them."""
        return int(self.coalitions.any(axis=1).sum())

    def measure(self, coalitions: Coalitions) -> None:
        """Measure those not known yet, all in one call."""
        new = [row for row in {row.tobytes(): row for row in coalitions}.values() if row.tobytes() not in self._rows]
        if not new:
            return
        found = np.asarray(self._utility(np.stack(new)), dtype=np.float64)
        if found.shape[0] != len(new) or not np.isfinite(found).all():
            raise CreditError("utility: a coalition has no finite value for some item; see what its training said")
        self._rows.update({row.tobytes(): len(self._rows) + place for place, row in enumerate(new)})
        self.coalitions = np.concatenate([self.coalitions, np.stack(new)])
        self.utilities = np.concatenate([self.utilities.reshape(-1, found.shape[1]), found])

    def of(self, coalitions: Coalitions) -> Array:
        """Return the utilities [b, q] of measured coalitions."""
        return self.utilities[[self._rows[row.tobytes()] for row in coalitions]]


def banzhaf_observed(design: PairDesign, table: Table) -> Observed:
    """Return what pairs tell: u(S) - u(complement) = sum of +-value, plus interactions of three and more."""
    signs = design.matrix()
    outcomes = table.of(signs > 0) - table.of(signs < 0)
    return Observed(signs, outcomes, design.share)


def left_out_observed(left_out: Coalitions, table: Table) -> Observed:
    """Return what near-full coalitions tell: u(all) - u(all but D) = the sum over D."""
    full = np.ones((1, left_out.shape[1]), dtype=bool)
    return Observed((~left_out).astype(np.float64), table.of(full) - table.of(left_out))


def _credit(table: Table, design: PairDesign, left_out: Coalitions, *, search: Search, prior: Array | None) -> Credit:
    how: dict[str, Any] = {"confidence": search.confidence, "seed": search.seed}
    banzhaf = banzhaf_estimate(banzhaf_observed(design, table), prior=prior, **how)
    near = left_out_estimate(left_out_observed(left_out, table), prior=banzhaf.cells, **how)
    full = np.ones((1, design.num_players), dtype=bool)
    credit = Credit(
        banzhaf=banzhaf,
        leave_one_out=near,
        p_values=holm(banzhaf.p_values),
        empty=table.of(~full)[0],
        full=table.of(full)[0],
        coalitions=table.coalitions,
        utilities=table.utilities,
        num_pairs=len(design.signs),
        confidence=search.confidence,
        stopped="exact" if design.is_complete else "budget",
    )
    is_narrow = credit.stopped == "budget" and search.precision > 0 and bool(_is_narrow(credit, search).all())
    return replace(credit, stopped="narrow") if is_narrow else credit


def _is_narrow(credit: Credit, search: Search) -> NDArray[np.bool_]:
    """Which players' values more coalitions would not help: narrow already, or held open by the items."""
    goal = search.precision * abs(float(credit.full.mean() - credit.empty.mean()))
    width = credit.banzhaf.coalition_width
    return np.asarray(width <= np.maximum(goal, NEGLIGIBLE * credit.banzhaf.item_width))


def _next_pairs(table: Table, design: PairDesign, search: Search) -> int:
    """How many pairs to draw now: enough for a first fit, then a batch; all that are left where the budget has room."""
    left = search.budget - table.num_trained
    if design.num_pairs is not None and 2**design.num_players - 1 <= search.budget:
        affordable = design.num_pairs - len(design.signs)
    else:
        affordable = left // 2
    wanted = design.num_players + MIN_PAIRS if not design.signs else max(1, search.batch // 2)
    return max(0, min(affordable, wanted))


def require_measurable(num_players: int, search: Search, *, num_items: int) -> None:
    """Raise CreditError, before anything is trained, where nothing could be said; the message says what is needed."""
    if num_players < 1:
        raise CreditError("players: there are none to settle over")
    if num_items < MIN_ITEMS:
        raise CreditError(f"suite: {num_items} item says nothing about others; give a suite of {MIN_ITEMS} or more")
    least = least_budget(num_players)
    if search.budget < least:
        raise CreditError(
            f"budget {search.budget}: {num_players} players need at least {least} retrains (all players, "
            f"leave-one-out, and {MIN_PAIRS} pairs of coalitions); give --budget {least} or more"
        )
