"""A statement for other programs and for people: JSON with its proof, CSV of what is paid, a page."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.log.facts import utc
from attribution.pages.statement import statement_html
from attribution.statement import Statement, StatementError
from attribution.statement_make import read_statement
from attribution.statement_names import Names, name_of, names_of
from attribution.statement_verify import statement_bundle
from attribution.store import write_atomically

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

FORMATS = {"json": "statement.json", "csv": "payouts.csv", "html": "statement.html"}
ALL = "all"
COLUMNS = (
    *("source", "payee", "kind", "id", "adapter", "amount", "amount_low", "amount_high", "unit", "verdict"),
    *("value_micro", "low_micro", "high_micro", "moved_micro", "p_micro", "period_start", "period_end", "statement"),
)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def export_text(trail: "Trail", entry: "Entry", form: str) -> str:
    """Return a statement in one format. StatementError when there is no such format."""
    if form == "json":
        return json.dumps(statement_bundle(trail, entry), indent=1, ensure_ascii=False) + "\n"
    statement = read_statement(trail, entry)
    if form == "csv":
        return payouts_csv(statement, names_of(trail, statement), leaf_hash=entry.leaf_hash)
    if form == "html":
        names = names_of(trail, statement)
        return statement_html(statement, names, leaf_hash=entry.leaf_hash, index=entry.index)
    raise StatementError(f"format {form!r}: choose one of {', '.join([*FORMATS, ALL])}")


def export_folder(trail: "Trail", entry: "Entry", folder: Path) -> list[Path]:
    """Write every format to a folder and return the files."""
    if folder.exists() and not folder.is_dir():
        raise StatementError(f"--out {folder}: is a file; give a folder for every format at once")
    folder.mkdir(parents=True, exist_ok=True)
    for form, name in FORMATS.items():
        write_atomically(folder / name, export_text(trail, entry, form).encode())
        (folder / name).chmod(0o644)
    return [folder / name for name in FORMATS.values()]


def payouts_csv(statement: Statement, names: Names, *, leaf_hash: str) -> str:
    """Return a line for each payout, one for the platform and one for what is unattributed: they sum to the fees.

    A name that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    common = {
        "unit": statement.unit,
        "period_start": utc(statement.period_start_us),
        "period_end": utc(statement.period_end_us),
        "statement": leaf_hash,
    }
    for line in statement.payouts:
        row = {
            "source": line.source,
            "payee": _safe(name_of(names, line.id)),
            "kind": line.kind,
            "id": line.id,
            "adapter": line.adapter,
            "amount": line.amount,
            "amount_low": line.amount_low,
            "amount_high": line.amount_high,
            "verdict": line.verdict,
            "value_micro": line.value,
            "low_micro": line.low,
            "high_micro": line.high,
            "moved_micro": line.moved,
            "p_micro": line.p_micro,
        }
        writer.writerow(row | common)
    for source in ("platform", "unattributed"):
        writer.writerow({"source": source, "amount": getattr(statement.totals, source)} | common)
    return out.getvalue()


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
