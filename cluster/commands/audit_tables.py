"""Tables of an audit: effects of contributors and rows, how well the run was replayed, what it cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from attribution.influence.audit import Audit, AuditedRow
    from pipelines.audit.driver import Refused

MAX_ROW_CHARS = 90
MAX_CONTRIBUTORS = 12


def print_audits(audits: "Sequence[Audit]", refused: "Sequence[Refused]") -> None:
    """Print every audit, then what could not be audited and why."""
    console = Console()
    for audit in audits:
        _print_audit(console, audit)
    for one in refused:
        console.print(f"[yellow]Not audited[/yellow] {escape(one.question)}\n  [dim]{escape(one.reason)}[/dim]")


def _print_audit(console: Console, audit: "Audit") -> None:
    colour = "green" if audit.is_exact else "yellow"
    console.print(f"\n[bold]What would {escape(audit.question)} lose?[/bold]")
    console.print(f"[{colour}]{escape(audit.label)}[/{colour}]")
    console.print(
        f"{escape(audit.adapter_name)} answered at {audit.loss:.4f} nats per token ({audit.num_target_tokens} tokens). "
        "Effects are how much that rises, in thousandths of a nat, when a row is left out."
    )
    console.print(_contributors_table(audit))
    for title, rows in (("Rows that helped most", audit.helped), ("Rows that hindered most", audit.hindered)):
        if rows:
            console.print(_rows_table(title, rows))
    seen = audit.fidelity
    console.print(
        f"Replay: {'exact' if audit.is_exact else '[yellow]NOT exact[/yellow]'}; final weights within "
        f"{seen.max_abs_diff:.1e} of the recorded ones ({seen.share_of_move:.1e} of the way that training went), "
        f"kept states within {seen.drift:.1e}."
    )
    for caveat in audit.caveats:
        console.print(f"[dim]{escape(caveat)}[/dim]")
    console.print(
        f"[dim]The effects of all {audit.num_rows} rows cancel to {audit.cancellation:.1%} of their size. "
        f"Method: {escape(audit.method)}; seed {audit.seed}; {audit.cpu_seconds:.1f} CPU s for "
        f"{audit.num_shared} question{'s' * (audit.num_shared > 1)}.[/dim]"
    )
    if audit.record:
        console.print(f"[dim]Recorded as {audit.record[:12]}.[/dim]")


def _contributors_table(audit: "Audit") -> Table:
    table = Table("contributor", "effect, milli-nats", "rows", "removal", title="Contributors", title_justify="left")
    for part in audit.contributors[:MAX_CONTRIBUTORS]:
        table.add_row(
            escape(part.name),
            f"{1000 * part.effect:+.3f}",
            f"{part.num_rows} ({part.share_of_rows:.0%})",
            "small" if part.is_small else "[dim]large: a hint[/dim]",
        )
    rest = len(audit.contributors) - MAX_CONTRIBUTORS
    if rest > 0:
        table.add_row(f"[dim]{rest} more (--json)[/dim]", "", "", "")
    return table


def _rows_table(title: str, rows: "Sequence[AuditedRow]") -> Table:
    table = Table("milli-nats", "contributor", "row", title=title, title_justify="left")
    for row in rows:
        text = " / ".join(row.text.split("\n")) or row.example_id
        text = text if len(text) <= MAX_ROW_CHARS else text[: MAX_ROW_CHARS - 1] + "…"
        table.add_row(f"{1000 * row.effect:+.3f}", escape(row.name), escape(text))
    return table
