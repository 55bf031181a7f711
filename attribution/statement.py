"""A credit statement: what was paid in a period and to whom, with all from which each line can be computed again.

The first half of a `Statement` is what went in (policy, fee table, what the log says of each request, settlements,
clusters), the second what came of it. `compute` turns one into the other; making and verifying both call it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from attribution.payouts import MILLION, Claim, Split, Verdict, allocate, joined_half_width, split_fee
from attribution.records import CodeIdentity, from_plain, to_plain
from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema import CreditSettings

STATEMENT_VERSION = 1
NO_ADAPTER = ""
"""In place of an adapter's digest: the base answered alone."""
NO_DATA_KINDS = frozenset({"adapter", "base"})
"""Players whose part of a fee is set by policy; every other kind shares in the data part."""

COMPARABLE = (
    "Shares are comparable within one settlement only: a value is measured on that settlement's suite, against that "
    "adapter's other players, and says nothing beside the values of another settlement."
)
MEASURED = (
    "Values are measured by retraining without players (Banzhaf), not by influence scores; a player whose interval "
    "reaches zero earns nothing in this period, and its part is paid to nobody else."
)
OFFLINE = (
    "Signature, place in the log, sums and every line can be checked without network; what a receipt says, and "
    "which rows are alike, is checked against the home folder (--home)."
)
NOTES = (COMPARABLE, MEASURED, OFFLINE)

Source = Literal["platform", "base", "adapter", "data", "unattributed"]


class StatementError(UserError):
    """A statement that cannot be made, or is not what it says."""


@dataclass(frozen=True)
class Policy:
    """How fees are shared out; shares and thresholds in millionths."""

    platform_share: int
    base_share: int
    adapter_share: int
    data_share: int
    confidence_micro: int
    familywise: bool
    near_duplicates: Literal["skeleton", "lexical", "semantic"]
    lexical_micro: int
    semantic_micro: int

    @classmethod
    def of(cls, settings: "CreditSettings") -> "Policy":
        """Return the policy of a configuration."""
        return cls(
            platform_share=settings.platform_share,
            base_share=settings.base_share,
            adapter_share=settings.adapter_share,
            data_share=settings.data_share,
            confidence_micro=round(settings.confidence * MILLION),
            familywise=settings.familywise,
            near_duplicates=settings.near_duplicates,
            lexical_micro=round(settings.lexical_similarity * MILLION),
            semantic_micro=round(settings.semantic_similarity * MILLION),
        )

    @property
    def split(self) -> Split:
        """The four shares."""
        return Split(self.platform_share, self.base_share, self.adapter_share, self.data_share)


@dataclass(frozen=True)
class FeeTable:
    """The file: its name, the digest of its bytes (kept in the store), its rows and what they add up to."""

    name: str
    digest: str
    num_rows: int
    total: int


@dataclass(frozen=True)
class Player:
    """A player of a settlement: its value with interval, in micro-units of the utility.

    p_micro: the settlement's chance of such a value without effect, in millionths. num_rows: rows of its that the
    adapter learnt from (0 for what is no data). id as the settlement has it.
    """

    kind: str
    id: str
    value: int
    low: int
    high: int
    p_micro: int
    num_rows: int


@dataclass(frozen=True)
class Settled:
    """A settlement as the statement uses it; `leaf` is its record, `table` the coalition table behind it."""

    leaf: str
    adapter: str
    suite: str
    utility: str
    method: str
    empty_value: int
    full_value: int
    confidence_micro: int
    num_coalitions: int
    seed: int
    table: str
    players: tuple[Player, ...]

    @property
    def gain(self) -> int:
        """What the adapter as a whole was measured to change."""
        return self.full_value - self.empty_value


@dataclass(frozen=True)
class Copies:
    """So many rows of a player, in an adapter's data, are later copies of what `owner` registered first."""

    adapter: str
    kind: str
    player: str
    owner: str
    num_copies: int


@dataclass(frozen=True)
class Withheld:
    """What stands on `records` (leaf hashes) signed with a revoked key, for which nothing is paid; `reason` says why.

    kind and id: a player of the adapter's settlement, of whose rows the adapter learnt `num_rows` from those records;
    `adapter` and its digest where nothing about the adapter counts; `base_model` and its digest.
    """

    adapter: str
    kind: str
    id: str
    num_rows: int
    records: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class ClusterLine:
    """Rows of several contributors that say the same: key ids and row ids in order of registration, the owner first."""

    contributors: tuple[str, ...]
    row_ids: tuple[str, ...]


@dataclass(frozen=True)
class Maker:
    """Who is paid the base part or the adapter part: of the artefact `digest`, the party `id`."""

    source: Literal["base", "adapter"]
    digest: str
    id: str


@dataclass(frozen=True)
class RequestLine:
    """One row of the fee table. A row with a `problem` is listed and not paid, and its parts are 0.

    adapter: digest, '' when the base answered alone or nothing is known. leaf: the record of its receipt.
    """

    line: int
    request_id: str
    payer: str
    fee: int
    problem: str
    time_us: int
    adapter: str
    base: str
    leaf: str
    platform_part: int = 0
    base_part: int = 0
    adapter_part: int = 0
    data_part: int = 0


@dataclass(frozen=True)
class PoolLine:
    """The requests that one adapter ('' for none) answered: their fees by part, and what was paid out of two parts.

    divisor: the value, in micro-units, that the whole data part stands for. reason: why nothing was paid, if so.
    """

    adapter: str
    num_requests: int
    fees: int
    platform_part: int
    base_part: int
    adapter_part: int
    data_part: int
    gain: int
    divisor: int
    adapter_paid: int
    data_paid: int
    unattributed: int
    reason: str


@dataclass(frozen=True)
class PayoutLine:
    """What one party gets for one thing. `value`, `low`, `high`, `moved` are micro-units of the settlement's utility.

    moved: value that came over from later copies of this party's rows. amount_low, amount_high: the amount at the ends
    of the interval.
    """

    source: Source
    adapter: str
    kind: str
    id: str
    value: int
    low: int
    high: int
    moved: int
    p_micro: int
    verdict: Verdict
    amount: int
    amount_low: int
    amount_high: int


@dataclass(frozen=True)
class Totals:
    """Sums over the statement. table = listed + fees; fees = platform + base + adapter + data + unattributed."""

    table: int
    listed: int
    fees: int
    platform: int
    base: int
    adapter: int
    data: int
    unattributed: int


@dataclass(frozen=True)
class Statement:
    """All of it. Requests are in the order of the fee table's lines. `withheld`: see `json_of`."""

    v: int
    unit: str
    period_start_us: int
    period_end_us: int
    policy: Policy
    seed: int
    code: CodeIdentity
    fee_table: FeeTable
    settlements: tuple[Settled, ...]
    copies: tuple[Copies, ...]
    clusters: tuple[ClusterLine, ...]
    makers: tuple[Maker, ...]
    requests: tuple[RequestLine, ...]
    pools: tuple[PoolLine, ...] = ()
    payouts: tuple[PayoutLine, ...] = ()
    totals: Totals = Totals(0, 0, 0, 0, 0, 0, 0, 0)
    notes: tuple[str, ...] = NOTES
    withheld: tuple[Withheld, ...] = ()

    def settlement_of(self, adapter: str) -> Settled | None:
        """The settlement of an adapter, if it has one."""
        return next((settled for settled in self.settlements if settled.adapter == adapter), None)


def compute(statement: Statement) -> Statement:
    """Return the statement with everything that follows from what went in computed anew."""
    requests = tuple(_parts(line, statement.policy.split) for line in statement.requests)
    statement = replace(statement, requests=requests)
    by_adapter: dict[str, list[RequestLine]] = defaultdict(list)
    for line in requests:
        if not line.problem:
            by_adapter[line.adapter].append(line)
    pools: list[PoolLine] = []
    payouts: list[PayoutLine] = []
    for adapter in sorted(by_adapter):
        pool, paid = _share_out(statement, adapter, by_adapter[adapter])
        pools.append(pool)
        payouts += paid
    payouts += _base_payouts(statement)
    payouts.sort(key=lambda line: (line.source, line.adapter, -line.amount, line.kind, line.id))
    return replace(statement, pools=tuple(pools), payouts=tuple(payouts), totals=_totals(requests, pools, payouts))


def json_of(statement: Statement) -> dict[str, Any]:
    """Return a statement's JSON form. `withheld` stands in it only where something is: older ones do not have it."""
    value: dict[str, Any] = to_plain(statement, "statement")
    return value if statement.withheld else {name: part for name, part in value.items() if name != "withheld"}


def statement_of_json(value: object) -> Statement:
    """Return the statement of its JSON form; RecordError names the field that is wrong."""
    whole = {"withheld": [], **value} if isinstance(value, dict) else value
    statement: Statement = from_plain(Statement, whole, "statement")
    if statement.v != STATEMENT_VERSION:
        raise StatementError(f"statement: version {statement.v} is unknown; this program reads {STATEMENT_VERSION}")
    return statement


def claims_of(settled: Settled, copies: Sequence[Copies], withheld: Sequence[Withheld] = ()) -> tuple[Claim, ...]:
    """Return the players of the data part as claims, the value of later copies moved to who registered first.

    A player of n rows, c of them later copies of an owner's, gives c/n of a positive value up to that owner; a negative
    one stays where it is, so that nobody is harmed by being copied badly. By Banzhaf's 2-efficiency the values of a
    row's owner and of one copier of all of it sum to what the two would have as one player. Of rows signed with a
    revoked key the same part of a positive value is withheld.
    """
    players = {(p.kind, p.id): p for p in settled.players if p.kind not in NO_DATA_KINDS}
    lost: dict[tuple[str, str], int] = defaultdict(int)
    gained: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    void = {(item.kind, item.id): item.num_rows for item in withheld if item.adapter == settled.adapter}
    for copy in copies:
        copier = players.get((copy.kind, copy.player))
        if copy.adapter != settled.adapter or copier is None or not copier.num_rows:
            continue
        lost[copy.kind, copy.player] += copy.num_copies
        if copier.value > 0:
            width, num_rows = copier.value - copier.low, copier.num_rows + void.get((copy.kind, copy.player), 0)
            moved = (copier.value * copy.num_copies // num_rows, width * copy.num_copies // num_rows)
            gained[copy.kind, copy.owner].append(moved)
    keys = sorted({*players, *gained})
    return tuple(_claim(key, players.get(key), lost[key], void.get(key, 0), gained[key]) for key in keys)


def _claim(
    key: tuple[str, str], player: Player | None, lost: int, void: int, gained: Sequence[tuple[int, int]]
) -> Claim:
    """A player's own value less what copies and revoked rows are worth, and what others' copies of its rows are."""
    kind, id = key
    value, below, above, withheld, is_barred = 0, 0, 0, 0, False
    if player is not None:
        of = player.num_rows + void or 1
        own = max(player.num_rows - lost, 0) if player.num_rows + void else 1
        is_barred = own == 0
        scale = (own, of) if player.value > 0 or is_barred else (1, 1)
        withheld = -(-max(player.value, 0) * void // of)
        value = player.value * scale[0] // scale[1]
        below = -(-(player.value - player.low) * scale[0] // scale[1])
        above = -(-(player.high - player.value) * scale[0] // scale[1])
    moved = 0
    for worth, width in gained:
        moved += worth
        below, above = joined_half_width(below, width), joined_half_width(above, width)
    value += moved
    settled_p = player.p_micro if player is not None and not moved else 0
    is_barred = is_barred and not moved
    is_withheld = is_barred and void > 0
    return Claim(
        kind, id, value, value - below, value + above, moved, is_barred and not void, settled_p, withheld, is_withheld
    )


def _parts(line: RequestLine, split: Split) -> RequestLine:
    parts = split_fee(0 if line.problem else line.fee, split)
    return replace(
        line,
        platform_part=parts.platform,
        base_part=parts.base,
        adapter_part=parts.adapter,
        data_part=parts.data,
    )


def _share_out(statement: Statement, adapter: str, lines: Sequence[RequestLine]) -> tuple[PoolLine, list[PayoutLine]]:
    """One adapter's pool, and the payouts to its trainer and its data."""
    void = next((item.reason for item in statement.withheld if (item.kind, item.id) == ("adapter", adapter)), "")
    settled = None if void else statement.settlement_of(adapter)
    adapter_part, data_part = sum(line.adapter_part for line in lines), sum(line.data_part for line in lines)
    gain, reason = (settled.gain if settled else 0), void or _reason(adapter, settled)
    payouts: list[PayoutLine] = []
    divisor = 0
    if settled is not None:
        claims = claims_of(settled, statement.copies, statement.withheld)
        allocation = allocate(
            data_part,
            claims,
            gain=gain,
            confidence=settled.confidence_micro / MILLION,
            familywise=statement.policy.familywise,
        )
        divisor = allocation.divisor
        payouts = [
            PayoutLine(
                "data", adapter, claim.kind, claim.id, claim.value, claim.low, claim.high, claim.moved,
                paid.p_micro, paid.verdict, paid.amount, paid.low, paid.high,
            )
            for paid in allocation.payouts
            for claim in (paid.claim,)
        ]  # fmt: skip
    data_paid = sum(line.amount for line in payouts)
    trainer = _maker(statement, "adapter", adapter)
    adapter_paid = adapter_part if trainer is not None and not reason else 0
    if trainer is not None and adapter_paid:
        payouts.append(_fixed("adapter", adapter, trainer, adapter_paid))
    if not reason and not data_paid and data_part:
        reason = "no player's value is distinguishable from zero"
        if any(line.verdict == "revoked key" for line in payouts):
            reason = "no player's value is distinguishable from zero and signed with a key that counts"
    pool = PoolLine(
        adapter=adapter,
        num_requests=len(lines),
        fees=sum(line.fee for line in lines),
        platform_part=sum(line.platform_part for line in lines),
        base_part=sum(line.base_part for line in lines),
        adapter_part=adapter_part,
        data_part=data_part,
        gain=gain,
        divisor=divisor,
        adapter_paid=adapter_paid,
        data_paid=data_paid,
        unattributed=adapter_part - adapter_paid + data_part - data_paid,
        reason=reason,
    )
    return pool, payouts


def _reason(adapter: str, settled: Settled | None) -> str:
    """Why an adapter's trainer and data get nothing, or ''."""
    if adapter == NO_ADAPTER:
        return "the base answered alone"
    if settled is None:
        return "the adapter is not settled; `trailmark settle` measures it"
    return "" if settled.gain > 0 else "the adapter was measured to gain nothing on its suite"


def _base_payouts(statement: Statement) -> list[PayoutLine]:
    """The base parts, by base model; one whose maker is not known stays unattributed (see _totals)."""
    parts: dict[str, int] = defaultdict(int)
    for line in statement.requests:
        parts[line.base] += line.base_part
    found = ((maker, parts[digest]) for digest in sorted(parts) if (maker := _maker(statement, "base", digest)))
    return [_fixed("base", NO_ADAPTER, maker, amount) for maker, amount in found if amount]


def _fixed(source: Source, adapter: str, maker: Maker, amount: int) -> PayoutLine:
    """A line that policy sets, without measurement."""
    kind = "base_model" if source == "base" else "trainer"
    return PayoutLine(source, adapter, kind, maker.id, 0, 0, 0, 0, 0, "paid", amount, amount, amount)


def _maker(statement: Statement, source: str, digest: str) -> Maker | None:
    return next((maker for maker in statement.makers if maker.source == source and maker.digest == digest), None)


def _totals(requests: Sequence[RequestLine], pools: Sequence[PoolLine], payouts: Sequence[PayoutLine]) -> Totals:
    fees = sum(line.fee for line in requests if not line.problem)
    table = sum(line.fee for line in requests)
    platform = sum(pool.platform_part for pool in pools)
    paid = {
        source: sum(line.amount for line in payouts if line.source == source) for source in ("base", "adapter", "data")
    }
    unattributed = fees - platform - sum(paid.values())
    return Totals(table, table - fees, fees, platform, paid["base"], paid["adapter"], paid["data"], unattributed)
