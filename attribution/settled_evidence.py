"""What settlements say to the five questions."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attribution.answers import Cost, Finding, Missing
from attribution.settlement import SettledPlayer, Settlement, settlements

if TYPE_CHECKING:
    from attribution.trail import Trail

NO_SETTLEMENT = Missing(
    "cause: which part made the difference was not measured by leaving parts out",
    "trailmark settle ADAPTER --suite SUITE.jsonl trains coalitions again and prints the budget first",
)
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


def settled_cost(found: Sequence[Settlement]) -> tuple[Cost, ...]:
    """Return what the settlements took: coalitions trained, cells measured."""
    if not found:
        return ()
    return (
        Cost("coalitions trained and measured for the settlements", sum(one.num_coalitions for one in found), "runs"),
        Cost("items asked of them", sum(one.num_cells for one in found), "cells"),
    )


def settled_details(found: Sequence[Settlement]) -> list[dict[str, Any]]:
    """Return the settlements as plain values."""
    return [asdict(one) for one in found]


def _finding(settlement: Settlement, player: SettledPlayer) -> Finding:
    count = f"{settlement.num_coalitions} coalitions"
    return Finding(
        subject=player.name,
        measure=f"{settlement.adapter_name} with and without this {player.kind.replace('_', ' ')}, "
        f"{settlement.utility} on {settlement.suite_name}, {count}",
        value=player.value,
        low=player.low,
        high=player.high,
        unit=settlement.utility,
        verdict=player.verdict,
        links=(settlement.leaf_hash,),
        confidence=settlement.confidence,
        tier="settle",
        kind=player.kind,
        p_value=player.p_value,
    )
