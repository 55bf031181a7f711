"""What the statement reads of rows and settlements: whose rows are, and whether values follow from coalitions."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest

from attribution.bodies import AdapterBody
from attribution.credit import RULE
from attribution.key_changes import revoke, rotate
from attribution.log.proved import VerifyError
from attribution.settlement import Settlement, settlement_of
from attribution.statement import Policy, StatementError
from configs.schema import CreditSettings
from pipelines.refine.read import load_refined
from pipelines.settled_values import check_values
from pipelines.statement import find_copies, registered_rows
from tests.attribution.credit_world import VALUES, CreditWorld, build_world, measured_settlement, player

POLICY = Policy.of(CreditSettings())


@pytest.fixture
def world(tmp_path: Path) -> CreditWorld:
    return build_world(tmp_path)


def test_values_follow_from_the_recorded_coalitions(world: CreditWorld) -> None:
    settlement = measured_settlement(world)
    assert "3 players' values and intervals follow from the 8 recorded" in check_values(world.trail, settlement)
    raised = replace(settlement.players[0], value=settlement.players[0].value + 0.01)
    with pytest.raises(VerifyError, match=rf"{raised.name}: recorded 0\.91\d+ .*, but 0\.90\d+ .* follows"):
        check_values(world.trail, replace(settlement, players=(raised, *settlement.players[1:])))
    with pytest.raises(VerifyError, match="missing"):
        check_values(world.trail, replace(settlement, players=settlement.players[1:]))
    rows = world.trail.get_table(settlement.table).to_pylist()
    with pytest.raises(VerifyError, match="which its seed draws, is not in its table"):
        table = world.trail.put_table(pyarrow.Table.from_pylist(rows[:-1]))
        check_values(world.trail, replace(settlement, table=table))
    rows[-1]["utilities"][0] += 5.0
    with pytest.raises(VerifyError, match="follows from the recorded coalitions"):
        check_values(world.trail, replace(settlement, table=world.trail.put_table(pyarrow.Table.from_pylist(rows))))
    with pytest.raises(VerifyError, match="the settings it was made under are not in this home"):
        check_values(world.trail, settlement_of(world.trail, world.settlement))


def test_a_settlement_by_another_rule_is_told_plainly(world: CreditWorld) -> None:
    settlement = measured_settlement(world)
    plan = world.trail.get_json(settlement.plan)

    def with_rule(rule: int) -> Settlement:
        return replace(settlement, plan=world.trail.put_json({**plan, "rule": rule}))

    assert check_values(world.trail, with_rule(RULE)) == check_values(world.trail, settlement)
    with pytest.raises(VerifyError, match=rf"by rule {RULE + 1} and this code has rule {RULE}; check its values with"):
        check_values(world.trail, with_rule(RULE + 1))
    raised = replace(settlement.players[0], value=settlement.players[0].value + 0.01)
    with pytest.raises(VerifyError, match="follows from the recorded coalitions; its plan does not say by which rule"):
        check_values(world.trail, replace(settlement, players=(raised, *settlement.players[1:])))


def test_a_dataset_that_labels_rows_for_another_is_refused(world: CreditWorld, tmp_path: Path) -> None:
    from benchmarks.abuse_traffic import relabelled_adapter

    digest = relabelled_adapter(world, "thief")
    entry = world.settle({"thief": (1.9, 1.8, 2.0)}, adapter=digest)
    with pytest.raises(
        StatementError, match=r"gives it to thief, but (mira|noor) registered it; refine and train again"
    ):
        find_copies(world.trail, [settlement_of(world.trail, entry)], POLICY)


def test_who_rotated_a_key_is_one_person(world: CreditWorld) -> None:
    rotate(world.trail, "mira")
    new = world.trail.keys.get("mira").key_id
    assert new != world.keys["mira"]
    players = tuple(player(new if name == "mira" else world.keys[name], name, *VALUES[name]) for name in VALUES)
    entry = world.settle({}, players=players)
    found = find_copies(world.trail, [settlement_of(world.trail, entry)], POLICY)
    assert [(line.player, line.owner) for line in found.copies] == [(world.keys["thief"], new)]
    assert {key[2] for key in found.num_rows} == {new, world.keys["noor"], world.keys["thief"]}
    assert {row.contributor for row in registered_rows(world.trail).values()} == set(world.keys.values())


def test_players_that_are_datasets_are_known_by_their_contributions(world: CreditWorld) -> None:
    leaves = {entry.record.body.name: entry.leaf_hash for entry in world.trail.entries(kind="dataset")}  # type: ignore[union-attr]
    players = tuple(replace(player(leaves[name], name, *VALUES[name]), kind="dataset") for name in VALUES)
    entry = world.settle({}, players=players, over="datasets")
    found = find_copies(world.trail, [settlement_of(world.trail, entry)], POLICY)
    assert [(line.kind, line.player, line.owner) for line in found.copies] == [
        ("dataset", leaves["thief"], leaves["mira"])
    ]
    assert isinstance(world.adapter.record.body, AdapterBody)  # type: ignore[union-attr]
    assert sum(found.num_rows.values()) == load_refined(world.trail, world.adapter.record.body.dataset).num_rows  # type: ignore[union-attr]


def test_rows_of_a_revoked_key_are_counted_as_withheld(world: CreditWorld) -> None:
    trail = world.trail
    (given,) = [entry for entry in trail.entries(kind="dataset") if entry.record.body.name == "noor"]  # type: ignore[union-attr]
    revoke(trail, "noor", reason="stolen", from_us=given.leaf.time_us)
    found = find_copies(trail, [settlement_of(trail, world.settlement)], POLICY)
    (line,) = found.withheld
    assert (line.kind, line.id, line.num_rows, line.records) == (
        "contributor", world.keys["noor"], 2, (given.leaf_hash,)
    )  # fmt: skip
    assert f"signed with key {world.keys['noor'][:16]}, revoked from" in line.reason and "(stolen)" in line.reason
    assert "noor" not in line.reason, "names stand in records that can be erased"
    assert {key[2] for key in found.num_rows} == {world.keys["mira"], world.keys["thief"]}
