"""A statement as one self-contained page: no script, no network, charts as inline SVG, light and dark."""

import base64
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from attribution.log.facts import utc
from attribution.statement import NO_ADAPTER, PayoutLine, PoolLine, Statement
from attribution.statement_names import Names, name_of, withheld_from

_FOLDER = Path(__file__).parent
MAX_LISTED = 200
MAX_BARS = 40
MAX_NAME = 24
FLOW = {"width": 760, "height": 300, "node": 14, "gap": 10, "left": 96, "right": 470}
BAR = {"width": 760, "row": 30, "left": 190, "right": 96}
PARTS = {
    "platform": "Platform",
    "base": "Base model",
    "adapter": "Training",
    "data": "Contributors",
    "unattributed": "Unattributed",
}


@dataclass(frozen=True)
class Ribbon:
    """One part of the fees in the flow: SVG path and the block it ends in, with its label."""

    name: str
    label: str
    amount: int
    share: float
    path: str
    y: float
    height: float
    label_y: float


@dataclass(frozen=True)
class Bar:
    """A contributor's amount with the interval of it; x in pixels."""

    name: str
    amount: int
    low: int
    high: int
    y: float
    width: float
    low_x: float
    high_x: float
    verdict: str


def statement_html(statement: Statement, names: Names, *, leaf_hash: str, index: int) -> str:
    """Return the page of a statement that was recorded as leaf `leaf_hash`, entry `index` of the log."""
    style = (_FOLDER / "statement.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    listed = [line for line in statement.requests if line.problem]
    data = sorted((line for line in statement.payouts if line.source == "data"), key=lambda line: -line.amount)
    text: str = _template().render(
        name=partial(name_of, names),
        statement=statement,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=style,
        leaf_hash=leaf_hash,
        index=index,
        start=utc(statement.period_start_us),
        end=utc(statement.period_end_us),
        flow=ribbons(statement),
        flow_size=FLOW,
        charts=[_chart(statement, pool, data, names) for pool in statement.pools if pool.adapter != NO_ADAPTER],
        bar_size=BAR,
        fixed=[line for line in statement.payouts if line.source in ("base", "adapter")],
        listed=listed[:MAX_LISTED],
        num_listed=len(listed),
        problems=_problems(statement),
        withheld=[(withheld_from(item, names), item.reason) for item in statement.withheld],
        alone=next((pool for pool in statement.pools if pool.adapter == NO_ADAPTER), None),
        payers=_payers(statement),
    )
    return text


def ribbons(statement: Statement) -> list[Ribbon]:
    """Return how the fees flow into their parts, largest first, as curves from one block on the left."""
    totals = statement.totals
    amounts = {name: int(getattr(totals, name)) for name in PARTS}
    shown = [(name, amount) for name, amount in amounts.items() if amount]
    total = max(totals.fees, 1)
    room = FLOW["height"] - FLOW["gap"] * max(len(shown) - 1, 0)
    start, end = 0.0, 0.0
    inner = FLOW["gap"] * max(len(shown) - 1, 0) / 2
    found = []
    label_floor = 0.0
    for name, amount in shown:
        height = max(room * amount / total, 1.0)
        left, middle = FLOW["left"] + FLOW["node"], (FLOW["left"] + FLOW["node"] + FLOW["right"]) / 2
        top, x = start + inner, FLOW["right"]
        path = (
            f"M{left},{top:.1f} C{middle},{top:.1f} {middle},{end:.1f} {x},{end:.1f} "
            f"V{end + height:.1f} C{middle},{end + height:.1f} {middle},{top + height:.1f} {left},{top + height:.1f} Z"
        )
        label_y = max(end + height / 2, label_floor + 9)
        found.append(Ribbon(name, PARTS[name], amount, amount / total, path, end, height, label_y))
        label_floor = label_y + 9
        start, end = start + height, end + height + FLOW["gap"]
    return found


def _chart(statement: Statement, pool: PoolLine, data: Sequence[PayoutLine], names: Names) -> dict[str, Any]:
    """One adapter: its pool, its settlement, and a bar for each contributor with the interval of the amount."""
    lines = [line for line in data if line.adapter == pool.adapter]
    paid = [line for line in lines if line.amount][:MAX_BARS]
    highest = max([line.amount_high for line in paid], default=1) or 1
    scale = (BAR["width"] - BAR["left"] - BAR["right"]) / highest
    bars = [
        Bar(
            name=_shortened(name_of(names, line.id)),
            amount=line.amount,
            low=line.amount_low,
            high=line.amount_high,
            y=number * BAR["row"],
            width=max(line.amount * scale, 1.0),
            low_x=BAR["left"] + line.amount_low * scale,
            high_x=BAR["left"] + line.amount_high * scale,
            verdict=line.verdict,
        )
        for number, line in enumerate(paid)
    ]
    return {
        "pool": pool,
        "settled": statement.settlement_of(pool.adapter),
        "bars": bars,
        "lines": lines,
        "num_hidden": max(len([line for line in lines if line.amount]) - MAX_BARS, 0),
        "height": max(len(bars) * BAR["row"], BAR["row"]),
    }


def _problems(statement: Statement) -> list[tuple[str, int, int]]:
    """Problem, number of rows, sum of their fees."""
    count: dict[str, list[int]] = defaultdict(list)
    for line in statement.requests:
        if line.problem:
            count[line.problem].append(line.fee)
    return [(problem, len(fees), sum(fees)) for problem, fees in sorted(count.items())]


def _payers(statement: Statement) -> list[tuple[str, int, int]]:
    """Payer, number of paid requests, sum of their fees; the largest first."""
    count: dict[str, list[int]] = defaultdict(list)
    for line in statement.requests:
        if not line.problem:
            count[line.payer].append(line.fee)
    return sorted(((name, len(fees), sum(fees)) for name, fees in count.items()), key=lambda row: (-row[2], row[0]))[
        :20
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def units(amount: int) -> str:
    """Return an amount with thin spaces between thousands."""
    return f"{amount:,}".replace(",", "\u202f")


def signed(micro: int) -> str:
    """Return a value in micro-units of its settlement's utility with its sign, to four places."""
    return f"{micro / 1_000_000:+.4f}"


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(units=units, signed=signed)
    return environment.get_template("statement.jinja")
