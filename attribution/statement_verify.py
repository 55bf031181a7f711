"""Verify a statement's file offline, and against a home: signature, place in the log, sums, every line, random cells.

Only a trust file is needed for the first; the home adds what is not in the file (receipts, rows, retraining).
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from attribution.canonical import canonical_json
from attribution.fees import parse_fees
from attribution.lineage import record_bundle
from attribution.log.proved import VerifyError
from attribution.log.trust import Trust
from attribution.log.verify import RECORD_BUNDLE_TYPE, Verified, verify_bytes
from attribution.records import RecordError, parse_strict
from attribution.statement import RequestLine, Statement, StatementError, compute, json_of, statement_of_json
from attribution.statement_make import (
    FindCopies,
    Period,
    answered,
    read_statement,
    request_lines,
    settled_of,
    statements,
)
from attribution.statement_names import Names, name_of, names_of_facts
from attribution.statement_recheck import settlements_of

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

STATEMENT_BUNDLE_TYPE = "https://trailmark.dev/statement/v1"
MAX_FILE_BYTES = 512 << 20
ERASURES = ("redaction", "row_redaction")
MILLION = 1_000_000


def statement_bundle(trail: "Trail", entry: "Entry") -> dict[str, Any]:
    """Return a statement with the proof of its record: what `trailmark verify statement` takes."""
    statement = read_statement(trail, entry)
    return {**record_bundle(trail, entry.leaf_hash), "type": STATEMENT_BUNDLE_TYPE, "statement": json_of(statement)}


def verify_statement(data: bytes, *, trust: Trust) -> tuple[Verified, Statement]:
    """Check the bytes of a statement's file without network, log or home.

    Raises:
        VerifyError: names the check that failed, and the line that does not follow from what went in.
    """
    if len(data) > MAX_FILE_BYTES:
        raise VerifyError("file", f"over {MAX_FILE_BYTES >> 20} MiB")
    try:
        value = parse_strict(data, "file")
    except RecordError as error:
        raise VerifyError("file", str(error)) from error
    if not isinstance(value, dict) or value.get("type") != STATEMENT_BUNDLE_TYPE or "statement" not in value:
        raise VerifyError("file", f"not a statement ({STATEMENT_BUNDLE_TYPE}); `trailmark statement export` writes one")
    proof = {name: part for name, part in value.items() if name != "statement"} | {"type": RECORD_BUNDLE_TYPE}
    try:
        statement = statement_of_json(value["statement"])
    except (RecordError, StatementError) as error:
        raise VerifyError("statement", str(error)) from error
    withheld = frozenset(leaf for line in statement.withheld for leaf in line.records)
    verified = verify_bytes(json.dumps(proof).encode(), trust=trust, withheld=withheld)
    body = verified.facts["body"]
    if verified.kind != "statement" or body is None:
        raise VerifyError("record", f"the signed record is a {verified.kind}, or was erased; not a statement's")
    checks = check_lines(statement, names=names_of_facts(verified.facts))
    if (statement.period_start_us, statement.period_end_us) != (body["period_start_us"], body["period_end_us"]):
        raise VerifyError("statement", "its period is not the signed record's")
    digest = f"sha256:{sha256(canonical_json(value['statement'])).hexdigest()}"
    if digest != body["table"]:
        raise VerifyError(
            "digest",
            f"the statement's digest is {digest}, the signed record names {body['table']}; every line follows from "
            "what stands before it, so something that went in was changed: fee table, receipts, settlement or policy",
        )
    checks.append(f"digest: the signed record names these {len(canonical_json(value['statement'])) / 1000:.0f} kB")
    return Verified("statement", [*verified.checks, *checks], verified.facts), statement


def check_lines(statement: Statement, *, names: Names | None = None) -> list[str]:
    """Compute every line again from what went in; return what was shown. VerifyError names the first that differs."""
    again = compute(statement)
    for part in ("requests", "payouts", "pools"):
        _same_lines(part, getattr(statement, part), getattr(again, part), names=names)
    _same_fields("totals", statement.totals, again.totals)
    _check_sums(statement)
    policy, table = statement.policy, statement.fee_table
    if sum(vars(policy.split).values()) != MILLION:
        raise VerifyError("policy", "the shares do not sum to 1,000,000")
    if (len(statement.requests), sum(line.fee for line in statement.requests)) != (table.num_rows, table.total):
        raise VerifyError("fees", f"{len(statement.requests)} lines, the fee table had {table.num_rows}")
    _check_once(statement)
    totals = statement.totals
    withheld = {leaf for line in statement.withheld for leaf in line.records}
    told = [f"withheld: nothing is paid for {len(withheld)} records signed with a revoked key"] if withheld else []
    return [
        *told,
        f"lines: {len(statement.requests)} requests, {len(statement.payouts)} payouts computed again, all equal",
        f"sums: {totals.fees} in fees = {totals.platform} platform + {totals.base} base + {totals.adapter} adapter + "
        f"{totals.data} data + {totals.unattributed} unattributed; {totals.listed} listed and not paid",
    ]


def check_home(trail: "Trail", statement: Statement, find_copies: FindCopies, *, leaf_hash: str) -> list[str]:
    """Hold what went into a statement against the home: fee table, receipts, settlements, rows, earlier statements.

    Raises:
        VerifyError: names what differs; after an erasure, that it may be what was erased, and what can still be said.
    """
    try:
        return _held_to_home(trail, statement, find_copies, leaf_hash=leaf_hash)
    except VerifyError as error:
        place = trail.entry_index(leaf_hash)
        since = [one for one in trail.notices() if one.index > place and one.leaf.kind in ERASURES]
        if not since:
            raise
        raise VerifyError(
            "home",
            f"{error.reason}; but {len(since)} erasures were recorded after this statement, the first as entry "
            f"{since[0].index}, so that what it rested on may no longer be whole here; without --home its signature, "
            "place in the log, sums and every line can still be verified",
        ) from error


def _held_to_home(trail: "Trail", statement: Statement, find_copies: FindCopies, *, leaf_hash: str) -> list[str]:
    table = statement.fee_table
    fees = parse_fees(trail.store.get_blob(table.digest), table.name)
    period = Period(statement.period_start_us, statement.period_end_us)
    known = answered(trail, [fee.request_id for fee in fees])
    before = [
        line.request_id
        for entry, earlier in statements(trail)
        if entry.index < trail.entry_index(leaf_hash)
        for line in earlier.requests
        if not line.problem
    ]
    blank = [_without_parts(line) for line in statement.requests]
    _same_lines("requests", blank, list(request_lines(fees, known, period, paid_before=before)))
    used = settlements_of(trail, statement)
    findings = find_copies(used, statement.policy)
    _same_lines("settlements", statement.settlements, [settled_of(item, findings.num_rows) for item in used])
    _same_lines("copies", statement.copies, findings.copies)
    _same_lines("clusters", statement.clusters, findings.clusters)
    counted = [line for line in statement.withheld if line.num_rows]
    _same_lines("withheld", counted, findings.withheld)
    return [
        f"receipts: {len(fees)} rows of the fee table, each as the log has it, none paid before",
        f"settlements: {len(used)} as recorded; {len(statement.clusters)} clusters found again among registered rows",
    ]


def _same_lines(part: str, found: Sequence[Any], again: Sequence[Any], *, names: Names | None = None) -> None:
    for number, (one, other) in enumerate(zip(found, again, strict=False)):
        _same_fields(f"{part}[{number}]{_label(one, names or {})}", one, other)
    if len(found) != len(again):
        raise VerifyError("lines", f"{part}: {len(found)} lines stand there, {len(again)} follow from what went in")


def _label(line: Any, names: Names) -> str:
    """What tells a line from others: the request, the party, or the adapter."""
    if party := getattr(line, "id", ""):
        return f" ({name_of(names, party)})"
    text = getattr(line, "request_id", "") or getattr(line, "adapter", "")
    return f" ({text})" if text else ""


def _same_fields(where: str, found: Any, again: Any) -> None:
    for field in fields(found):
        one, other = getattr(found, field.name), getattr(again, field.name)
        if isinstance(one, tuple) and one and is_dataclass(one[0]):
            _same_lines(f"{where}: {field.name}", one, other)
        elif one != other:
            raise VerifyError("lines", f"{where}: {field.name} is {one!r}, but {other!r} follows from what went in")


def _check_sums(statement: Statement) -> None:
    """What holds whatever computed the lines: no request pays more than its fee, and all adds up."""
    for line in statement.requests:
        parts = line.platform_part + line.base_part + line.adapter_part + line.data_part
        if parts != (0 if line.problem else line.fee):
            raise VerifyError("sums", f"line {line.line} ({line.request_id}): its parts sum to {parts}, not its fee")
    for pool in statement.pools:
        if pool.adapter_paid + pool.data_paid + pool.unattributed != pool.adapter_part + pool.data_part:
            raise VerifyError("sums", f"pool of {pool.adapter or 'the base'}: paid and unattributed are not its parts")
    totals = statement.totals
    shared = totals.platform + totals.base + totals.adapter + totals.data + totals.unattributed
    if shared != totals.fees or totals.fees + totals.listed != totals.table:
        raise VerifyError("sums", f"totals: {shared} shared out of {totals.fees} in fees")


def _check_once(statement: Statement) -> None:
    paid: set[str] = set()
    for line in statement.requests:
        if line.problem:
            continue
        if line.request_id in paid:
            raise VerifyError("lines", f"line {line.line}: request {line.request_id} is paid twice")
        if not statement.period_start_us <= line.time_us < statement.period_end_us:
            raise VerifyError("lines", f"line {line.line}: request {line.request_id} is of another time")
        paid.add(line.request_id)


def _without_parts(line: RequestLine) -> RequestLine:
    return replace(line, platform_part=0, base_part=0, adapter_part=0, data_part=0)
