"""Measure cells of a recorded settlement again: what a reader of a statement does who takes nobody's word."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attribution.settlement import Settlement
from pipelines.benchmark.suites import read_suite
from pipelines.settle.plan import SettlePlan
from pipelines.settle.retrain import Retrainer, task_of, valued
from pipelines.settle.subject import SettleError, subject_of
from pipelines.settle.switches import switch_of

if TYPE_CHECKING:
    from attribution.trail import Trail


@dataclass(frozen=True)
class Rechecked:
    """One cell: its coalition (a bit for each player of the plan), its item, the recorded and the new utility."""

    coalition: str
    item: str
    recorded: float
    measured: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.recorded - self.measured) <= self.tolerance


def recheck(trail: "Trail", settlement: Settlement, *, num_cells: int, seed: int) -> list[Rechecked]:
    """Measure `num_cells` cells again, drawn at random, without the cache; each costs a retrain of its coalition.

    Raises:
        SettleError: what is left in this home is no longer what was settled.
    """
    plan = SettlePlan.get(trail, settlement.plan)
    subject = subject_of(trail, plan.adapter)
    game = switch_of(plan.over).build(trail, subject, plan.others)
    if game.digest != plan.game or tuple(player.id for player in game.players) != plan.player_ids:
        raise SettleError(f"settlement {settlement.leaf_hash[:12]}: the rows or players behind it are others now")
    rows = trail.get_table(settlement.table).to_pylist()
    places = np.random.default_rng(seed).choice(
        len(rows) * len(plan.items), min(num_cells, len(rows) * len(plan.items)), replace=False
    )
    items = read_suite(trail.store.path_of(plan.suite))
    retrainer = Retrainer(task_of(trail, subject, game, plan, items=items))
    found: dict[int, NDArray[np.float64]] = {}
    cells = []
    for row, item in (divmod(int(place), len(plan.items)) for place in places):
        if row not in found:
            coalition = np.array([bit == "1" for bit in rows[row]["coalition"]])
            found[row] = valued(retrainer.measure(game.chosen(coalition)[None]), plan.utility)[0]
        recorded, again = float(rows[row]["utilities"][item]), float(found[row][item])
        allowed = float(plan.tolerance) * (again if plan.utility == "likelihood" else 1.0)
        cells.append(Rechecked(rows[row]["coalition"], plan.items[item], recorded, again, allowed))
    return cells
