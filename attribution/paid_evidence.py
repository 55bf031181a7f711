"""What the newest statement says to the question of value: who was paid for what, and where the fees went."""

from typing import TYPE_CHECKING, Any

from attribution.answers import Finding
from attribution.evidence import MICRO
from attribution.log.facts import utc
from attribution.statement import COMPARABLE, PayoutLine, Statement
from attribution.statement_make import statements
from attribution.statement_names import Names, name_of

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

PARTS = {"platform": "platform", "base": "base", "adapter": "adapter", "data": "data", "unattributed": "none"}
"""Part of the fees -> how it is drawn."""


def newest_statement(trail: "Trail") -> "tuple[Entry, Statement] | None":
    """Return the last statement that was recorded and not erased."""
    return max(statements(trail), key=lambda found: found[0].index, default=None)


def paid_findings(entry: "Entry", statement: Statement, names: Names) -> list[Finding]:
    """Return what each party got, the largest first; the interval is that of its settled value, none by policy."""
    period = f"{utc(statement.period_start_us)[:10]} to {utc(statement.period_end_us)[:10]}"
    lines = sorted(statement.payouts, key=lambda line: (-line.amount, line.source, line.id))
    return [
        Finding(
            subject=name_of(names, line.id),
            measure=f"fees of {period} for {_what(line)}",
            value=line.amount,
            low=line.amount_low if line.source == "data" else None,
            high=line.amount_high if line.source == "data" else None,
            unit=statement.unit,
            verdict=line.verdict.replace("_", " "),
            links=(entry.leaf_hash,),
            confidence=statement.policy.confidence_micro / MICRO if line.source == "data" else None,
            tier="settle",
            kind=line.kind,
        )
        for line in lines
    ]


def paid_details(entry: "Entry", statement: Statement, names: Names) -> dict[str, Any]:
    """Return the flow of the fees into their parts, and on to whom each part reached."""
    totals = statement.totals
    parts = []
    for name, tone in PARTS.items():
        lines = [line for line in statement.payouts if line.source == name and line.amount]
        lines.sort(key=lambda line: -line.amount)
        payees = [[name_of(names, line.id), line.amount] for line in lines]
        parts.append({"name": name, "tone": tone, "amount": getattr(totals, name), "payees": payees})
    return {
        "leaf": entry.leaf_hash,
        "index": entry.index,
        "unit": statement.unit,
        "fees": totals.fees,
        "parts": [part for part in parts if part["amount"]],
        "note": COMPARABLE,
    }


def _what(line: PayoutLine) -> str:
    return {"data": "data", "adapter": "training", "base": "the base model"}.get(line.source, line.source)
