"""Make a statement: read the fee table, ask the log what each request was, take the settlements, record the result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.bodies import BaseModelBody, StatementBody
from attribution.fees import Answered, Fee, read_fees, sort_fees
from attribution.log.sequencer import file_lock
from attribution.provenance import code_identity
from attribution.receipt_index import ReceiptIndex
from attribution.receipts import completion_rows, parse_receipt
from attribution.records import Artefact, from_plain, to_plain
from attribution.settlement import Settlement, settlement_of, settlements
from attribution.statement import (
    NO_ADAPTER,
    STATEMENT_VERSION,
    ClusterLine,
    Copies,
    FeeTable,
    Maker,
    Player,
    Policy,
    RequestLine,
    Settled,
    Statement,
    StatementError,
    compute,
)
from attribution.trust_file import OPERATOR

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail
    from configs.schema import CreditSettings

MICRO = 1_000_000


@dataclass(frozen=True)
class CopyFindings:
    """What the registered rows say of settled players.

    num_rows: (adapter, kind, player id) -> rows of that player that the adapter learnt from.
    """

    num_rows: Mapping[tuple[str, str, str], int]
    copies: tuple[Copies, ...] = ()
    clusters: tuple[ClusterLine, ...] = ()


FindCopies = Callable[[Sequence[Settlement], Policy], CopyFindings]
"""Rows are read by `pipelines.statement`; the arithmetic needs only these findings."""


@dataclass(frozen=True)
class Period:
    """From `start_us` up to, not with, `end_us`, in microseconds since 1970."""

    start_us: int
    end_us: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_us < self.end_us:
            raise StatementError(
                f"period: from {self.start_us} to {self.end_us} microseconds; the end must lie after the start"
            )


def make_statement(
    trail: "Trail",
    fee_file: Path,
    period: Period,
    *,
    settings: "CreditSettings",
    find_copies: FindCopies,
    chosen: Sequence[str] = (),
) -> "Entry":
    """Share out the fees of a table, record the statement and return its entry.

    `chosen` are leaf hashes of settlements to use where an adapter has several; the newest counts otherwise. Statements
    of one home are made one at a time, so that no receipt is paid by two.

    Raises:
        FeeError: a table that cannot be read.
        StatementError: nothing to pay, or a settlement whose intervals are of a lower confidence than the policy's.
    """
    fees = read_fees(fee_file)
    with file_lock(trail.home / "run" / "statement.lock"):
        statement = compute(_gather(trail, fee_file, fees, period, settings, find_copies, chosen))
        if not any(not line.problem for line in statement.requests):
            problems = ", ".join(sorted({line.problem for line in statement.requests})) or "it has no rows"
            raise StatementError(f"fee table {fee_file.name}: nothing in it can be paid in this period ({problems})")
        table = trail.put_json(to_plain(statement, "statement"))
        fee_table = statement.fee_table
        inputs = [Artefact("fees", fee_table.name, fee_table.digest)]
        return trail.record(
            "statement",
            StatementBody(period.start_us, period.end_us, table),
            inputs=inputs,
            outputs=[Artefact("table", "statement", table)],
            parents=[settled.leaf for settled in statement.settlements],
            config=trail.run_config(settings),
            seed=statement.seed,
        )


def read_statement(trail: "Trail", entry: "Entry") -> Statement:
    """Return the statement of a record. StatementError when it was erased or is of another kind."""
    body = entry.record.body if entry.record is not None else None
    if not isinstance(body, StatementBody):
        raise StatementError(f"record {entry.leaf_hash}: no statement, or erased")
    return statement_of_json(trail.get_json(body.table))


def statement_of_json(value: object) -> Statement:
    """Return the statement of its JSON form; RecordError names the field that is wrong."""
    statement: Statement = from_plain(Statement, value, "statement")
    if statement.v != STATEMENT_VERSION:
        raise StatementError(f"statement: version {statement.v} is unknown; this program reads {STATEMENT_VERSION}")
    return statement


def statements(trail: "Trail") -> "Iterator[tuple[Entry, Statement]]":
    """Yield the statements of a log that were not erased, oldest first."""
    for entry in trail.entries(kind="statement"):
        if entry.record is not None:
            yield entry, read_statement(trail, entry)


def answered(trail: "Trail", request_ids: Sequence[str]) -> dict[str, Answered]:
    """Return what the log says of those of the requests that it knows; each batch of receipts is read once."""
    places = ReceiptIndex(trail).places(list(dict.fromkeys(request_ids)))
    found = {}
    for leaf_hash in sorted({place.leaf_hash for place in places.values()}):
        for row in completion_rows(trail, trail.entry(leaf_hash)):
            receipt = parse_receipt(row.receipt)
            if receipt.id in places:
                found[receipt.id] = Answered(receipt.id, receipt.time_us, receipt.adapter, receipt.base, leaf_hash)
    return found


def settled_of(settlement: Settlement, num_rows: Mapping[tuple[str, str, str], int]) -> Settled:
    """Return a settlement as a statement carries it."""
    return Settled(
        leaf=settlement.leaf_hash,
        adapter=settlement.adapter,
        suite=settlement.suite,
        utility=settlement.utility,
        method=settlement.method,
        empty_value=round(settlement.empty_value * MICRO),
        full_value=round(settlement.full_value * MICRO),
        confidence_micro=round(settlement.confidence * MICRO),
        num_coalitions=settlement.num_coalitions,
        seed=settlement.seed,
        table=settlement.table,
        players=tuple(
            Player(
                kind=player.kind,
                id=player.id,
                value=round(player.value * MICRO),
                low=round(player.low * MICRO),
                high=round(player.high * MICRO),
                p_micro=round(player.p_value * MICRO),
                num_rows=num_rows.get((settlement.adapter, player.kind, player.id), 0),
            )
            for player in settlement.players
        ),
    )


def _gather(
    trail: "Trail",
    fee_file: Path,
    fees: Sequence[Fee],
    period: Period,
    settings: "CreditSettings",
    find_copies: FindCopies,
    chosen: Sequence[str],
) -> Statement:
    """Everything that goes into a statement."""
    policy = Policy.of(settings)
    known = answered(trail, [fee.request_id for fee in fees])
    requests = request_lines(fees, known, period, paid_before=_paid_before(trail))
    adapters = sorted({line.adapter for line in requests if line.adapter and not line.problem})
    used = _settlements(trail, adapters, policy, chosen)
    findings = find_copies(used, policy)
    return Statement(
        v=STATEMENT_VERSION,
        unit=settings.unit,
        period_start_us=period.start_us,
        period_end_us=period.end_us,
        policy=policy,
        seed=max((settlement.seed for settlement in used), default=0),
        code=code_identity(),
        fee_table=FeeTable(fee_file.name, trail.store.put_blob(fee_file), len(fees), sum(fee.fee for fee in fees)),
        settlements=tuple(settled_of(settlement, findings.num_rows) for settlement in used),
        copies=findings.copies,
        clusters=findings.clusters,
        makers=_makers(trail, requests),
        requests=requests,
    )


def request_lines(
    fees: Sequence[Fee], known: Mapping[str, Answered], period: Period, *, paid_before: Sequence[str] = ()
) -> tuple[RequestLine, ...]:
    """Return a line for every row of the table, in its order, those that are not paid with their problem."""
    found = sort_fees(fees, known, start_us=period.start_us, end_us=period.end_us, paid_before=paid_before)
    problems = {listed.fee.line: listed.problem for listed in found.listed}
    lines = []
    for fee in sorted(fees, key=lambda fee: fee.line):
        what = known.get(fee.request_id)
        line = RequestLine(fee.line, fee.request_id, fee.payer, fee.fee, problems.get(fee.line, ""), 0, "", "", "")
        if what is not None:
            adapter = what.adapter or NO_ADAPTER
            line = replace(line, time_us=what.time_us, adapter=adapter, base=what.base, leaf=what.leaf_hash)
        lines.append(line)
    return tuple(lines)


def _paid_before(trail: "Trail") -> list[str]:
    return [line.request_id for _, earlier in statements(trail) for line in earlier.requests if not line.problem]


def _settlements(trail: "Trail", adapters: Sequence[str], policy: Policy, chosen: Sequence[str]) -> list[Settlement]:
    """One settlement for each adapter that has any; those chosen must be of these adapters."""
    newest = {found.adapter: found for found in settlements(trail) if found.adapter in adapters}
    for leaf in chosen:
        settlement = settlement_of(trail, trail.entry(trail.leaf_hash(leaf)))
        if settlement.adapter not in adapters:
            raise StatementError(f"settlement {leaf}: of adapter {settlement.adapter}, which answered no paid request")
        newest[settlement.adapter] = settlement
    used = [newest[adapter] for adapter in adapters if adapter in newest]
    for settlement in used:
        if round(settlement.confidence * MICRO) < policy.confidence_micro:
            raise StatementError(
                f"settlement {settlement.leaf_hash[:12]}: its intervals hold at {settlement.confidence:.0%}, under "
                f"credit.confidence = {policy.confidence_micro / MICRO:.0%}; settle again at that, or lower the setting"
            )
    return used


def _makers(trail: "Trail", requests: Sequence[RequestLine]) -> tuple[Maker, ...]:
    """Who trained the adapters and who made the bases that answered, as their records say."""
    makers = []
    for adapter in sorted({line.adapter for line in requests if not line.problem} - {NO_ADAPTER}):
        entry = trail.find(adapter)
        if entry is not None and entry.record is not None:
            key_id = next(iter(entry.record.contributors), None)
            trainer = key_id.key_id if key_id is not None else trail.keys.get(OPERATOR).key_id
            makers.append(Maker("adapter", adapter, trainer))
    for base in sorted({line.base for line in requests if not line.problem}):
        entry = trail.find(base)
        if entry is not None and entry.record is not None and isinstance(entry.record.body, BaseModelBody):
            makers.append(Maker("base", base, base))
    return tuple(makers)
