"""Tables of the answers to lineage questions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attribution.log.facts import utc

if TYPE_CHECKING:
    from attribution.evidence import Spread
    from attribution.lineage_diff import Change, ScoreChange, VersionDiff
    from attribution.lineage_queries import Answer, Item, Path

QUESTIONS = {"ancestors": "made from", "descendants": "came of it", "impact": "descend from it"}
MAX_RECEIPTS = 3
MAX_CHANGES = 40
STYLES = {"improved": "green", "worsened": "red", "added": "green", "removed": "red"}


def print_answer(answer: "Answer") -> None:
    """Print counts by kind, then the page."""
    console = Console()
    console.print(f"\n[bold]{escape(answer.subject.title)}[/bold]")
    if not answer.total:
        console.print("It was made from nothing recorded." if answer.question == "ancestors" else "Nothing came of it.")
        return
    counts = ", ".join(f"{_kind(kind)} {number:,}" for kind, number in answer.counts.items())
    console.print(f"{answer.total:,} records {QUESTIONS[answer.question]}: {escape(counts)}")
    if answer.items:
        console.print(_items_table(answer.items, with_impact=answer.question == "impact"))
    if answer.before is not None:
        console.print(f"[dim]More: --before {answer.before}[/dim]")


def print_path(found: "Path") -> None:
    """Print the chain, or that there is none."""
    console = Console()
    if not found.items:
        console.print(f"{escape(found.descendant.title)} does not descend from {escape(found.ancestor.title)}.")
        return
    num_steps = len(found.items) - 1
    console.print(f"\n{num_steps} step{'' if num_steps == 1 else 's'}, each made from the one above")
    console.print(_items_table(found.items))


def print_diff(found: "VersionDiff") -> None:
    """Print what changed and what it did to the score."""
    console = Console()
    console.print(f"\n[bold]{escape(found.older.reference)} -> {escape(found.newer.reference)}[/bold]")
    console.print(escape(found.summary))
    for side in (found.older, found.newer):
        names = f", published as {', '.join(side.publications)}" if side.publications else ""
        console.print(f"[dim]{escape(side.reference)}: {side.leaf_hash[:12]}, {utc(side.time_us)}{escape(names)}[/dim]")
    if found.scores:
        console.print(_scores_table(found.scores))
    if found.inputs:
        table = _titled("Made from", "", "kind", "what", "leaf")
        for item in found.inputs:
            change = Text(item.change, style=STYLES[item.change])
            table.add_row(change, _kind(item.kind), escape(item.label or "(erased)"), item.leaf_hash[:12])
        console.print(table)
    if found.rows:
        table = _titled("Rows trained on", "contributor", "before", "after", "added", "removed")
        for row in found.rows:
            came = ("?" if number is None else str(number) for number in (row.added, row.removed))
            table.add_row(escape(row.contributor), str(row.before), str(row.after), *came)
        console.print(table)
    for title in ("rules", "facts", "config", "code", "packages"):
        changes: Sequence[Change] = getattr(found, title)
        if changes:
            console.print(_changes_table(title.capitalize(), changes))
    console.print(f"[dim]Method: {escape(found.method)}; {found.confidence:.0%} intervals, seed {found.seed}.[/dim]")
    for missing in found.missing:
        console.print(f"[yellow]Missing[/yellow] {escape(missing)}")


def _items_table(items: "Sequence[Item]", *, with_impact: bool = False) -> Table:
    columns = ["index", "kind", "what", "time", "leaf"] + (["part"] if with_impact else [])
    table = Table(*columns)
    for item in items:
        what = "(erased)" if item.label is None else item.label
        part = [escape(_part(item))] if with_impact else []
        table.add_row(str(item.index), _kind(item.kind), escape(what), utc(item.time_us), item.leaf_hash[:12], *part)
    return table


def _part(item: "Item") -> str:
    """What an adapter or a batch of completions has to do with the thing asked about."""
    if item.num_batches is not None:
        names = f"{', '.join(item.names)}; " if item.names else ""
        return f"{names}answered in {item.num_batches:,} batch{'' if item.num_batches == 1 else 'es'}"
    more = f" and {len(item.receipts) - MAX_RECEIPTS} more" if len(item.receipts) > MAX_RECEIPTS else ""
    return ", ".join(item.receipts[:MAX_RECEIPTS]) + more


def _scores_table(scores: "Sequence[ScoreChange]") -> Table:
    table = _titled("Score", "suite", "metric", "older against base", "newer against base", "newer - older", "verdict")
    for score in scores:
        spreads = (_spread(spread) for spread in (score.before, score.after, score.difference))
        verdict = Text(score.verdict, style=STYLES.get(score.verdict, ""))
        table.add_row(escape(score.suite), score.metric, *spreads, verdict)
    return table


def _spread(spread: "Spread | None") -> str:
    return "" if spread is None else f"{spread.value:+.3f} [{spread.low:+.3f}, {spread.high:+.3f}]".replace("[", "\\[")


def _changes_table(title: str, changes: "Sequence[Change]") -> Table:
    table = _titled(title, "what", "before", "after")
    for change in changes[:MAX_CHANGES]:
        sides = ("-" if side is None else side for side in (change.before, change.after))
        table.add_row(escape(change.what), *map(escape, sides))
    if len(changes) > MAX_CHANGES:
        table.add_row(f"and {len(changes) - MAX_CHANGES} more (--json shows all)", "", "")
    return table


def _titled(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def _kind(kind: str) -> str:
    return "completion batch" if kind == "completions" else kind.replace("_", " ")
