"""Measure random cells of a statement's settlements again, by training their coalitions anew.

Whoever checks draws the cells, after the statement was signed, so that nobody can prepare for them. The training itself
is injected: `pipelines.settle.recheck` has it.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from attribution.log.proved import VerifyError
from attribution.settlement import settlement_of
from attribution.statement import Statement, StatementError

if TYPE_CHECKING:
    from attribution.settlement import Settlement
    from attribution.trail import Trail


class Cell(Protocol):
    """One item's utility under one coalition: as recorded, as measured again, and what the two may differ by."""

    @property
    def coalition(self) -> str: ...

    @property
    def item(self) -> str: ...

    @property
    def recorded(self) -> float: ...

    @property
    def measured(self) -> float: ...

    @property
    def tolerance(self) -> float: ...


class MeasureAgain(Protocol):
    """Draws cells of one settlement by a seed and trains their coalitions again."""

    def __call__(self, trail: "Trail", settlement: "Settlement", *, num_cells: int, seed: int) -> Sequence[Cell]: ...


@dataclass(frozen=True)
class Recheck:
    """What was measured again: `seed` drew the cells; the cell that differed most, and its settlement's leaf."""

    seed: int
    num_cells: int
    settlement: str
    worst: Cell

    @property
    def largest_difference(self) -> float:
        """Of all cells."""
        return difference(self.worst)


def settlements_of(trail: "Trail", statement: Statement) -> "list[Settlement]":
    """Return the settlements behind a statement, from their records."""
    return [settlement_of(trail, trail.entry(settled.leaf)) for settled in statement.settlements]


def difference(cell: Cell) -> float:
    """Return how far the two measurements of a cell are apart."""
    return abs(cell.recorded - cell.measured)


def recheck(
    trail: "Trail", statement: Statement, measure_again: MeasureAgain, *, num_cells: int, seed: int | None
) -> Recheck:
    """Measure random cells of the statement's settlements again. Without `seed` one is drawn, and returned.

    Raises:
        StatementError: no settlement stands behind the statement.
        VerifyError: a cell differs by more than its tolerance; the message names it.
    """
    if not statement.settlements:
        raise StatementError("recheck: no settlement stands behind this statement; there is no cell to measure again")
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    used = settlements_of(trail, statement)
    drawn = Counter(random.Random(seed).choices(range(len(used)), [one.num_cells for one in used], k=num_cells))
    found = [
        (used[number].leaf_hash, cell)
        for number, count in sorted(drawn.items())
        for cell in measure_again(trail, used[number], num_cells=count, seed=seed)
    ]
    leaf, worst = max(found, key=lambda pair: difference(pair[1]) / max(pair[1].tolerance, 1e-12))
    if difference(worst) > worst.tolerance:
        raise VerifyError(
            "recheck",
            f"settlement {leaf[:16]}, coalition {worst.coalition}, item {worst.item}: recorded {worst.recorded:.6f}, "
            f"measured again {worst.measured:.6f}; they differ by {difference(worst):.2g}, allowed {worst.tolerance:g}",
        )
    return Recheck(seed, len(found), leaf, worst)
