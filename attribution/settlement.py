"""A settlement: what the players behind an adapter were worth on a suite, measured by retraining; and its record.

A player is whatever can be switched off: a contributor's rows, a dataset, a refinement rule, another adapter. Its value
is a Banzhaf value: how much its presence changes the utility, averaged over the coalitions of the others. Values are
comparable only within one settlement.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from attribution.bodies import AdapterBody, PlayerValue, SettlementBody
from attribution.evidence import MICRO
from attribution.records import Artefact, Party
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

TIER = "settle: measured by retraining; pays"
MAX_PLAYERS_IN_RECORD = 64
"""Players in the record itself: with a long name one takes 900 bytes of its envelope, which ends at 64 KB."""
MAX_NAME_CHARS = 80

NAMED_ELSEWHERE = frozenset({"contributor", "dataset", "adapter"})
"""Kinds whose names stand in records of their own, which may be erased."""

PlayerKind = Literal["contributor", "dataset", "adapter", "rule", "base", "prompt", "retrieval", "workflow_patch"]
SettledVerdict = Literal["helped", "hindered", "no measurable effect"]


class SettlementError(UserError):
    """A settlement that cannot be made or read."""


@dataclass(frozen=True)
class SettledPlayer:
    """One player's values in the utility's unit, with their intervals.

    `value` is the Banzhaf value, `leave_one_out` the full coalition against all but this player; `p_value` belongs to
    the Banzhaf value and is adjusted by Holm over the settlement's players, and `verdict` follows from it.
    """

    kind: PlayerKind
    id: str
    name: str
    value: float
    low: float
    high: float
    leave_one_out: float
    loo_low: float
    loo_high: float
    p_value: float
    verdict: SettledVerdict


@dataclass(frozen=True)
class Settlement:
    """What the players of one adapter were worth on one suite.

    `empty_value` and `full_value` are the mean utility without any player and with all; a cell is one item under one
    coalition, and `num_cells` of them were measured. `table`: digest of the coalitions and their cells; `plan`: digest
    of what says how to measure any cell again. `leaf_hash` and `index` are those of the record, '' and -1 before it.
    """

    adapter: str
    suite: str
    utility: str
    players: tuple[SettledPlayer, ...]
    empty_value: float
    full_value: float
    num_coalitions: int
    num_cells: int
    method: str
    confidence: float
    seed: int
    table: str
    adapter_name: str = ""
    suite_name: str = ""
    over: str = ""
    plan: str = ""
    leaf_hash: str = ""
    index: int = -1
    time_us: int = 0

    @property
    def tier(self) -> str:
        """What this tier of attribution promises."""
        return TIER


def record_settlement(
    trail: "Trail", settlement: Settlement, *, config: str | None = None, workflow: Artefact | None = None
) -> "Entry":
    """Append a `settlement` record, with the adapter, its base, its dataset and the suite as inputs.

    `workflow`: the definition of the workflow that asked, an input too.

    Raises:
        SettlementError: the adapter has no record any more, or the settlement has no players.
    """
    made = trail.find(settlement.adapter)
    if made is None or made.record is None or not isinstance(made.record.body, AdapterBody):
        raise SettlementError(f"adapter {settlement.adapter}: its record is not in this log, or was erased")
    if not settlement.players:
        raise SettlementError(f"settlement of {settlement.adapter}: it has no players")
    values = trail.put_table(_values_table(settlement.players))
    body = _body(settlement, made.record.body, values)
    adapter, suite = (
        Artefact("adapter", body.adapter_name, body.adapter),
        Artefact("suite", body.suite_name, body.suite),
    )
    return trail.record(
        "settlement",
        body,
        inputs=(adapter, *made.record.inputs[:2], suite, *([workflow] if workflow else [])),
        outputs=(
            Artefact("table", f"{body.adapter_name}.values", values),
            Artefact("table", f"{body.adapter_name}.coalitions", body.table),
        ),
        contributors=(Party(trail.keys.get("operator").key_id, "operator"),),
        config=config,
        seed=settlement.seed,
    )


def settlements(trail: "Trail", adapter: str | None = None) -> list[Settlement]:
    """Return the settlements recorded for an adapter (digest), or for all, in order of the log."""
    found = []
    for entry in trail.entries(kind="settlement"):
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, SettlementBody) and adapter in (None, body.adapter):
            found.append(settlement_of(trail, entry))
    return found


def player_name(trail: "Trail", kind: str, player_id: str) -> str:
    """Return what a player is called today: by the record that says so, or by its id where that was erased."""
    from attribution.lineage import Lineage

    found: str | None = None
    if kind == "contributor":
        found = Lineage(trail).contributor_names().get(player_id)
    else:
        entry = trail.find(player_id) if player_id.startswith("sha256:") else _entry(trail, player_id)
        body = entry.record.body if entry is not None and entry.record is not None else None
        found = getattr(body, "name", None)
    return found or player_id.removeprefix("sha256:")[:12]


def _entry(trail: "Trail", leaf_hash: str) -> "Entry | None":
    return None if trail.log.index_of(leaf_hash) is None else trail.entry(leaf_hash)


def settlement_of(trail: "Trail", entry: "Entry") -> Settlement:
    """Return the settlement of a record. SettlementError when it was erased, is of another kind, or lost its values."""
    body = entry.record.body if entry.record is not None else None
    if entry.record is None or not isinstance(body, SettlementBody):
        raise SettlementError(f"record {entry.leaf_hash}: no settlement, or erased")
    return Settlement(
        adapter=body.adapter,
        suite=body.suite,
        utility=body.utility,
        players=tuple(_players(trail, body, entry.leaf_hash)),
        empty_value=body.empty_micro / MICRO,
        full_value=body.full_micro / MICRO,
        num_coalitions=body.num_coalitions,
        num_cells=body.num_cells,
        method=body.method,
        confidence=body.confidence_micro / MICRO,
        seed=entry.record.seed,
        table=body.table,
        adapter_name=body.adapter_name,
        suite_name=body.suite_name,
        over=body.over,
        plan=body.plan,
        leaf_hash=entry.leaf_hash,
        index=entry.index,
        time_us=entry.leaf.time_us,
    )


def _body(settlement: Settlement, made: AdapterBody, values: str) -> SettlementBody:
    ranked = sorted(settlement.players, key=lambda player: (-abs(player.value), player.id))
    return SettlementBody(
        adapter=settlement.adapter,
        adapter_name=settlement.adapter_name or made.name,
        base=made.base,
        dataset=made.dataset,
        suite=settlement.suite,
        suite_name=settlement.suite_name,
        over=settlement.over,
        utility=settlement.utility,
        method=settlement.method,
        players=tuple(_in_micros(player) for player in ranked[:MAX_PLAYERS_IN_RECORD]),
        num_players=len(ranked),
        num_coalitions=settlement.num_coalitions,
        num_cells=settlement.num_cells,
        empty_micro=round(settlement.empty_value * MICRO),
        full_micro=round(settlement.full_value * MICRO),
        confidence_micro=round(settlement.confidence * MICRO),
        values=values,
        table=settlement.table,
        plan=settlement.plan,
    )


def _in_micros(player: SettledPlayer) -> PlayerValue:
    """Intervals are rounded outwards and p-values up, so that rounding never makes a claim firmer."""
    return PlayerValue(
        kind=player.kind,
        id=player.id,
        name="" if player.kind in NAMED_ELSEWHERE else player.name[:MAX_NAME_CHARS],
        value_micro=round(player.value * MICRO),
        low_micro=math.floor(player.low * MICRO),
        high_micro=math.ceil(player.high * MICRO),
        loo_micro=round(player.leave_one_out * MICRO),
        loo_low_micro=math.floor(player.loo_low * MICRO),
        loo_high_micro=math.ceil(player.loo_high * MICRO),
        p_micro=min(MICRO, math.ceil(player.p_value * MICRO)),
        verdict=player.verdict,
    )


def _of_micros(trail: "Trail", value: Mapping[str, Any]) -> SettledPlayer:
    return SettledPlayer(
        kind=value["kind"],
        id=value["id"],
        name=value["name"] or player_name(trail, value["kind"], value["id"]),
        value=value["value_micro"] / MICRO,
        low=value["low_micro"] / MICRO,
        high=value["high_micro"] / MICRO,
        leave_one_out=value["loo_micro"] / MICRO,
        loo_low=value["loo_low_micro"] / MICRO,
        loo_high=value["loo_high_micro"] / MICRO,
        p_value=value["p_micro"] / MICRO,
        verdict=value["verdict"],
    )


def _values_table(players: Sequence[SettledPlayer]) -> Any:
    import pyarrow

    ranked = sorted(players, key=lambda player: (-abs(player.value), player.id))
    return pyarrow.Table.from_pylist([vars(_in_micros(player)) for player in ranked])


def _players(trail: "Trail", body: SettlementBody, leaf_hash: str) -> list[SettledPlayer]:
    """All players: those in the record, or, where it had no room for all, those in its table."""
    if len(body.players) == body.num_players:
        return [_of_micros(trail, vars(player)) for player in body.players]
    if not trail.store.has(body.values):
        raise SettlementError(
            f"settlement {leaf_hash}: its table of {body.num_players} values ({body.values}) is not in the store; "
            "restore it from a copy, or settle again"
        )
    return [_of_micros(trail, row) for row in trail.get_table(body.values).to_pylist()]
