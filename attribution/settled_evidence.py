"""What settlements say to the five questions: players' values, and how well these predict what coalitions reached."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.answers import Cost, Finding, Missing, Resampling
from attribution.evidence import NO_EFFECT, Spread, resampled_mean
from attribution.settlement import SettledPlayer, Settlement, settlements

if TYPE_CHECKING:
    from attribution.trail import Trail

NO_SETTLEMENT = Missing(
    "cause: which part made the difference was not measured by leaving parts out",
    "trailmark settle ADAPTER --suite SUITE.jsonl trains coalitions again and prints the budget first",
)
MIN_POINTS = 3
DATA_KINDS = frozenset({"contributor", "dataset"})


def newest_settlements(trail: "Trail", adapters: Collection[str]) -> list[Settlement]:
    """Return the newest settlement of each adapter, suite and kind of player."""
    newest = {(found.adapter, found.suite, found.over): found for found in settlements(trail)}
    return [found for found in newest.values() if found.adapter in adapters]


def settled_findings(found: Sequence[Settlement], *, kinds: Collection[str] | None = None) -> list[Finding]:
    """Return what each player of some kinds (all by default) was worth, the largest effect first."""
    findings = []
    for settlement in found:
        players = [player for player in settlement.players if kinds is None or player.kind in kinds]
        for player in sorted(players, key=lambda player: (-abs(player.value), player.id)):
            findings.append(_finding(settlement, player))
    return findings


def whole_findings(trail: "Trail", found: Sequence[Settlement], resampling: Resampling) -> list[Finding]:
    """Return what each settled adapter does with all its parts against none, with an interval over the items."""
    findings = []
    for one in found:
        spread = _whole(trail, one, resampling)
        gain = one.full_value - one.empty_value
        verdict = "not tested: its table of coalitions is gone"
        if spread is not None:
            verdict = NO_EFFECT if not spread.is_distinct else "improved" if gain > 0 else "worsened"
        findings.append(
            Finding(
                one.adapter_name,
                f"{one.utility} on {one.suite_name}: all its {one.over or 'players'} against none",
                gain,
                spread.low if spread else None,
                spread.high if spread else None,
                unit_of(one),
                verdict,
                (one.leaf_hash,),
                resampling.confidence if spread else None,
                tier="settle",
                kind="adapter",
            )
        )
    return findings


def _whole(trail: "Trail", settlement: Settlement, resampling: Resampling) -> Spread | None:
    """All players less none, paired by item; None when the table of coalitions is gone."""
    names, utilities = (_column(trail, settlement, name) for name in ("coalition", "utilities"))
    by_size = {
        name.count("1") / max(1, len(name)): np.asarray(items) for name, items in zip(names, utilities, strict=True)
    }
    if not {0.0, 1.0} <= by_size.keys():
        return None
    return resampled_mean(by_size[1.0] - by_size[0.0], **asdict(resampling))


def unit_of(settlement: Settlement) -> str:
    """Return the unit of a settlement's values: what stands last in the name of its utility."""
    return settlement.utility.rpartition(", ")[2]


def settled_cost(trail: "Trail", found: Sequence[Settlement]) -> tuple[Cost, ...]:
    """Return what the settlements took: coalitions trained, seconds of that, cells measured."""
    if not found:
        return ()
    seconds = sum(sum(_column(trail, one, "seconds")) for one in found)
    return (
        Cost("coalitions trained and measured for the settlements", sum(one.num_coalitions for one in found), "runs"),
        *((Cost("training and measuring them", seconds, "seconds"),) if seconds else ()),
        Cost("items asked of them", sum(one.num_cells for one in found), "cells"),
    )


@dataclass(frozen=True)
class CoalitionPoint:
    """A measured coalition: players in it, of how many, and its mean utility as predicted and as measured."""

    size: int
    players: int
    predicted: float
    measured: float


def settled_details(trail: "Trail", found: Sequence[Settlement]) -> list[dict[str, Any]]:
    """Return the settlements as plain values, with the points of their coalitions."""
    return [{**asdict(one), "points": [asdict(point) for point in coalition_points(trail, one)]} for one in found]


def coalition_points(trail: "Trail", settlement: Settlement) -> list[CoalitionPoint]:
    """Return each measured coalition beside what its players' values add up to; [] when table or plan are gone.

    Predicted: c + the sum of the values of the players in it, with the one c that makes the means of both equal.
    """
    order = _player_order(trail, settlement)
    coalitions, utilities = (_column(trail, settlement, name) for name in ("coalition", "utilities"))
    if not order or len(coalitions) < MIN_POINTS:
        return []
    members = np.array([[bit == "1" for bit in coalition] for coalition in coalitions], dtype=np.float64)
    measured = np.array([np.mean(items) for items in utilities])
    value_of = {player.id: player.value for player in settlement.players}
    sums = members @ np.array([value_of.get(player_id, 0.0) for player_id in order])
    predicted = sums + float(np.mean(measured - sums))
    return [
        CoalitionPoint(int(row.sum()), len(order), float(guess), float(true))
        for row, guess, true in zip(members, predicted, measured, strict=True)
    ]


def _player_order(trail: "Trail", settlement: Settlement) -> list[str]:
    """The players' ids in the order of a coalition's bits."""
    if not settlement.plan or not trail.store.has(settlement.plan):
        return []
    return [player["id"] for player in trail.get_json(settlement.plan).get("players", [])]


def _column(trail: "Trail", settlement: Settlement, name: str) -> list[Any]:
    if not trail.store.has(settlement.table):
        return []
    table = trail.get_table(settlement.table)
    return table.column(name).to_pylist() if name in table.column_names else []


def _finding(settlement: Settlement, player: SettledPlayer) -> Finding:
    count = f"{settlement.num_coalitions} coalitions"
    return Finding(
        subject=player.name,
        measure=f"{settlement.adapter_name} with and without this {player.kind.replace('_', ' ')}: "
        f"{settlement.utility}, on {settlement.suite_name}; {count}",
        value=player.value,
        low=player.low,
        high=player.high,
        unit=unit_of(settlement),
        verdict=player.verdict,
        links=(settlement.leaf_hash,),
        confidence=settlement.confidence,
        tier="settle",
        kind=player.kind,
        p_value=player.p_value,
    )
