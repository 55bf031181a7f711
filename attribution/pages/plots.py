"""Plots of an answer as inline SVG: bars with intervals, a waterfall, measured against predicted, the flow of fees.

Words stand in HTML beside the bars, so that they stay readable at any width; colours are classes of ask.css.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, ROW = 1000, 26
"""A bar's drawing, stretched to its column."""
MARGIN = 0.04
SIDE, PAD = 340, 46
FLOW_WIDTH, FLOW_UNIT, NODE, GAP = 760, 320, 12, 26
MAX_LABEL = 34


@dataclass(frozen=True)
class BarRow:
    """One line of a plot of bars. `start` is where the bar begins, 0 but in a waterfall."""

    label: str
    value: float
    low: float | None
    high: float | None
    tone: str
    note: str
    start: float = 0.0


@dataclass(frozen=True)
class Part:
    """A share of the fees: how much, and whom it reaches."""

    name: str
    amount: int
    tone: str
    payees: tuple[tuple[str, int], ...] = ()


def bars(rows: Sequence[BarRow]) -> list[dict[str, Any]]:
    """Return label, note and drawing of each row, all on one scale with zero in it."""
    ends = [0.0]
    for row in rows:
        ends += [row.start, row.start + row.value]
        ends += [row.start + end for end in (row.low, row.high) if end is not None]
    left, right = min(ends), max(ends)
    span = (right - left) or 1.0
    left, span = left - MARGIN * span, span * (1 + 2 * MARGIN)

    def x(value: float) -> float:
        return round((value - left) / span * WIDTH, 1)

    return [
        {"label": row.label, "note": row.note, "tone": row.tone, "svg": _bar(row, x(0.0), *_ends(row, x))}
        for row in rows
    ]


def waterfall(rows: Sequence[BarRow], total: str) -> list[dict[str, Any]]:
    """Return bars that begin where the one before ended, and a last one of their sum."""
    placed, reached = [], 0.0
    for row in rows:
        placed.append(BarRow(row.label, row.value, row.low, row.high, row.tone, row.note, start=reached))
        reached += row.value
    return bars([*placed, BarRow(total, reached, None, None, "total", f"{reached:+.2f}")])


def scatter(points: Sequence[dict[str, Any]]) -> str:
    """Return measured utility of coalitions over what the values of their players add up to."""
    values = [point[name] for point in points for name in ("predicted", "measured")]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    low, span = low - 0.05 * span, 1.1 * span

    def place(value: float) -> float:
        return (value - low) / span * (SIDE - 2 * PAD)

    dots = "".join(
        f'<circle class="dot-{min(4, 1 + round(4 * point["size"] / max(1, point["players"])))}" r="4" '
        f'cx="{PAD + place(point["predicted"]):.1f}" cy="{SIDE - PAD - place(point["measured"]):.1f}">'
        f"<title>{point['size']} of {point['players']} players: predicted {point['predicted']:.4f}, "
        f"measured {point['measured']:.4f}</title></circle>"
        for point in points
    )
    ticks = "".join(_tick(value, place(value)) for value in (low + 0.05 * span, low + 0.5 * span, low + 0.95 * span))
    inner = SIDE - 2 * PAD
    return (
        f'<svg class="scatter" viewBox="-24 {PAD - 24} {SIDE + 24} {SIDE - PAD + 24}" role="img" '
        'aria-label="Measured over predicted utility">'
        f'<rect class="frame" x="{PAD}" y="{PAD}" width="{inner}" height="{inner}"/>'
        f'<line class="diagonal" x1="{PAD}" y1="{SIDE - PAD}" x2="{SIDE - PAD}" y2="{PAD}"/>{ticks}{dots}'
        f'<text x="{SIDE / 2}" y="{SIDE - 8}" text-anchor="middle">predicted by the players\' values</text>'
        f'<text x="{PAD}" y="{PAD - 10}">measured</text></svg>'
    )


def flow(parts: Sequence[Part], *, unit: str) -> str:
    """Return the fees of a period as ribbons: from the whole to its parts, and from a part to whom it reaches."""
    total = sum(part.amount for part in parts)
    if total <= 0:
        return ""
    leaves = [(part, name, amount) for part in parts for name, amount in part.payees if amount]
    height = max(
        _column_height([part.amount for part in parts], total), _column_height([leaf[2] for leaf in leaves], total)
    )
    drawn = [_node(0, 0, FLOW_UNIT, f"fees {total:,} {unit}", "total")]
    top, source, leaf_top = 0.0, 0.0, 0.0
    for part in parts:
        size = part.amount / total * FLOW_UNIT
        drawn.append(_ribbon(NODE, source, 260, top, size, part.tone))
        drawn.append(_node(260, top, size, f"{part.name} {part.amount:,}", part.tone))
        inside = top
        for name, amount in part.payees:
            thick = amount / total * FLOW_UNIT
            drawn.append(_ribbon(260 + NODE, inside, 540, leaf_top, thick, part.tone))
            drawn.append(_node(540, leaf_top, thick, f"{name} {amount:,}", part.tone))
            inside, leaf_top = inside + thick, leaf_top + max(thick, 1) + GAP
        source, top = source + size, top + max(size, 1) + GAP
    return (
        f'<svg class="flow" viewBox="0 -4 {FLOW_WIDTH} {height + 8:.0f}" role="img" aria-label="Where the fees went">'
        f"{''.join(drawn)}</svg>"
    )


def _ends(row: BarRow, x: Any) -> tuple[float, float, float | None, float | None]:
    low, high = (None if end is None else x(row.start + end) for end in (row.low, row.high))
    return x(row.start), x(row.start + row.value), low, high


def _bar(row: BarRow, zero: float, start: float, end: float, low: float | None, high: float | None) -> str:
    left, width = min(start, end), max(abs(end - start), 2.0)
    whisker = ""
    if low is not None and high is not None:
        middle = ROW / 2
        whisker = (
            f'<path class="whisker" d="M{low} {middle}H{high}M{low} {middle - 6}V{middle + 6}'
            f'M{high} {middle - 6}V{middle + 6}"/>'
        )
    return (
        f'<svg class="bar" viewBox="0 0 {WIDTH} {ROW}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="zero" d="M{zero} 0V{ROW}"/>'
        f'<rect class="{escape(row.tone)}" x="{left}" y="5" width="{width:.1f}" height="{ROW - 10}"/>{whisker}</svg>'
    )


def _tick(value: float, at: float) -> str:
    text = f"{value:.3g}"
    return (
        f'<text class="tick" x="{PAD + at:.1f}" y="{SIDE - PAD + 14}" text-anchor="middle">{text}</text>'
        f'<text class="tick" x="{PAD - 5}" y="{SIDE - PAD - at + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _column_height(amounts: Sequence[int], total: int) -> float:
    sizes = [max(amount / total * FLOW_UNIT, 1) + GAP for amount in amounts]
    return max(FLOW_UNIT, sum(sizes))


def _node(x: float, top: float, size: float, label: str, tone: str) -> str:
    shown = label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"
    return (
        f'<rect class="{escape(tone)}" x="{x}" y="{top:.1f}" width="{NODE}" height="{max(size, 1):.1f}"/>'
        f'<text x="{x + NODE + 6}" y="{top + max(size / 2, 4) + 4:.1f}">{escape(shown)}</text>'
    )


def _ribbon(x: float, top: float, to_x: float, to_top: float, size: float, tone: str) -> str:
    middle = (x + to_x) / 2
    bottom, to_bottom = top + size, to_top + size
    return (
        f'<path class="ribbon {escape(tone)}" d="M{x} {top:.1f}'
        f"C{middle} {top:.1f} {middle} {to_top:.1f} {to_x} {to_top:.1f}"
        f'V{to_bottom:.1f}C{middle} {to_bottom:.1f} {middle} {bottom:.1f} {x} {bottom:.1f}Z"/>'
    )
