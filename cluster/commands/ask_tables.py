"""Tables of the answers to the five questions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attribution.answers import PROMISES

if TYPE_CHECKING:
    from attribution.answers import Answer, Finding
    from attribution.influence.set_rows import SetRows

BAR_WIDTH = 24
MAX_ROW_CHARS = 110
NUM_RECORDS = 6
NUM_PLACES = 3
GOOD, BAD = frozenset({"improved", "credited", "helped"}), frozenset({"worsened", "hindered"})


def print_answer(answer: "Answer", *, cpu_s: float | None = None) -> None:
    """Print an answer: what was asked, the numbers, on what they rest, what they took, and what is missing."""
    console = Console()
    console.print(f"\n[bold]{escape(answer.question)}[/bold]")
    console.print(escape(answer.summary))
    if answer.problem:
        console.print(f"[red]In part only:[/red] {escape(answer.problem)}")
    if "receipt_id" in answer.details:
        console.print(*attribution_tables(answer.details), sep="\n")
        apart = [finding for finding in answer.findings if finding.tier not in ("explain",)]
        if apart:
            console.print(findings_table(apart))
    elif answer.findings:
        console.print(findings_table(answer.findings))
    for tier in answer.tiers:
        console.print(f"[dim]{tier}: {PROMISES[tier]}[/dim]")
    console.print(f"[dim]Method: {escape(answer.method)}; seed {answer.seed}.[/dim]")
    spent = [f"{cost.amount:,.0f} {cost.unit} ({cost.what})" for cost in answer.cost]
    spent += [] if cpu_s is None else [f"{cpu_s:.1f} CPU seconds now"]
    if spent:
        console.print(f"[dim]Cost: {escape('; '.join(spent))}.[/dim]")
    _print_records(console, answer)
    for missing in answer.missing:
        console.print(
            f"[yellow]Missing[/yellow] {escape(missing.evidence)}\n  [dim]to get it: {escape(missing.remedy)}[/dim]"
        )


def _print_records(console: Console, answer: "Answer") -> None:
    if not answer.records:
        return
    shown = ", ".join(
        f"{record.index} {record.kind} {record.leaf_hash[:12]}" for record in answer.records[:NUM_RECORDS]
    )
    more = len(answer.records) - NUM_RECORDS
    console.print(f"[dim]Records: {shown}{f' and {more} more (--json shows all)' if more > 0 else ''}[/dim]")
    console.print(f"[dim]Check one: {escape(answer.records[0].proof)}[/dim]")


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
        shown += [_examples_table(found), _words_line(found)]
    if found.get("verbatim"):
        shown.append(_verbatim_table(found["verbatim"]))
    for name, ranking in found["baselines"].items():
        order = " > ".join(escape(rank["name"]) for rank in ranking[:5])
        shown.append(f"[dim]{name} would have said: {order}[/dim]")
    return shown


def _gain_line(gain: dict[str, Any]) -> str:
    likelier = "likelier" if gain["mean"] >= 0 else "less likely"
    return (
        f"The adapter made it {likelier} than the base by [bold]{abs(gain['mean']):.2f}[/bold] nats per token "
        f"(interval {gain['low']:+.2f} to {gain['high']:+.2f}, {gain['num_tokens']} tokens)."
    )


def _contributors_table(found: dict[str, Any]) -> Table:
    table = Table(
        "contributor",
        "share",
        "",
        _heading(found["confidence"]),
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
            f"{part['score']:+.2f}{_bounds(part['score_low'], part['score_high'])}",
        )
    rest = found["unattributed"]
    table.add_row("[dim]unattributed[/dim]", f"{rest:.1%}", Text(bar(rest), style="dim"), "", "")
    return table


def _examples_table(found: dict[str, Any]) -> Table:
    table = Table(
        "",
        found.get("score_unit", "nats"),
        _heading(found["confidence"]),
        "BM25 (place)",
        "contributor",
        "row",
        title="Rows by predicted gain, best first",
        title_justify="left",
    )
    for number, part in enumerate(found["examples"], start=1):
        text = _cut(" / ".join(part["text"].split("\n")))
        said = "; ".join(_cut(span["text"]) for span in part.get("spans", ()))
        words = "" if part["bm25"] is None else f"{part['bm25']:.2f} ({part['bm25_rank']})"
        interval = _bounds(part["low"], part["high"]).strip(" []")
        verbatim = f"\n[dim]verbatim: {escape(said)}[/dim]" if said else ""
        row = f"[dim]{escape(part['example_id'])}[/dim]\n{escape(text)}{verbatim}"
        table.add_row(str(number), f"{part['score']:+.2f}", interval, words, escape(part["name"]), row)
    return table


def print_set_rows(found: "SetRows") -> None:
    """Print the rows that a query set's answers rest on."""
    table = Table(
        "",
        f"mean, {found.unit}",
        f"{_heading(found.confidence)} over queries",
        "BM25 place",
        "contributor",
        "row",
        title=f"Rows behind {found.question} in {found.adapter_name}, best first",
        title_justify="left",
    )
    for number, row in enumerate(found.rows, start=1):
        said = f"[dim]{escape(row.example_id)}[/dim]\n{escape(_cut(' / '.join(row.text.split(chr(10)))))}"
        interval = "" if row.low is None or row.high is None else f"{row.low:+.3f}, {row.high:+.3f}"
        table.add_row(str(number), f"{row.score:+.3f}", interval, str(row.bm25_rank), escape(row.name), said)
    console = Console()
    console.print(table)
    console.print(f"[dim]{found.num_queries} queries, {found.num_rows} rows. Method: {escape(found.method)}.[/dim]")
    console.print(f"[dim]{found.caveat}.[/dim]")


def _words_line(found: dict[str, Any]) -> str:
    """How far word search lists the same rows."""
    rows, hits = found["examples"], {one["example_id"] for one in found["bm25_examples"]}
    same = sum(part["example_id"] in hits for part in rows)
    return f"[dim]BM25's own first {len(hits)} rows hold {same} of these {len(rows)} (--json lists them)[/dim]"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_ROW_CHARS else text[: MAX_ROW_CHARS - 1] + "…"


def _heading(confidence: float | None) -> str:
    return "interval" if confidence is None else f"{confidence:.0%} interval"


def _bounds(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"


def _verbatim_table(verbatim: dict[str, Any]) -> RenderableType:
    if not verbatim["spans"]:
        return "[dim]No row says any two words of it verbatim.[/dim]"
    table = Table(
        "it says verbatim",
        "characters",
        "rarity, nats",
        "rows",
        "who wrote it (characters of the row)",
        title=f"What rows say word for word ({verbatim['covered']:.0%} of the answer); saying it is not causing it",
        title_justify="left",
    )
    for span in verbatim["spans"]:
        places = [
            f"{place['name']} {place['example_id'][:19]} ({place['start']}-{place['end']})"
            for place in span["occurrences"][:NUM_PLACES]
        ]
        table.add_row(
            escape(_cut(" / ".join(span["text"].split("\n")))),
            f"{span['start']}-{span['end']}",
            f"{span['rarity']:.1f}",
            str(span["num_rows"]),
            escape("\n".join(places) + ("\n…" if span["num_rows"] > len(places) else "")),
        )
    return table


def findings_table(findings: "Sequence[Finding]") -> Table:
    """Return a table of findings, each with its tier."""
    table = Table("what", "measure", "value", "interval", "verdict", "tier")
    for finding in findings:
        style = "green" if finding.verdict in GOOD else "red" if finding.verdict in BAD else ""
        table.add_row(
            escape(finding.subject),
            escape(finding.measure),
            escape(finding.value_text),
            finding.interval_text,
            Text(finding.verdict, style=style),
            finding.tier,
        )
    return table
