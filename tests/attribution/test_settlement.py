"""A settlement and its record: read back as it was measured, whatever the number of players."""

import base64
import json
from dataclasses import replace

import pytest

from attribution.bodies import SettlementBody
from attribution.erasure import erase
from attribution.records import Party
from attribution.settlement import (
    MAX_PLAYERS_IN_RECORD,
    SettlementError,
    record_settlement,
    settlement_of,
    settlements,
)
from attribution.trail import Trail
from tests.attribution.records_example import ExampleLog, build_example_log, digest_of, settle

VALUES = {"Mira, lighthouses": (1.25, 0.75, 1.5), "Noise": (-0.125, -0.5, 0.25), "Copycat": (0.0, -0.1, 0.1)}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    folder = tmp_path_factory.mktemp("settlement")
    return build_example_log(Trail.open(folder / "home"), folder / "scratch")


def test_a_settlement_is_read_back_largest_value_first(log: ExampleLog) -> None:
    entry = settle(log, VALUES)
    (found,) = settlements(log.trail, digest_of(log.adapter))
    assert found == settlement_of(log.trail, entry)
    assert [(player.name, player.value, player.low, player.high) for player in found.players] == [
        (name, *VALUES[name]) for name in VALUES
    ]
    assert found.leaf_hash == entry.leaf_hash and found.num_coalitions == 32 and found.seed == 7
    assert settlements(log.trail, "sha256:" + "0" * 64) == []
    parents = {log.adapter.leaf_hash, log.base.leaf_hash, log.refinement.leaf_hash}
    assert parents <= set(entry.leaf.parents)
    assert entry.leaf.subjects[0].digest == digest_of(log.adapter)


def test_more_players_than_a_record_holds_are_kept_in_its_table(log: ExampleLog) -> None:
    (first,) = settlements(log.trail)[:1]
    crowd = tuple(
        replace(first.players[0], kind="rule", id=f"{number:064x}", name="ø" * 200, value=number / 7, low=number / 8)
        for number in range(3 * MAX_PLAYERS_IN_RECORD)
    )
    entry = record_settlement(log.trail, replace(first, players=crowd))
    assert entry.record is not None and isinstance(entry.record.body, SettlementBody)
    assert len(entry.record.body.players) == MAX_PLAYERS_IN_RECORD
    found = settlement_of(log.trail, entry)
    assert {player.id for player in found.players} == {player.id for player in crowd}
    values = log.trail.store.get_blob(entry.record.body.values)
    log.trail.store.delete(entry.record.body.values)
    with pytest.raises(SettlementError, match="table of 192 values"):
        settlement_of(log.trail, entry)
    log.trail.store.put_blob(values)


def test_a_settlement_rounds_its_claims_down(log: ExampleLog) -> None:
    (first,) = settlements(log.trail)[:1]
    fine = replace(first.players[0], low=0.00000149, high=0.00000151, p_value=1e-9)
    found = settlement_of(log.trail, record_settlement(log.trail, replace(first, players=(fine,))))
    assert (found.players[0].low, found.players[0].high, found.players[0].p_value) == (1e-6, 2e-6, 1e-6)


def test_a_name_that_was_erased_is_gone_from_settlements_too(log: ExampleLog) -> None:
    entry = settle(log, VALUES)
    assert entry.envelope is not None and b"lighthouses" not in base64.b64decode(json.loads(entry.envelope)["payload"])
    people = {player.id: player.name for player in settlement_of(log.trail, entry).players}
    assert set(people.values()) == set(VALUES)
    key = log.keys["Noise"].key_id
    erase(log.trail, [log.contributors["Noise"].leaf_hash], reason="asked", requester=Party(key, "contributor"))
    names = {player.id: player.name for player in settlement_of(log.trail, entry).players}
    assert names == {**people, key: key[:12]}


def test_what_cannot_be_settled_is_refused(log: ExampleLog) -> None:
    (first,) = settlements(log.trail)[:1]
    with pytest.raises(SettlementError, match="no players"):
        record_settlement(log.trail, replace(first, players=()))
    with pytest.raises(SettlementError, match="not in this log"):
        record_settlement(log.trail, replace(first, adapter="sha256:" + "0" * 64))
    with pytest.raises(SettlementError, match="no settlement"):
        settlement_of(log.trail, log.adapter)
