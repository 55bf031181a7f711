"""The answer to one of the five questions as a page: plots, what rows say verbatim, every number, what is missing."""

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attribution.answers import PROMISES, Answer, Finding
from attribution.pages.plots import BarRow, Part, bars, flow, scatter, waterfall

_FOLDER = Path(__file__).parent
STYLES = ("site.css", "ask.css")
GOOD = frozenset({"improved", "credited", "helped", "raised the answer's likelihood"})
BAD = frozenset({"worsened", "hindered", "lowered the answer's likelihood"})
MAX_BARS = 24


def answer_html(answer: Answer) -> str:
    """Return the page that stands alone: it loads nothing and runs nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("ask_file.jinja")
    return template.render(view=answer_view(answer), style=style(), record_link=None)


@cache
def style() -> str:
    """Return the one style of the pages."""
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in STYLES)


def answer_view(answer: Answer) -> dict[str, Any]:
    """Return what the template shows."""
    return {
        "answer": answer,
        "figures": [*_flow_figures(answer), *_who_figures(answer), *_bar_figures(answer), *_scatter_figures(answer)],
        "verbatim": _verbatim_view(answer.details.get("verbatim")),
        "promises": [(tier, PROMISES[tier]) for tier in answer.tiers],
        "rows": [_row(finding) for finding in answer.findings],
        "examples": answer.details.get("examples", []),
        "score_unit": answer.details.get("score_unit", "nats"),
        "bm25_examples": answer.details.get("bm25_examples", []),
        "baselines": answer.details.get("baselines", {}),
        "gain": answer.details.get("gain_nats"),
    }


def _figure(title: str, tier: str, caption: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "tier": tier, "caption": caption, "rows": rows, "svg": ""}


def _flow_figures(answer: Answer) -> list[dict[str, Any]]:
    """Where the fees of the newest statement went."""
    paid = answer.details.get("paid")
    if paid is None:
        return []
    parts = [
        Part(part["name"], part["amount"], part["tone"], tuple(map(tuple, part["payees"]))) for part in paid["parts"]
    ]
    return [{**_figure("Where the fees went", "settle", paid["note"], []), "svg": flow(parts, unit=paid["unit"])}]


def _scatter_figures(answer: Answer) -> list[dict[str, Any]]:
    """How well the players' values predict each coalition that was trained."""
    caption = (
        "Each dot is a coalition that was trained and measured; the fuller it is, the fuller its colour. On the line "
        "the players' values add up to what it reached; off it, players help or hinder each other."
    )
    return [
        {
            **_figure(f"Coalitions of {one['adapter_name']} on {one['suite_name']}", "settle", caption, []),
            "svg": scatter(one["points"]),
        }
        for one in answer.details.get("settlements", [])
        if one["points"]
    ]


def _who_figures(answer: Answer) -> list[dict[str, Any]]:
    """The waterfall: contributors' predicted gains, one after the other, to the whole."""
    parts = answer.details.get("contributors", [])
    if not parts:
        return []
    rows = [
        BarRow(
            part["name"],
            part["score"],
            part["score_low"],
            part["score_high"],
            "good" if part["share"] > 0 else "soft" if part["score"] > 0 else "bad",
            f"{part['score']:+.2f} nats",
        )
        for part in parts[:MAX_BARS]
    ]
    rest = sum(part["score"] for part in parts[MAX_BARS:])
    if rest:
        rows.append(BarRow(f"{len(parts) - MAX_BARS} more", rest, None, None, "soft", f"{rest:+.2f} nats"))
    caption = (
        "What each contributor's rows are predicted to have added to the answer's log-likelihood, one after the other. "
        "Green: told from zero, so credited."
    )
    return [_figure("Influence, from contributor to contributor", "explain", caption, waterfall(rows, "all rows"))]


def _bar_figures(answer: Answer) -> list[dict[str, Any]]:
    """One plot of bars for each measure that several subjects, or one with an interval, have."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in answer.findings:
        if finding.low is not None or finding.unit == "of 1":
            groups.setdefault((finding.tier, finding.unit, finding.measure.partition(", by ")[0]), []).append(finding)
    return [
        _figure(measure, tier, _caption(found), bars([_bar_row(finding) for finding in found[:MAX_BARS]]))
        for (tier, _, measure), found in groups.items()
    ]


def _caption(found: Sequence[Finding]) -> str:
    levels = {finding.confidence for finding in found if finding.low is not None and finding.confidence is not None}
    interval = f"Whiskers: interval at {levels.pop():.0%}. " if len(levels) == 1 else ""
    more = f"{len(found) - MAX_BARS} smaller ones are in the table." if len(found) > MAX_BARS else ""
    return f"{interval}{more}".strip()


def _bar_row(finding: Finding) -> BarRow:
    return BarRow(finding.subject, finding.value, finding.low, finding.high, tone(finding), finding.value_text)


def _row(finding: Finding) -> dict[str, Any]:
    return {"finding": finding, "tone": tone(finding)}


def tone(finding: Finding) -> str:
    """Return the class of a finding's verdict."""
    return "good" if finding.verdict in GOOD else "bad" if finding.verdict in BAD else "soft"


def _verbatim_view(verbatim: dict[str, Any] | None) -> dict[str, Any] | None:
    """The answer's text in pieces that some row says, and others."""
    if verbatim is None:
        return None
    text = verbatim["text"]
    edges = sorted({0, len(text), *(end for span in verbatim["spans"] for end in (span["start"], span["end"]))})
    spans = [range(span["start"], span["end"]) for span in verbatim["spans"]]
    pieces = [(text[start:end], any(start in span for span in spans)) for start, end in itertools.pairwise(edges)]
    return {**verbatim, "pieces": pieces}
