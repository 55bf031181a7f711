"""Tables of the answers to the five questions."""

from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from attribution.questions import Answer, Finding

BAR_WIDTH = 24
MAX_ROW_CHARS = 110
COUNTS = frozenset({"rows", "receipts", "tokens"})
GOOD, BAD = frozenset({"improved", "credited", "helped"}), frozenset({"worsened", "hindered"})


def print_answer(answer: "Answer") -> None:
    """Print an answer: what was asked, the numbers, on what they rest, and what is missing."""
    console = Console()
    console.print(f"\n[bold]{escape(answer.question)}[/bold]")
    console.print(escape(answer.summary))
    if answer.details:
        console.print(*attribution_tables(answer.details), sep="\n")
    elif answer.findings:
        console.print(_findings_table(answer))
    console.print(f"[dim]Method: {escape(answer.method)}; seed {answer.seed}.[/dim]")
    if answer.links:
        shown = ", ".join(link[:12] for link in answer.links[:6])
        more = f" and {len(answer.links) - 6} more (--json shows all)" if len(answer.links) > 6 else ""
        console.print(f"[dim]Records: {shown}{more}[/dim]")
    for missing in answer.missing:
        console.print(
            f"[yellow]Missing[/yellow] {escape(missing.evidence)}\n  [dim]to get it: {escape(missing.remedy)}[/dim]"
        )


def bar(share: float, *, width: int = BAR_WIDTH) -> str:
    """Return a bar of `width` cells for a share of 1, to an eighth of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest]


def attribution_tables(found: dict[str, Any]) -> list[RenderableType]:
    """Return what to print of an attribution (`Attribution.to_dict()`): gain, contributors, rows, baselines."""
    shown: list[RenderableType] = []
    if found["base_did_it"]:
        shown.append(f"Made by [bold]the base model[/bold]: {escape(found['reason'])}.")
    if found["gain_nats"] is not None:
        shown.append(_gain_line(found["gain_nats"]))
    if found["contributors"]:
        shown.append(_contributors_table(found))
    if found["examples"]:
        shown.append(_examples_table(found))
    for name, ranking in found["baselines"].items():
        order = " > ".join(escape(rank["name"]) for rank in ranking[:5])
        shown.append(f"[dim]{name} would have said: {order}[/dim]")
    return shown


def _gain_line(gain: dict[str, Any]) -> str:
    return (
        f"The adapter made it likelier than the base by [bold]{gain['mean']:+.2f}[/bold] nats per token "
        f"(interval {gain['low']:+.2f} to {gain['high']:+.2f}, {gain['num_tokens']} tokens)."
    )


def _contributors_table(found: dict[str, Any]) -> Table:
    table = Table(
        "contributor",
        "share",
        "",
        f"{found['confidence']:.0%} interval",
        "predicted gain, nats",
        title="Contributors",
        title_justify="left",
    )
    for part in found["contributors"]:
        credited = part["share"] > 0
        table.add_row(
            escape(part["name"]),
            f"{part['share']:.1%}" if credited else "-",
            Text(bar(part["share"]), style="green"),
            f"{part['low']:.0%} to {part['high']:.0%}" if credited else "not above zero",
            f"{part['score']:+.2f} [{part['score_low']:+.2f}, {part['score_high']:+.2f}]",
        )
    rest = found["unattributed"]
    table.add_row("[dim]unattributed[/dim]", f"{rest:.1%}", Text(bar(rest), style="dim"), "", "")
    return table


def _examples_table(found: dict[str, Any]) -> Table:
    table = Table(
        "nats",
        f"{found['confidence']:.0%} interval",
        "contributor",
        "row",
        title="Rows that helped most",
        title_justify="left",
    )
    for part in found["examples"]:
        text = " / ".join(part["text"].split("\n"))
        text = text if len(text) <= MAX_ROW_CHARS else text[: MAX_ROW_CHARS - 1] + "…"
        interval = f"{part['low']:+.2f} to {part['high']:+.2f}"
        table.add_row(f"{part['score']:+.2f}", interval, escape(part["name"]), escape(text))
    return table


def _findings_table(answer: "Answer") -> Table:
    table = Table("what", "measure", "value", "interval", "verdict")
    for finding in answer.findings:
        interval = _interval(finding)
        style = "green" if finding.verdict in GOOD else "red" if finding.verdict in BAD else ""
        table.add_row(
            escape(finding.subject),
            escape(finding.measure),
            _value(finding),
            interval,
            Text(finding.verdict, style=style),
        )
    return table


def _value(finding: "Finding") -> str:
    if finding.unit in COUNTS:
        return f"{finding.value:,.0f} {finding.unit}"
    if finding.low is None:
        return f"{finding.value:.1%}"
    unit = "" if finding.unit == "of 1" else f" {finding.unit}"
    return f"{finding.value:+.3f}{unit}"


def _interval(finding: "Finding") -> str:
    if finding.low is None or finding.high is None:
        return ""
    confidence = "" if finding.confidence is None else f" ({finding.confidence:.0%})"
    return f"{finding.low:+.3f} to {finding.high:+.3f}{confidence}"
