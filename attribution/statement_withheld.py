"""What a statement pays for and what it withholds: nothing that stands on a record signed with a revoked key is paid.

Rows so signed take their part of their player's value (`pipelines.statement` counts them). Any other such record behind
an adapter or its settlement takes all that the adapter would have paid.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attribution.bodies import BaseModelBody
from attribution.people import People
from attribution.settlement import Settlement, settlement_of, settlements
from attribution.statement import NO_ADAPTER, Maker, RequestLine, StatementError, Withheld
from attribution.trust_file import OPERATOR
from attribution.void_records import VoidRecord, void_behind, void_record

if TYPE_CHECKING:
    from attribution.trail import Trail


def counting_settlements(
    trail: "Trail", adapters: Sequence[str], chosen: Sequence[str]
) -> tuple[list[Settlement], list[Withheld]]:
    """Return one settlement for each adapter that has one that counts, and the adapters of which nothing does.

    The newest counts, or the one that is among `chosen` (leaf hashes).

    Raises:
        StatementError: one is chosen that counts for nothing, or is of another adapter.
    """
    people = People(trail)
    makers = {adapter: entry.leaf_hash for adapter in adapters if (entry := trail.find(adapter)) is not None}
    found = {adapter: _not_rows(void_behind(trail, [leaf], people)) for adapter, leaf in makers.items()}
    void = {adapter: items for adapter, items in found.items() if items}
    newest: dict[str, Settlement] = {}
    unsound: dict[str, list[VoidRecord]] = {}
    for settlement in settlements(trail):
        if settlement.adapter in adapters and settlement.adapter not in void:
            if items := _not_rows(void_behind(trail, [settlement.leaf_hash], people)):
                unsound[settlement.adapter] = items
            else:
                newest[settlement.adapter] = settlement
    for leaf in chosen:
        settlement = settlement_of(trail, trail.entry(trail.leaf_hash(leaf)))
        if settlement.adapter not in adapters:
            raise StatementError(f"settlement {leaf}: of adapter {settlement.adapter}, which answered no paid request")
        if items := _not_rows(void_behind(trail, [settlement.leaf_hash], people)):
            raise StatementError(f"settlement {leaf}: counts for nothing\n" + "\n".join(item.told for item in items))
        newest[settlement.adapter] = settlement
    used = [newest[adapter] for adapter in adapters if adapter in newest]
    void |= {adapter: items for adapter, items in unsound.items() if adapter not in newest}
    return used, [_all_of(adapter, void[adapter]) for adapter in sorted(void)]


def void_datasets(trail: "Trail", used: Sequence[Settlement], told: Sequence[Withheld]) -> list[Withheld]:
    """Return the datasets behind settlements that count for nothing and of which `told` says nothing, row by row."""
    people, known = People(trail), {leaf for item in told for leaf in item.records}
    found = ((settlement, void_behind(trail, [settlement.leaf_hash], people)) for settlement in used)
    return [
        Withheld(settlement.adapter, "dataset", item.entry.leaf_hash, 0, (item.entry.leaf_hash,), item.why)
        for settlement, items in found
        for item in items
        if item.entry.leaf_hash not in known
    ]


def makers_of(trail: "Trail", requests: Sequence[RequestLine]) -> tuple[tuple[Maker, ...], list[Withheld]]:
    """Return who trained the adapters and who made the bases that answered, and the bases whose record counts not."""
    makers, withheld, people = [], [], People(trail)
    for adapter in sorted({line.adapter for line in requests if not line.problem} - {NO_ADAPTER}):
        entry = trail.find(adapter)
        if entry is not None and entry.record is not None:
            key_id = next(iter(entry.record.contributors), None)
            trainer = key_id.key_id if key_id is not None else trail.keys.get(OPERATOR).key_id
            makers.append(Maker("adapter", adapter, trainer))
    for base in sorted({line.base for line in requests if not line.problem}):
        entry = trail.find(base)
        if entry is None or entry.record is None or not isinstance(entry.record.body, BaseModelBody):
            continue
        if (void := void_record(people, entry)) is None:
            makers.append(Maker("base", base, base))
        else:
            withheld.append(Withheld(NO_ADAPTER, "base_model", base, 0, (entry.leaf_hash,), _reason(void)))
    return tuple(makers), withheld


def _not_rows(items: Sequence[VoidRecord]) -> list[VoidRecord]:
    return [item for item in items if item.entry.leaf.kind != "dataset"]


def _all_of(adapter: str, items: Sequence[VoidRecord]) -> Withheld:
    return Withheld(adapter, "adapter", adapter, 0, tuple(item.entry.leaf_hash for item in items), _reason(items[0]))


def _reason(item: VoidRecord) -> str:
    return f"the {item.entry.leaf.kind} record {item.entry.leaf_hash[:12]} is {item.why}"
