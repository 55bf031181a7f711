"""Measure random cells of a statement's settlements again, by training their coalitions anew.

Whoever checks draws the cells, after the statement was signed, so that nobody can prepare for them. The training itself
is injected: `pipelines` has it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.log.proved import VerifyError
from attribution.settlement import settlement_of
from attribution.statement import Statement, StatementError

if TYPE_CHECKING:
    from attribution.settlement import Settlement
    from attribution.trail import Trail


@dataclass(frozen=True)
class Cell:
    """One item's utility under one coalition of a settlement: as recorded, and as measured again now."""

    settlement: str
    coalition: str
    item: int
    recorded: float
    measured: float

    @property
    def difference(self) -> float:
        """How far apart the two are."""
        return abs(self.recorded - self.measured)


@dataclass(frozen=True)
class Recheck:
    """Cells measured again: `seed` chose them, `tolerance` is what they may differ by."""

    seed: int
    tolerance: float
    cells: tuple[Cell, ...]

    @property
    def worst(self) -> Cell:
        """The cell that differs most."""
        return max(self.cells, key=lambda cell: cell.difference)


Recompute = Callable[["Trail", "Settlement", str], Sequence[float]]
"""`recheck_cell(trail, settlement, coalition bits)` -> the utility of each item, by training that coalition again."""


def recheck(
    trail: "Trail", statement: Statement, recompute: Recompute, *, num_cells: int, tolerance: float, seed: int | None
) -> Recheck:
    """Measure random cells of the statement's settlements again by retraining; whoever checks draws the seed.

    Raises:
        StatementError: no settlement stands behind the statement.
        VerifyError: a cell differs by more than `tolerance`, with its place.
    """
    if not statement.settlements:
        raise StatementError("recheck: no settlement stands behind this statement; there is no cell to measure again")
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    used = [settlement_of(trail, trail.entry(settled.leaf)) for settled in statement.settlements]
    places = [
        (number, row["coalition"], item)
        for number, settlement in enumerate(used)
        for row in trail.get_table(settlement.table).to_pylist()
        for item in range(len(row["utilities"]))
    ]
    drawn = random.Random(seed).sample(places, min(num_cells, len(places)))
    cells = []
    for number, coalition in dict.fromkeys((number, coalition) for number, coalition, _ in drawn):
        measured = recompute(trail, used[number], coalition)
        recorded = _recorded(trail, used[number], coalition)
        items = [item for where, name, item in drawn if (where, name) == (number, coalition)]
        cells += [
            Cell(used[number].leaf_hash, coalition, item, recorded[item], float(measured[item])) for item in items
        ]
    found = Recheck(seed, tolerance, tuple(cells))
    if found.worst.difference > tolerance:
        worst = found.worst
        raise VerifyError(
            "recheck",
            f"settlement {worst.settlement[:16]}, coalition {worst.coalition}, item {worst.item}: recorded "
            f"{worst.recorded:.6f}, measured again {worst.measured:.6f}; they differ by more than {tolerance:g}",
        )
    return found


def _recorded(trail: "Trail", settlement: "Settlement", coalition: str) -> list[float]:
    rows = trail.get_table(settlement.table).to_pylist()
    return next(list(row["utilities"]) for row in rows if row["coalition"] == coalition)
