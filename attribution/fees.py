"""A fee table: who paid how much for which request, in integers of the operator's unit. CSV, JSON lines or Parquet.

A row that cannot be read refuses the table and names line, field and remedy. A row that can be read and may not be paid
is listed with the reason: nothing is dropped in silence and nothing is paid twice.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attribution.canonical import MAX_INTEGER
from configs.errors import UserError

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
FIELDS = ("request_id", "payer", "fee")
MAX_SHOWN = 20
MAX_TEXT = 200
INTEGER = re.compile(r"[0-9]{1,16}")
Rows = Iterator[tuple[int, dict[str, Any] | str]]
"""Line and fields, or what is wrong with the line."""

Problem = Literal["unknown", "duplicate", "conflict", "outside the period", "paid before", "revoked key"]
PROBLEMS: dict[Problem, str] = {
    "unknown": "the log has no receipt of this id, or it was erased",
    "duplicate": "the same row stands earlier in the table, which is paid once",
    "conflict": "the id stands in the table with another payer or fee; say which holds",
    "outside the period": "the receipt is of another time",
    "paid before": "an earlier statement paid for this receipt",
    "revoked key": "the receipt is signed with a key from its revocation on",
}


class FeeError(UserError):
    """A fee table that cannot be read."""


@dataclass(frozen=True)
class Fee:
    """One row. `line` counts lines of the file from 1 (CSV: the heading is line 1), rows from 1 in Parquet."""

    line: int
    request_id: str
    payer: str
    fee: int


@dataclass(frozen=True)
class Listed:
    """A row that is not paid, and why."""

    fee: Fee
    problem: Problem


@dataclass(frozen=True)
class Answered:
    """What the log says of a request: when, by which adapter (None: the base alone) and base, in which record.

    `counts`: whether the record's signature does.
    """

    request_id: str
    time_us: int
    adapter: str | None
    base: str
    leaf_hash: str
    counts: bool = True


@dataclass(frozen=True)
class Sorted:
    """A table's rows: those to pay, by request id, and the rest, by line."""

    paid: tuple[Fee, ...]
    listed: tuple[Listed, ...]


def read_fees(path: Path) -> tuple[Fee, ...]:
    """Return the rows of a fee table.

    Raises:
        FeeError: no such file, an unknown ending, or bad rows, each with its line, field and remedy.
    """
    if not path.is_file():
        raise FeeError(f"fee table {path}: no such file")
    return parse_fees(path.read_bytes(), path.name)


def parse_fees(data: bytes, name: str) -> tuple[Fee, ...]:
    """Return the rows of a fee table's bytes; `name` says by its ending what they are, and stands in errors."""
    suffix = Path(name).suffix.lower()
    if suffix not in FORMATS:
        raise FeeError(f"fee table {name}: ending {suffix!r} is not one of {', '.join(FORMATS)}")
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}
    fees, problems = [], []
    for line, row in readers[FORMATS[suffix]](data, name):
        found = row if isinstance(row, str) else _fee(line, row)
        if isinstance(found, str):
            problems.append(f"line {line}: {found}")
        else:
            fees.append(found)
    if problems:
        more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise FeeError("\n".join(f"fee table {name}: {text}" for text in [*problems[:MAX_SHOWN], *more]))
    return tuple(fees)


def sort_fees(
    fees: Iterable[Fee],
    answered: Mapping[str, Answered],
    *,
    start_us: int,
    end_us: int,
    paid_before: Iterable[str] = (),
) -> Sorted:
    """Say which rows are paid in the period [start_us, end_us). The order of the rows does not change what is paid."""
    fees = sorted(fees, key=lambda fee: fee.line)
    paid_before = set(paid_before)
    versions = Counter(request_id for request_id, _, _ in {(fee.request_id, fee.payer, fee.fee) for fee in fees})
    paid: dict[str, Fee] = {}
    listed = []
    for fee in fees:
        problem = _problem(fee, answered.get(fee.request_id), paid_before, (start_us, end_us))
        if problem is None and versions[fee.request_id] > 1:
            problem = "conflict"
        if problem is None and fee.request_id in paid:
            problem = "duplicate"
        if problem is None:
            paid[fee.request_id] = fee
        else:
            listed.append(Listed(fee, problem))
    return Sorted(tuple(paid[name] for name in sorted(paid)), tuple(listed))


def _problem(fee: Fee, found: Answered | None, paid_before: set[str], period: tuple[int, int]) -> Problem | None:
    if found is None:
        return "unknown"
    if fee.request_id in paid_before:
        return "paid before"
    if not found.counts:
        return "revoked key"
    return None if period[0] <= found.time_us < period[1] else "outside the period"


def _fee(line: int, row: Mapping[str, Any]) -> Fee | str:
    """The row, or what is wrong with it."""
    missing = [name for name in FIELDS if row.get(name) is None]
    if missing:
        found = ", ".join(map(str, list(row)[:6])) or "none"
        return f"field {missing[0]!r} is missing; a row has {', '.join(FIELDS)}; found: {found}"
    unknown = [str(name) for name in row if name not in FIELDS]
    if unknown:
        return f"field {unknown[0]!r} is unknown; a row has {', '.join(FIELDS)}; take it out"
    for name in ("request_id", "payer"):
        text = row[name]
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
            return f"field {name!r} = {text!r}: must be text of 1 to {MAX_TEXT} printable characters"
    amount = row["fee"]
    if isinstance(amount, str) and INTEGER.fullmatch(amount.strip()):
        amount = int(amount)
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 <= amount <= MAX_INTEGER:
        return (
            f"field 'fee' = {amount!r}: must be a whole number from 0 to {MAX_INTEGER}; use a smaller unit, such as "
            "cents, and leave refunds to a row of their own books"
        )
    return Fee(line, row["request_id"].strip(), row["payer"].strip(), amount)


def _read_csv(data: bytes, name: str) -> Rows:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FeeError(f"fee table {name}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        heading = [field.strip() for field in next(reader, [])]
        if sorted(heading) != sorted(FIELDS):
            raise FeeError(
                f"fee table {name}: line 1: heading {','.join(heading) or '-'}; it must be {','.join(FIELDS)}"
            )
        for values in reader:
            if len(values) == len(heading):
                yield reader.line_num, dict(zip(heading, values, strict=True))
            elif values:
                yield reader.line_num, f"{len(values)} fields, not {len(heading)}; quote a comma inside a field"
    except csv.Error as error:
        raise FeeError(f"fee table {name}: line {reader.line_num}: not CSV: {error}") from error


def _read_jsonl(data: bytes, name: str) -> Rows:
    for line, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON: {error}; write one object a line"
            continue
        yield line, value if isinstance(value, dict) else "not an object; write one object a line"


def _read_parquet(data: bytes, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise FeeError(f"fee table {name}: not a readable Parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)
