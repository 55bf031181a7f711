"""Statements made from a real log: who is paid, what is listed, and that nothing altered passes."""

import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from attribution.canonical import canonical_json
from attribution.erasure import ErasureError, erase
from attribution.log.proved import VerifyError
from attribution.log.trust import Trust
from attribution.records import Party
from attribution.settlement import Settlement
from attribution.statement import NO_ADAPTER, PayoutLine, Statement, StatementError
from attribution.statement_make import Period, make_statement, read_statement
from attribution.statement_names import names_of
from attribution.statement_recheck import recheck
from attribution.statement_verify import check_home, statement_bundle, verify_statement
from attribution.trail import Entry, Trail
from configs.schema import CreditSettings
from pipelines.erase import erase as erase_rows
from pipelines.erase import plan
from pipelines.statement import find_copies
from tests.attribution.credit_world import PERIOD, SECOND_US, START_US, VALUES, CreditWorld, answer, build_world


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> CreditWorld:
    return build_world(tmp_path_factory.mktemp("credit"))


@pytest.fixture
def world(tmp_path: Path) -> CreditWorld:
    return build_world(tmp_path / "world")


@pytest.fixture(scope="module")
def entry(built: CreditWorld) -> Entry:
    return make(built)


@pytest.fixture(scope="module")
def bundle(built: CreditWorld, entry: Entry) -> dict[str, Any]:
    return statement_bundle(built.trail, entry)


def make(world: CreditWorld, file: Path | None = None, period: Period = PERIOD, **settings: Any) -> Entry:
    return make_statement(
        world.trail,
        file or world.fees(),
        period,
        settings=CreditSettings(**settings),
        find_copies=partial(find_copies, world.trail),
    )


def amounts(world: CreditWorld, statement: Statement) -> dict[str, int]:
    return {name: line.amount for name, line in data_lines(world, statement).items()}


def data_lines(world: CreditWorld, statement: Statement) -> dict[str, PayoutLine]:
    """The payouts to contributors, by name."""
    names = names_of(world.trail, statement)
    return {names[line.id]: line for line in statement.payouts if line.source == "data"}


def test_fees_go_to_base_trainer_data_and_platform_and_sum(built: CreditWorld, entry: Entry) -> None:
    statement = read_statement(built.trail, entry)
    assert {line.problem for line in statement.requests} == {""}
    totals = statement.totals
    # 6 requests of 1,000: a tenth each for platform and base; the base's own answer leaves 800 to nobody.
    assert (totals.table, totals.fees, totals.platform, totals.base, totals.adapter) == (6000, 6000, 600, 600, 1000)
    assert totals.data + totals.unattributed == 6000 - 2200
    # The gain is 2.0; noor's value 0.9 of it; mira's 0.4 and the 0.4 that her copied rows were measured at.
    assert amounts(built, statement) == {"mira": 3000 * 8 // 20, "noor": 3000 * 9 // 20, "thief": 0}
    names = names_of(built.trail, statement)
    fixed = {
        (line.source, line.kind, names[line.id]): line.amount for line in statement.payouts if line.source != "data"
    }
    assert fixed == {("adapter", "trainer", "operator"): 1000, ("base", "base_model", "tiny (tests)"): 600}
    alone = next(pool for pool in statement.pools if pool.adapter == NO_ADAPTER)
    assert (alone.unattributed, alone.reason) == (800, "the base answered alone")


def test_the_thief_gets_nothing_and_the_owner_all_of_it(built: CreditWorld, entry: Entry) -> None:
    statement = read_statement(built.trail, entry)
    assert [(line.player, line.owner, line.num_copies) for line in statement.copies] == [
        (built.keys["thief"], built.keys["mira"], 2)
    ]
    assert [cluster.contributors for cluster in statement.clusters] == [(built.keys["mira"], built.keys["thief"])] * 2
    lines = data_lines(built, statement)
    assert (lines["thief"].verdict, lines["thief"].amount, lines["thief"].value) == ("later copy", 0, 0)
    assert lines["mira"].moved == 400_000 and lines["mira"].value == 800_000
    assert lines["mira"].value - lines["mira"].low == 141_422  # two half-widths of 100,000 in quadrature
    blind = read_statement(built.trail, make_again(built, near_duplicates="skeleton", confidence=0.8))
    assert amounts(built, blind)["thief"] == 0  # look-alikes are seen by the least of the methods


def make_again(world: CreditWorld, **settings: Any) -> Entry:
    """A statement over receipts of its own, later."""
    start = sum(1 for _ in world.trail.entries(kind="completions")) * 1000
    ids = answer(world, [world.digest] * 2, start=start)
    file = world.fees([(name, "team", 500) for name in ids], name=f"again-{start}.csv")
    return make(world, file, Period(START_US, START_US + (start + 10) * SECOND_US), **settings)


def test_what_may_not_be_paid_is_listed_with_its_reason(world: CreditWorld) -> None:
    ids = world.request_ids
    late = answer(world, [world.digest], start=500)[0]
    rows = [
        (ids[0], "a", 100),
        (ids[0], "a", 100),
        (ids[1], "a", 100),
        (ids[1], "b", 100),
        ("rcpt_nobody", "a", 100),
        (late, "a", 100),
        (ids[2], "a", 0),
    ]
    first = read_statement(world.trail, make(world, world.fees(rows)))
    assert [line.problem for line in first.requests] == [
        "", "duplicate", "conflict", "conflict", "unknown", "outside the period", ""
    ]  # fmt: skip
    assert (first.totals.table, first.totals.fees, first.totals.listed) == (600, 100, 500)
    with pytest.raises(StatementError, match=r"nothing in it can be paid in this period \(paid before\)"):
        make(world, world.fees(rows[:1]))
    again = read_statement(world.trail, make(world, world.fees([*rows[:1], (ids[3], "a", 7)])))
    assert [line.problem for line in again.requests] == ["paid before", ""]


def test_a_statement_stays_so_that_nothing_is_paid_twice(world: CreditWorld) -> None:
    entry = make(world, world.fees([(world.request_ids[0], "a", 100)]))
    operator = Party(world.trail.keys.get("operator").key_id, "operator")
    with pytest.raises(ErasureError, match="which receipts were paid"):
        erase(world.trail, [entry.leaf_hash], reason="tidy", requester=operator)


def test_the_order_of_the_fee_table_pays_nobody_more(world: CreditWorld, tmp_path: Path) -> None:
    rows = [(name, "team", 100 + number) for number, name in enumerate(world.request_ids)]
    other = build_world(tmp_path / "other")
    one = read_statement(world.trail, make(world, world.fees(rows)))
    two = read_statement(other.trail, make(other, other.fees(rows[::-1])))
    assert one.totals == two.totals and amounts(world, one) == amounts(other, two)


def test_an_adapter_without_settlement_or_gain_pays_no_data(world: CreditWorld) -> None:
    other = world.trail.store.put_blob(b"another adapter")
    ids = answer(world, [other], start=50)
    statement = read_statement(world.trail, make(world, world.fees([(ids[0], "a", 1000)])))
    (pool,) = statement.pools
    assert (pool.unattributed, pool.data_paid, pool.reason) == (
        800,
        0,
        "the adapter is not settled; `trailmark settle` measures it",
    )
    world.settle(VALUES, full_value=-4.5)
    statement = read_statement(world.trail, make(world))
    assert (statement.totals.data, statement.totals.adapter) == (0, 0)
    assert statement.pools[1].reason == "the adapter was measured to gain nothing on its suite"


def test_a_settlement_of_less_confidence_than_the_policy_is_refused(world: CreditWorld) -> None:
    with pytest.raises(StatementError, match=r"hold at 90%, under credit\.confidence = 95%; settle again"):
        make(world, confidence=0.95)


def test_an_older_settlement_can_be_chosen(world: CreditWorld) -> None:
    world.settle({"mira": (1.0, 0.9, 1.1)})
    chosen = make_statement(
        world.trail,
        world.fees(),
        PERIOD,
        settings=CreditSettings(),
        find_copies=partial(find_copies, world.trail),
        chosen=[world.settlement.leaf_hash],
    )
    assert read_statement(world.trail, chosen).settlements[0].leaf == world.settlement.leaf_hash


def test_a_statement_verifies_offline_and_against_its_home(
    built: CreditWorld, entry: Entry, bundle: dict[str, Any]
) -> None:
    verified, statement = verify_statement(json.dumps(bundle).encode(), trust=built.trust)
    assert verified.kind == "statement"
    assert any(check.startswith("sums: 6000 in fees = 600 platform") for check in verified.checks)
    checks = check_home(built.trail, statement, partial(find_copies, built.trail), leaf_hash=entry.leaf_hash)
    assert checks[0].startswith("receipts: 6 rows")


TAMPERED = [
    (("payouts", 3, "amount"), 1201, r"lines: payouts\[3\] \(mira\): amount is 1201, but 1200 follows"),
    (("payouts", 4, "amount"), 5, r"payouts\[4\] \(thief\): amount is 5, but 0"),
    (("payouts", 2, "verdict"), "negative", r"payouts\[2\] \(noor\): verdict"),
    (("requests", 1, "data_part"), 601, r"requests\[1\] \(rcpt_0+1\): data_part is 601, but 600"),
    (("requests", 1, "fee"), 2000, r"requests\[1\] \(rcpt_0+1\): platform_part is 100, but 200"),
    (("requests", 5, "problem"), "unknown", r"requests\[5\]"),
    (("pools", 0, "unattributed"), 0, r"pools\[0\].*unattributed is 0, but 800"),
    (("totals", "platform"), 0, "totals: platform is 0, but 600"),
    (("settlements", 0, "players", 0, "value"), 10, r"payouts\[2\] \(noor\)"),
    (("copies", 0, "num_copies"), 0, r"payouts\[\d\] \("),
    (("seed",), 8, "digest: the statement's digest is"),
    (("notes",), [], "digest"),
    (("fee_table", "digest"), "sha256:" + "0" * 64, "digest"),
    (("clusters", 0, "row_ids"), ["a", "b"], "digest"),
    (("period_end_us",), START_US + 1, r"line 3: request rcpt_0+1 is of another time"),
    (("makers", 0, "id"), "f" * 64, r"payouts\[0\].*id is '[0-9a-f]+', but 'f+'"),
    (("v",), 2, "version 2 is unknown"),
    (("unit",), 3, "unit = 3: must be str"),
]


@pytest.mark.parametrize(("path", "value", "reason"), TAMPERED)
def test_an_altered_statement_is_refused_and_the_line_named(
    built: CreditWorld, bundle: dict[str, Any], path: tuple[Any, ...], value: Any, reason: str
) -> None:
    altered = copy.deepcopy(bundle)
    place: Any = altered["statement"]
    for step in path[:-1]:
        place = place[step]
    assert place[path[-1]] != value
    place[path[-1]] = value
    with pytest.raises(VerifyError, match=reason):
        verify_statement(json.dumps(altered).encode(), trust=built.trust)


def test_a_line_taken_out_or_another_record_is_refused(
    built: CreditWorld, bundle: dict[str, Any], entry: Entry
) -> None:
    short = copy.deepcopy(bundle)
    short["statement"]["payouts"].pop()
    with pytest.raises(VerifyError, match="payouts: 4 lines stand there, 5 follow"):
        verify_statement(json.dumps(short).encode(), trust=built.trust)
    forged = copy.deepcopy(bundle)
    forged["record"]["envelope"]["signatures"][0]["sig"] = "AA=="
    with pytest.raises(VerifyError):
        verify_statement(json.dumps(forged).encode(), trust=built.trust)
    other = {**bundle, "statement": statement_bundle(built.trail, make_again(built))["statement"]}
    with pytest.raises(VerifyError, match="period is not the signed record's"):
        verify_statement(json.dumps(other).encode(), trust=built.trust)
    for text in (b"", b"{}", b"[1]", json.dumps(bundle["record"]).encode()):
        with pytest.raises(VerifyError, match="file"):
            verify_statement(text, trust=built.trust)


def test_an_erasure_since_is_named_and_what_still_holds(world: CreditWorld) -> None:
    entry = make(world)
    trail, statement, find = world.trail, read_statement(world.trail, entry), partial(find_copies, world.trail)
    assert check_home(trail, statement, find, leaf_hash=entry.leaf_hash)
    erase_rows(trail, plan(trail, "noor"), reason="left")
    with pytest.raises(
        VerifyError, match=r"num_rows is 2, but 0 .*; but \d erasures were recorded after .* still be ver"
    ):
        check_home(trail, statement, find, leaf_hash=entry.leaf_hash)
    bundle = json.dumps(statement_bundle(trail, entry)).encode()
    assert verify_statement(bundle, trust=Trust.load(trail.home / "trust.json"))[1] == statement


def test_the_home_contradicts_what_the_operator_made_up(built: CreditWorld, entry: Entry) -> None:
    """A statement computed from other receipts, settlements or clusters than the log's adds up, and is found out."""
    honest = read_statement(built.trail, entry)
    inputs = [
        (replace(honest, requests=(replace(honest.requests[0], payer="x"), *honest.requests[1:])), "requests"),
        (replace(honest, copies=()), "copies"),
        (replace(honest, clusters=()), "clusters"),
        (
            replace(honest, settlements=(replace(honest.settlements[0], full_value=0),)),
            r"settlements\[0\].*full_value is 0, but -2000000",
        ),
    ]
    for made_up, reason in inputs:
        with pytest.raises(VerifyError, match=reason):
            check_home(built.trail, made_up, partial(find_copies, built.trail), leaf_hash=entry.leaf_hash)


@dataclass(frozen=True)
class Rechecked:
    """As `pipelines.settle.recheck` returns them."""

    coalition: str
    item: str
    recorded: float
    measured: float
    tolerance: float


def test_random_cells_are_measured_again(built: CreditWorld, entry: Entry) -> None:
    statement = read_statement(built.trail, entry)
    asked: list[tuple[str, int, int]] = []

    def again(trail: Trail, settlement: Settlement, *, num_cells: int, seed: int, off: float = 1e-5) -> list[Rechecked]:
        asked.append((settlement.leaf_hash, num_cells, seed))
        return [Rechecked("101", f"q{n}", -1.0, -1.0 + off * n, 5e-4) for n in range(num_cells)]

    found = recheck(built.trail, statement, again, num_cells=4, seed=3)
    assert asked == [(built.settlement.leaf_hash, 4, 3)]
    assert (found.seed, found.num_cells, found.worst.item) == (3, 4, "q3")
    assert found.largest_difference == pytest.approx(3e-5)
    drawn = {recheck(built.trail, statement, again, num_cells=1, seed=None).seed for _ in range(4)}
    assert len(drawn) == 4  # nobody can prepare for them
    with pytest.raises(VerifyError, match=r"recheck: settlement [0-9a-f]{16}, coalition 101, item q3: recorded -1\.0"):
        recheck(built.trail, statement, partial(again, off=1e-3), num_cells=4, seed=3)
    with pytest.raises(StatementError, match="no settlement stands behind"):
        recheck(built.trail, replace(statement, settlements=()), again, num_cells=1, seed=3)


def test_the_record_names_the_bytes_of_the_statement(built: CreditWorld, entry: Entry, bundle: dict[str, Any]) -> None:
    assert entry.record is not None
    assert built.trail.store.get_blob(entry.record.body.table) == canonical_json(bundle["statement"])  # type: ignore[union-attr]
    assert built.settlement.leaf_hash in entry.leaf.parents
