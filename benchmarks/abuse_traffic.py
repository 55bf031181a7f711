"""Attacks on the traffic and the trail rather than on the training: replayed receipts, self-dealing, relabelled rows.

They are tried on a home with signed contributions, receipts and a fee table, through the code that makes statements.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from attribution.bodies import AdapterBody
from attribution.records import Artefact
from attribution.statement import Statement, StatementError
from attribution.statement_make import Period, make_statement, read_statement
from configs.schema import CreditSettings
from pipelines.contribute import contribute
from pipelines.refine.table import DECISIONS_FILE, REFINED, ROWS_FILE, SUMMARY_FILE, write_table
from pipelines.statement import find_copies
from tests.attribution.credit_world import SECOND_US, START_US, CreditWorld, answer, build_world

FEE = 1000
ATTACKER = "noor"  # the contributor who is paid most, so that self-dealing pays best
FOREVER = Period(START_US, START_US + 10_000_000 * SECOND_US)


def traffic_gains(folder: Path) -> dict[str, float]:
    """Return each attack's gain in per cent of the data part of what it sends or takes."""
    world = build_world(folder)
    _statement(world, world.request_ids, payer="team")
    return {
        "replay of receipts": replay(world),
        "self-dealing traffic": self_deal(world),
        "relabelling, registered again": register_again(world),
        "relabelling, the dataset's column": relabel(world),
    }


def replay(world: CreditWorld) -> float:
    """Bring one new receipt three times, with all that an earlier statement paid for: what is paid beyond once."""
    (fresh,) = answer(world, [world.digest], start=1000)
    statement = _statement(world, [*world.request_ids, fresh, fresh, fresh], payer="team")
    assert statement.totals.table == FEE * (len(world.request_ids) + 3)
    once = next(line.data_part for line in statement.requests if not line.problem)
    return 100 * (sum(line.data_part for line in statement.requests) - once) / once


def self_deal(world: CreditWorld) -> float:
    """Pay for requests to one's own rows: what comes back less what was paid, against the data part of it."""
    ids = answer(world, [world.digest] * 50, start=2000)
    statement = _statement(world, ids, payer=ATTACKER)
    back = _received(statement, world.keys[ATTACKER])
    return 100 * (back - FEE * len(ids)) / sum(line.data_part for line in statement.requests)


def register_again(world: CreditWorld) -> float:
    """Register the best paid person's very file under another name, later: what that name is paid then."""
    contribute(world.trail, world.folder / f"{ATTACKER}.jsonl", contributor="thief", licence="CC0-1.0")
    ids = answer(world, [world.digest] * 10, start=3000)
    statement = _statement(world, ids, payer="team")
    return 100 * _received(statement, world.keys["thief"]) / sum(line.data_part for line in statement.requests)


def relabel(world: CreditWorld) -> float:
    """Train on a dataset whose contributor column gives all rows to the thief: what a statement pays the thief."""
    digest = relabelled_adapter(world, "thief")
    world.settle({"thief": (1.9, 1.8, 2.0)}, adapter=digest)
    ids = answer(world, [digest] * 10, start=4000)
    try:
        statement = _statement(world, ids, payer="team")
    except StatementError:  # refused, naming the row and who registered it
        return 0.0
    return 100 * _received(statement, world.keys["thief"]) / sum(line.data_part for line in statement.requests)


def relabelled_adapter(world: CreditWorld, name: str) -> str:
    """Record an adapter of the world's dataset with every row said to be of `name`; return its digest."""
    body = world.adapter.record.body if world.adapter.record is not None else None
    assert isinstance(body, AdapterBody)
    folder = world.trail.store.get_directory(body.dataset)
    rows = pq.read_table(folder / ROWS_FILE)
    column = pyarrow.array([world.keys[name]] * rows.num_rows)
    relabelled = rows.set_column(rows.schema.get_field_index("contributor"), "contributor", column)
    with tempfile.TemporaryDirectory() as scratch:
        for file in (DECISIONS_FILE, SUMMARY_FILE):
            (Path(scratch) / file).write_bytes((folder / file).read_bytes())
        write_table(Path(scratch) / ROWS_FILE, REFINED, [relabelled])
        dataset = world.trail.store.put_directory(Path(scratch), kind="refined", meta={"num_rows": rows.num_rows})
    adapter = Artefact("adapter", "facts", world.trail.store.put_blob(b"adapter of relabelled rows"))
    base = Artefact("base_model", "tiny", body.base)
    world.trail.record("adapter", replace(body, dataset=dataset), inputs=[base], outputs=[adapter])
    return adapter.digest


def _received(statement: Statement, party: str) -> int:
    return sum(line.amount for line in statement.payouts if line.source == "data" and line.id == party)


def _statement(world: CreditWorld, ids: Sequence[str], *, payer: str) -> Statement:
    file = world.fees([(name, payer, FEE) for name in ids], name=f"fees-{len(list(world.folder.iterdir()))}.csv")
    copies = partial(find_copies, world.trail)
    entry = make_statement(world.trail, file, FOREVER, settings=CreditSettings(), find_copies=copies)
    return read_statement(world.trail, entry)
