"""What `trailmark statement` prints."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from attribution.log.facts import utc
from attribution.statement import COMPARABLE, Statement

MICRO = 1_000_000


def print_statement(statement: Statement, *, leaf_hash: str) -> None:
    """Print the parts, the people and what was listed."""
    console = Console()
    period = f"{utc(statement.period_start_us)} to {utc(statement.period_end_us)}"
    console.print(f"[bold]Statement {leaf_hash[:16]}[/]  {period}, in {statement.unit}", highlight=False)
    console.print(_parts(statement))
    for settled in statement.settlements:
        console.print(_people(statement, settled.adapter))
    for pool in statement.pools:
        if pool.reason:
            name = pool.adapter[:19] or "the base alone"
            console.print(f"{name}: {pool.unattributed:,} unattributed, {pool.reason}", highlight=False)
    problems = Counter(line.problem for line in statement.requests if line.problem)
    for problem, count in sorted(problems.items()):
        console.print(f"listed, not paid: {count} rows, {problem}", style="yellow", highlight=False)
    if statement.settlements:
        console.print(COMPARABLE, style="dim", highlight=False)


def _parts(statement: Statement) -> Table:
    table = Table(box=None)
    totals = statement.totals
    for name in ("fees", "platform", "base", "adapter", "data", "unattributed", "listed"):
        table.add_column(name, justify="right")
    table.add_row(
        *(
            f"{amount:,}"
            for amount in (
                *(totals.fees, totals.platform, totals.base, totals.adapter, totals.data),
                *(totals.unattributed, totals.listed),
            )
        )
    )
    return table


def _people(statement: Statement, adapter: str) -> Table:
    table = Table(title=f"data of adapter {adapter[:19]}", title_justify="left", box=None)
    for name in ("who", "value", "interval", "from copies", "verdict", "paid"):
        table.add_column(name, justify="left" if name in ("who", "verdict") else "right")
    lines = [line for line in statement.payouts if line.source == "data" and line.adapter == adapter]
    for line in sorted(lines, key=lambda line: (-line.amount, line.name)):
        moved = f"{line.moved / MICRO:+.4f}" if line.moved else ""
        interval = f"{line.low / MICRO:+.4f} to {line.high / MICRO:+.4f}"
        table.add_row(line.name, f"{line.value / MICRO:+.4f}", interval, moved, line.verdict, f"{line.amount:,}")
    return table
