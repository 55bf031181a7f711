"""What `trailmark settle` shows: the cost first, progress, and the closing table."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from attribution.credit import Credit

if TYPE_CHECKING:
    from pipelines.settle.driver import Budget, Measuring, SettleReport

STOPPED = {
    "exact": "every coalition was measured: the values are exact for these items",
    "narrow": "intervals are as narrow as asked, or as the items allow",
    "budget": "the budget is spent; --budget N narrows the intervals",
}


class SettleBars:
    """Progress of one settlement, to be passed as `progress`; use it as a context."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[facts]}"), console=console)
        self._console = console
        self._task = self._progress.add_task("Retrains", total=None, facts="one, for the time it takes")

    def __enter__(self) -> "SettleBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: "Budget | Measuring | Credit") -> None:
        """Show one event."""
        from pipelines.settle.driver import Measuring

        if isinstance(event, Credit):
            width = float(event.banzhaf.coalition_width.max())
            self._progress.update(self._task, facts=f"{event.num_pairs} pairs, widest interval +-{width:.4f}")
        elif isinstance(event, Measuring):
            self._progress.update(self._task, completed=event.num_done, total=event.num_total)
        else:
            self._console.print(budget_line(event))


def budget_line(budget: "Budget") -> str:
    """Return what a settlement will cost."""
    count = len(budget.game.players)
    reused = f", {budget.num_reused} of them measured already" if budget.num_reused else ""
    every = f" (all {budget.num_all} coalitions)" if budget.num_retrains == budget.num_all else ""
    few = (
        f"\nsuite: {budget.num_items} items cannot tell any of {count} parts from nothing; {budget.least_items} could"
        if budget.num_items < budget.least_items
        else ""
    )
    return (
        f"{count} {budget.game.over}: at most {budget.num_retrains} retrains{every}{reused}, "
        f"{budget.seconds_each:.2f} s each, {budget.num_workers} at once: about {_duration(budget.seconds)}{few}"
    )


def settlement_table(report: "SettleReport") -> Table:
    """Return the players, largest value first."""
    settlement = report.settlement
    caption = (
        f"record {report.entry.leaf_hash[:12]}; {settlement.num_coalitions} coalitions, {report.num_reused} of them "
        f"measured before; {STOPPED[report.credit.stopped]}. Values in {settlement.utility}, comparable only within "
        f"this settlement; verdicts at a family-wise {1 - settlement.confidence:.0%} (Holm)."
    )
    title = (
        f"{settlement.adapter_name} on {settlement.suite_name} ({len(report.item_ids)} items): "
        f"{settlement.empty_value:+.3f} without any, {settlement.full_value:+.3f} with all"
    )
    table = Table(title=escape(title), caption=escape(caption))
    table.add_column(settlement.over.removesuffix("s"))
    for column in ("rows", "value", f"{settlement.confidence:.0%} interval", "left out", "interval", "p (Holm)"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    rows = {player.id: player.num_rows for player in report.game.players}
    for player in sorted(settlement.players, key=lambda one: -one.value):
        table.add_row(
            escape(player.name),
            str(rows[player.id] or ""),
            f"{player.value:+.4f}",
            f"{player.low:+.4f} .. {player.high:+.4f}",
            f"{player.leave_one_out:+.4f}",
            f"{player.loo_low:+.4f} .. {player.loo_high:+.4f}",
            f"{player.p_value:.3g}",
            player.verdict,
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
