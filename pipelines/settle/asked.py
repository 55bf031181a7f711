"""What a settlement is to measure, made out before a cluster starts: a mistake is told at once. Free of Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.credit import Search, require_measurable
from attribution.void_records import require_counting
from configs.schema import SettleSettings
from pipelines.benchmark.suites import read_suite
from pipelines.settle.game import Game
from pipelines.settle.plan import SettlePlan, plan_of
from pipelines.settle.retrain import Task, task_of
from pipelines.settle.subject import SettleError, Subject, subject_of
from pipelines.settle.switches import switch_of

if TYPE_CHECKING:
    from attribution.trail import Trail


@dataclass(frozen=True)
class Asked:
    """A settlement about to be measured: the adapter, its players, the plan, and what every process needs."""

    subject: Subject
    game: Game
    plan: SettlePlan
    task: Task
    settings: SettleSettings
    search: Search
    suite_name: str


def asked(
    trail: "Trail",
    adapter: str,
    *,
    suite: Path,
    over: str,
    settings: SettleSettings,
    others: tuple[str, ...] = (),
) -> Asked:
    """Return what it takes to measure what the players behind `adapter` are worth on `suite`.

    `over` names a switch (see `switches.SWITCHES`); `others`: digests of further adapters, for those that take them.

    Raises:
        SettleError: what the adapter was made from is gone, or does not part into players in this way.
        VoidRecordError: an adapter comes from, or was approved by, a record that is signed with a revoked key.
        SuiteError, BenchmarkError: a bad suite, no such adapter.
        CreditError: a budget or suite too small to say anything.
    """
    switch = switch_of(over)
    if others and not switch.takes_adapters:
        raise SettleError(f"--with: only --over adapters takes further adapters, not --over {over}")
    items = read_suite(suite)
    subject = subject_of(trail, adapter)
    for digest in (subject.adapter.digest, *others):
        require_counting(trail, digest, to="settle")
    game = switch.build(trail, subject, others)
    search = Search.of(settings)
    require_measurable(len(game.players), search, num_items=len(items))
    if game.mode == "combine" and settings.utility == "exact_match":
        raise SettleError("--utility exact_match: adapters that are added up are measured by likelihood or its log")
    plan = plan_of(
        subject,
        game,
        suite=trail.store.put_blob(suite),
        others=others,
        items=tuple(item.item_id for item in items),
        utility=settings.utility,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
    )
    task = task_of(trail, subject, game, plan, items=items)
    return Asked(subject, game, plan, task, settings, search, suite.stem)
