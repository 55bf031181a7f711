"""What `trailmark statement` prints."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from attribution.log.facts import utc
from attribution.statement import COMPARABLE, Statement
from attribution.statement_names import Names, name_of, withheld_from

MICRO = 1_000_000


def print_statement(statement: Statement, names: Names, *, leaf_hash: str) -> None:
    """Print the parts, the people and what was listed."""
    console = Console()
    period = f"{utc(statement.period_start_us)} to {utc(statement.period_end_us)}"
    console.print(f"[bold]Statement {leaf_hash[:16]}[/]  {period}, in {statement.unit}", highlight=False)
    console.print(_parts(statement))
    share, policy = statement.totals.platform / max(statement.totals.fees, 1), statement.policy.platform_share / MICRO
    if share > policy + 0.01:
        text = f"the platform's part is {share:.0%} of the fees, not {policy:.0%}: it is rounded up on every request"
        console.print(f"{text}; a fee table in a smaller unit splits finer", style="yellow", highlight=False)
    for settled in statement.settlements:
        console.print(_people(statement, settled.adapter, names))
    for pool in statement.pools:
        if pool.reason:
            name = pool.adapter[:19] or "the base alone"
            console.print(f"{name}: {pool.unattributed:,} unattributed, {pool.reason}", highlight=False)
    for item in statement.withheld:
        console.print(f"withheld from {withheld_from(item, names)}: {item.reason}", style="yellow", highlight=False)
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


def _people(statement: Statement, adapter: str, names: Names) -> Table:
    table = Table(title=f"data of adapter {adapter[:19]}", title_justify="left", box=None)
    for name in ("who", "value", "interval", "from copies", "verdict", "paid"):
        table.add_column(name, justify="left" if name in ("who", "verdict") else "right")
    lines = [line for line in statement.payouts if line.source == "data" and line.adapter == adapter]
    for line in sorted(lines, key=lambda line: (-line.amount, name_of(names, line.id))):
        moved = f"{line.moved / MICRO:+.4f}" if line.moved else ""
        interval = f"{line.low / MICRO:+.4f} to {line.high / MICRO:+.4f}"
        table.add_row(
            name_of(names, line.id), f"{line.value / MICRO:+.4f}", interval, moved, line.verdict, f"{line.amount:,}"
        )
    return table
