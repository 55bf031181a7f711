"""Settle an adapter: train coalitions again as parallel Ray tasks, turn them into credit, record the settlement.

Ray is initialised by the caller. HOME must be readable from every node that trains.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from attribution.coalitions import Coalitions
from attribution.credit import Credit, least_items, measure_credit
from attribution.estimates import Array
from attribution.settlement import SettledPlayer, Settlement, record_settlement
from configs.errors import UserError
from configs.schema import SettleSettings
from pipelines.settle.asked import Asked
from pipelines.settle.cells import Cells
from pipelines.settle.game import Game
from pipelines.settle.plan import SettlePlan
from pipelines.settle.retrain import UNITS, Measured, Retrainer, Task, chunks, measured_as, valued

if TYPE_CHECKING:
    from attribution.records import Artefact
    from attribution.trail import Entry, Trail

NUM_RESTARTS = 3
"""Times a worker that died is started anew; its coalitions are measured again."""


@dataclass(frozen=True)
class Budget:
    """What a settlement is about to cost; told before the first coalition but the full one, by which time is measured.

    `num_reused`: coalitions of this game that are measured already. `seconds_each` of one process. `least_items`: with
    fewer the verdict on every player is "no measurable effect".
    """

    game: Game
    num_retrains: int
    num_all: int
    num_reused: int
    seconds_each: float
    num_workers: int
    num_items: int
    least_items: int

    @property
    def seconds(self) -> float:
        """Expected wall time."""
        return max(0, self.num_retrains - self.num_reused) * self.seconds_each / self.num_workers


@dataclass(frozen=True)
class Measuring:
    """`num_done` coalitions are measured, of at most `num_total`."""

    num_done: int
    num_total: int


Progress = Callable[[Budget | Measuring | Credit], None]


@dataclass(frozen=True)
class SettleReport:
    """The settlement, its record, the credit behind it with all cells, and what it took."""

    entry: "Entry"
    settlement: Settlement
    credit: Credit
    game: Game
    item_ids: tuple[str, ...]
    num_reused: int
    seconds: float


def settle(
    trail: "Trail",
    asked: Asked,
    *,
    progress: Progress | None = None,
    dry_run: bool = False,
    workflow: "Artefact | None" = None,
) -> SettleReport | None:
    """Measure what the players are worth, and record it; None for a dry run.

    `workflow`: the definition of the workflow that asks, an input of the record.

    Raises:
        CreditError: a coalition has no finite utility.
    """
    began = time.perf_counter()
    game, plan, settings = asked.game, asked.plan, asked.settings
    tell = progress or _ignore
    with _Pool(asked.task, settings) as pool:
        retrains = Retrains(trail, game, plan, pool, tell=tell, budget=settings.budget)
        tell(retrains.announce(settings))
        if dry_run:
            return None
        prior = pool.predicted_gains(game) if settings.gradient_prior and game.mode == "replay" else None
        if prior is not None:
            plan = replace(plan, prior=trail.put_table(pa.table({"gains": list(prior)})))
        credit = measure_credit(retrains, len(game.players), search=asked.search, prior=prior, progress=tell)
    has_dropout = asked.subject.settings.lora_dropout > 0
    method = _method(game, credit, has_prior=prior is not None and credit.stopped != "exact", has_dropout=has_dropout)
    settlement = _settlement(trail, asked, credit, plan, retrains, method=method)
    entry = record_settlement(trail, settlement, config=trail.run_config(settings), workflow=workflow)
    return SettleReport(entry, settlement, credit, game, plan.items, retrains.num_reused, time.perf_counter() - began)


class Retrains:
    """The utility that `measure_credit` asks: coalitions from the cache, the others from the pool."""

    def __init__(
        self, trail: "Trail", game: Game, plan: SettlePlan, pool: "_Pool", *, tell: Progress, budget: int
    ) -> None:
        self._cells = Cells(trail.home, game, _setting(plan))
        self._game, self._pool, self._tell, self._utility = game, pool, tell, plan.utility
        self._most = min(budget + 1, 2 ** len(game.players))  # the empty coalition costs nothing
        self.measured: dict[bytes, Measured] = {}
        self.num_reused = 0

    def __call__(self, coalitions: Coalitions) -> Array:
        """Return the utilities [b, q], keeping each as soon as it is there."""
        chosen = np.stack([self._game.chosen(row) for row in coalitions])
        digests = [self._cells.digest(row) for row in chosen]
        found = {digest: cell for digest in digests if (cell := self._cells.get(digest)) is not None}
        missing = {digest: row for digest, row in zip(digests, chosen, strict=True) if digest not in found}
        self.num_reused += sum(digest in found for digest in digests)
        self._tell(Measuring(len(self.measured) + len(found), self._most))
        if missing:
            names = list(missing)
            for places, measured in self._pool.measure(np.stack(list(missing.values()))):
                for place, cell in zip(places, measured, strict=True):
                    self._cells.put(names[place], cell)
                    found[names[place]] = cell
                self._tell(Measuring(len(self.measured) + len(found), self._most))
        self.measured.update({row.tobytes(): found[name] for row, name in zip(coalitions, digests, strict=True)})
        return valued([found[digest] for digest in digests], self._utility)

    def announce(self, settings: SettleSettings) -> Budget:
        """Measure the full coalition, for the time it takes, and return what all of them will take."""
        num_players = len(self._game.players)
        self(np.ones((1, num_players), dtype=bool))
        (cell,) = self.measured.values()
        num_all = 2**num_players - 1
        num_reused, self.num_reused = self.num_reused, 0
        return Budget(
            game=self._game,
            num_retrains=min(settings.budget, num_all),
            num_all=num_all,
            num_reused=num_reused,
            seconds_each=cell.seconds,
            num_workers=settings.num_workers,
            num_items=len(cell.utilities),
            least_items=least_items(num_players, settings.confidence),
        )


@ray.remote
class _Worker:
    """A Ray actor around a Retrainer; the base model is loaded once."""

    def __init__(self, task: Task) -> None:
        self._retrainer = Retrainer(task)

    def predicted_gains(self, chosen: Any) -> Any:
        """Return what gradients say of each player's rows."""
        return self._retrainer.predicted_gains(chosen)

    def measure(self, start: int, chosen: Any) -> tuple[int, list[Measured]]:
        """Measure coalitions that begin at place `start`."""
        return start, self._retrainer.measure(chosen)


class _Pool:
    """Actors that measure coalitions, on whatever nodes Ray has; started when first asked, ended with the block."""

    def __init__(self, task: Task, settings: SettleSettings) -> None:
        self._task, self._settings = task, settings
        self._workers: list[Any] = []

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def measure(self, chosen: Coalitions) -> Iterator[tuple[range, list[Measured]]]:
        """Yield (places, what was measured there) as it comes in."""
        from ray.util import ActorPool

        size = max(1, min(self._settings.runs_at_once, math.ceil(len(chosen) / self._settings.num_workers)))
        starts = range(0, len(chosen), size)
        pool = ActorPool(self._start(min(len(starts), self._settings.num_workers)))
        work = list(zip(starts, chunks(chosen, size), strict=True))
        with _as_raised():
            for start, measured in pool.map_unordered(lambda worker, item: worker.measure.remote(*item), work):
                yield range(start, start + len(measured)), measured

    def predicted_gains(self, game: Game) -> Array:
        """Return [n, q]: what gradients say that each player did to each item; costs about one retrain."""
        (worker,) = self._start(1)
        alone = np.eye(len(game.players), dtype=bool)
        with _as_raised():
            found: Array = ray.get(worker.predicted_gains.remote(np.stack([game.chosen(row) for row in alone])))
        return found

    def _start(self, count: int) -> list[Any]:
        if len(self._workers) < count:
            task = ray.put(self._task)
            needs_gpu = self._task.settings.use_gpu
            options = {
                "num_cpus": 1,
                "num_gpus": self._task.settings.gpu_share if needs_gpu else 0,
                "max_restarts": NUM_RESTARTS,
                "max_task_retries": NUM_RESTARTS,
            }
            worker: Any = _Worker
            missing = range(len(self._workers), count)
            self._workers += [worker.options(**options).remote(task) for _ in missing]
        return self._workers[:count]


@contextmanager
def _as_raised() -> Iterator[None]:
    """Raise a user's mistake that a worker found as itself, without Ray's trace around it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise


def _setting(plan: SettlePlan) -> dict[str, Any]:
    """What besides the game decides a coalition's utilities."""
    tokens = plan.max_new_tokens if plan.utility == "exact_match" else 0
    return {
        "base": plan.base,
        "settings": plan.settings,
        "suite": plan.suite,
        "utility": measured_as(plan.utility),
        "tokens": tokens,
    }


def _settlement(
    trail: "Trail", asked: Asked, credit: Credit, plan: SettlePlan, retrains: Retrains, *, method: str
) -> Settlement:
    cells = [retrains.measured[row.tobytes()] for row in credit.coalitions]
    table = pa.table(
        {
            "coalition": ["".join("1" if bit else "0" for bit in row) for row in credit.coalitions],
            "weights": [cell.weights for cell in cells],
            "seconds": [cell.seconds for cell in cells],
            "utilities": pa.array(credit.utilities.tolist(), pa.list_(pa.float64())),
        }
    )
    return Settlement(
        adapter=asked.subject.adapter.digest,
        suite=plan.suite,
        utility=UNITS[plan.utility],
        players=settled_players(asked.game, credit),
        empty_value=float(credit.empty.mean()),
        full_value=float(credit.full.mean()),
        num_coalitions=len(credit.coalitions),
        num_cells=credit.utilities.size,
        method=method,
        confidence=credit.confidence,
        seed=plan.seed,
        table=trail.put_table(table),
        adapter_name=asked.subject.adapter.name,
        suite_name=asked.suite_name,
        over=asked.game.over,
        plan=plan.put(trail),
    )


def settled_players(game: Game, credit: Credit) -> tuple[SettledPlayer, ...]:
    """Return the players with their values, in the game's order."""
    values, near = credit.banzhaf, credit.leave_one_out
    return tuple(
        SettledPlayer(
            kind=player.kind,
            id=player.id,
            name=player.name,
            value=float(values.values[place]),
            low=float(values.low[place]),
            high=float(values.high[place]),
            leave_one_out=float(near.values[place]),
            loo_low=float(near.low[place]),
            loo_high=float(near.high[place]),
            p_value=float(credit.p_values[place]),
            verdict=credit.verdict(place),
        )
        for place, player in enumerate(game.players)
    )


def _method(game: Game, credit: Credit, *, has_prior: bool, has_dropout: bool) -> str:
    how = {
        "replay": "the recorded run again with the rows of absent players at weight zero",
        "train": "trained from the start on the rows left",
        "combine": "adapters added up on their base",
    }[game.mode]
    fit = (
        "exact over all coalitions"
        if credit.stopped == "exact"
        else f"ridge over {credit.num_pairs} complementary pairs"
    )
    prior = ", drawn to what gradients predict" if has_prior else ""
    dropout = ", without the adapter's dropout" if has_dropout else ""
    return f"settle: Banzhaf values, {fit}{prior}; {how}; float32, one seed{dropout}"


def _ignore(_: Budget | Measuring | Credit) -> None:
    """For a caller that wants no progress."""
