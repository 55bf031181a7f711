"""Statements after a key was revoked: its share goes to nobody, with the reason, and the statement still verifies."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attribution.key_changes import revoke, rotate
from attribution.log.proved import VerifyError
from attribution.statement import Statement, StatementError
from attribution.statement_export import export_text
from attribution.statement_make import make_statement, read_statement
from attribution.statement_names import names_of
from attribution.statement_verify import check_home, statement_bundle, verify_statement
from attribution.trail import Entry, now_us
from cluster import cli
from configs.schema import CreditSettings
from pipelines.statement import find_copies
from tests.attribution.credit_world import PERIOD, VALUES, CreditWorld, answer, build_world, player

HONEST = {"mira": 1200, "noor": 1350, "thief": 0}


@pytest.fixture
def world(tmp_path: Path) -> CreditWorld:
    return build_world(tmp_path / "world")


def make(world: CreditWorld, file: Path | None = None, *, chosen: tuple[str, ...] = ()) -> Entry:
    find = partial(find_copies, world.trail)
    fees = file or world.fees()
    return make_statement(world.trail, fees, PERIOD, settings=CreditSettings(), find_copies=find, chosen=chosen)


def amounts(world: CreditWorld, statement: Statement) -> dict[str, int]:
    names = names_of(world.trail, statement)
    return {names[line.id]: line.amount for line in statement.payouts if line.source == "data"}


def revoke_rows(world: CreditWorld, name: str) -> Entry:
    (given,) = [entry for entry in world.trail.entries(kind="dataset") if entry.record.body.name == name]  # type: ignore[union-attr]
    revoke(world.trail, name, reason="laptop stolen", from_us=given.leaf.time_us)
    return given


def verify(world: CreditWorld, entry: Entry) -> list[str]:
    data = json.dumps(statement_bundle(world.trail, entry)).encode()
    verified, statement = verify_statement(data, trust=world.trust)
    check_home(world.trail, statement, partial(find_copies, world.trail), leaf_hash=entry.leaf_hash)
    return verified.checks


def test_rotated_keys_change_nothing(world: CreditWorld) -> None:
    for name in ("mira", "noor", "operator", "log"):
        rotate(world.trail, name)
    entry = make(world)
    statement = read_statement(world.trail, entry)
    assert amounts(world, statement) == HONEST and statement.withheld == ()
    assert "withheld" not in statement_bundle(world.trail, entry)["statement"], "the form that older programs read"
    assert verify(world, entry)


def test_a_revoked_contributors_share_is_unattributed_with_the_reason(world: CreditWorld) -> None:
    before = read_statement(world.trail, make(world, world.fees([(world.request_ids[0], "team", 1000)])))
    given = revoke_rows(world, "noor")
    entry = make(world, world.fees([(request, "team", 1000) for request in world.request_ids[1:]]))
    statement = read_statement(world.trail, entry)
    assert amounts(world, before) == {name: amount // 5 for name, amount in HONEST.items()}
    assert amounts(world, statement) == {"mira": 960, "noor": 0, "thief": 0}, "the others get what they would have"
    (verdict,) = [line.verdict for line in statement.payouts if line.id == world.keys["noor"]]
    assert verdict == "revoked key"
    pool = next(pool for pool in statement.pools if pool.adapter)
    assert pool.unattributed == 2400 - 960
    (line,) = statement.withheld
    assert (line.kind, line.id, line.num_rows, line.records) == (
        "contributor", world.keys["noor"], 2, (given.leaf_hash,)
    )  # fmt: skip
    assert "withheld: nothing is paid for 1 records signed with a revoked key" in verify(world, entry)
    page = export_text(world.trail, entry, "html")
    assert "Withheld" in page and "laptop stolen" in page
    assert "revoked key" in export_text(world.trail, entry, "csv")


def test_the_reason_is_printed(world: CreditWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    revoke_rows(world, "noor")
    make(world)
    monkeypatch.setenv("TRAILMARK_HOME", str(world.trail.home))
    shown = CliRunner().invoke(cli.app, ["statement", "show"])
    told = " ".join(shown.output.split())
    assert "withheld from contributor noor, 2 rows: signed with key" in told and "(laptop stolen)" in told, shown.output


def test_a_statement_that_says_nothing_of_it_does_not_verify(world: CreditWorld) -> None:
    """One from before the revocation pays for it; one from after lists it. Neither can be made the other."""
    earlier = make(world, world.fees([(world.request_ids[0], "team", 1000)]))
    revoke_rows(world, "noor")
    with pytest.raises(VerifyError, match="laptop stolen"):
        verify(world, earlier)
    bundle: dict[str, Any] = statement_bundle(world.trail, make(world))
    silent = copy.deepcopy(bundle)
    del silent["statement"]["withheld"]
    few = copy.deepcopy(bundle)
    few["statement"]["withheld"][0]["num_rows"] = 1
    for altered, check in ((silent, "revoked key"), (few, "digest")):
        with pytest.raises(VerifyError) as caught:
            verify_statement(json.dumps(altered).encode(), trust=world.trust)
        assert caught.value.check == check


def test_a_dataset_of_which_the_adapter_learnt_nothing_is_named_too(world: CreditWorld) -> None:
    """Players are rules here, so no player's rows are withheld; the lineage has the revoked record all the same."""
    rule = replace(player("length", "length", *VALUES["mira"]), kind="rule")
    world.settle({}, players=(rule,), over="rules")
    given = revoke_rows(world, "noor")
    entry = make(world)
    (line,) = read_statement(world.trail, entry).withheld
    assert (line.kind, line.id, line.num_rows) == ("dataset", given.leaf_hash, 0)
    assert verify(world, entry)


def test_an_adapter_of_a_revoked_operator_pays_neither_trainer_nor_data(world: CreditWorld) -> None:
    trail = world.trail
    revoke(trail, "operator", reason="leaked", from_us=world.adapter.leaf.time_us)
    with pytest.raises(StatementError, match=r"nothing in it can be paid in this period \(revoked key\)"):
        make(world)
    ids = answer(world, [world.digest, None], start=50)
    entry = make(world, world.fees([(name, "team", 1000) for name in ids]))
    statement = read_statement(trail, entry)
    assert (statement.totals.adapter, statement.totals.data, statement.totals.base) == (0, 0, 200)
    (line,) = statement.withheld
    assert (line.kind, line.id, line.records) == ("adapter", world.digest, (world.adapter.leaf_hash,))
    pool = next(pool for pool in statement.pools if pool.adapter)
    assert pool.reason == line.reason and "the adapter record" in pool.reason and "(leaked)" in pool.reason
    assert verify(world, entry)


def test_a_revoked_base_pays_nobody_and_says_so(world: CreditWorld) -> None:
    base = world.trail.find(world.base)
    assert base is not None
    revoke(world.trail, "operator", reason="leaked", from_us=base.leaf.time_us)
    ids = answer(world, [None], start=50)
    entry = make(world, world.fees([(ids[0], "team", 1000)]))
    statement = read_statement(world.trail, entry)
    assert (statement.totals.base, statement.totals.unattributed) == (0, 900)
    (line,) = statement.withheld
    assert (line.kind, line.id) == ("base_model", world.base) and "(leaked)" in line.reason
    assert verify(world, entry)


def test_only_a_settlement_that_counts_is_used(world: CreditWorld) -> None:
    trail, stolen_us = world.trail, now_us()
    late = world.settle({"thief": (1.9, 1.8, 2.0)})
    revoke(trail, "operator", reason="leaked", from_us=stolen_us)
    ids = answer(world, [world.digest], start=50)
    fees = world.fees([(ids[0], "team", 1000)])
    with pytest.raises(StatementError, match=r"counts for nothing\nsettlement .* of operator: signed with key"):
        make(world, fees, chosen=(late.leaf_hash,))
    entry = make(world, fees)
    statement = read_statement(trail, entry)
    assert statement.settlements[0].leaf == world.settlement.leaf_hash and statement.withheld == ()
    assert amounts(world, statement) == {name: amount // 5 for name, amount in HONEST.items()}
    assert verify(world, entry)
