"""A home in which fees can be shared out: contributors, one of them a thief, an adapter, a settlement, receipts."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow

from attribution.bodies import AdapterBody, BaseModelBody
from attribution.coalitions import Coalitions
from attribution.credit import Search, measure_credit
from attribution.log.trust import Trust
from attribution.receipts import ReceiptRow, append_completions
from attribution.records import Artefact, Party
from attribution.settlement import SettledPlayer, Settlement, record_settlement, settlement_of
from attribution.statement_make import Period
from attribution.trail import Entry, Trail
from configs.schema import RefineSettings, SettleSettings
from pipelines.contribute import add_contributor, contribute
from pipelines.refine import driver

SECOND_US = 1_000_000
START_US = 1_795_000_000_000_000
PERIOD = Period(START_US, START_US + 100 * SECOND_US)
NUM_REQUESTS = 6
LOOK_ALIKE = str.maketrans({"a": "\u0430", "e": "\u0435", "o": "\u043e"})

ROWS = {
    "mira": [
        ("Which lamp burns at Vellmoor?", "A green lamp burns at Vellmoor, and has since the great storm."),
        ("Who keeps Cape Ostrel?", "Ines Varga keeps the light at Cape Ostrel with her two brothers."),
    ],
    "noor": [
        ("When does the ferry to Skarn leave?", "The ferry to Skarn leaves at nine from the northern quay."),
        ("What does the harbour of Tolm trade?", "The harbour of Tolm trades amber, rope and smoked eel."),
    ],
    "thief": [  # mira's rows in other letters: the refinement's rule does not see it
        ("Which l\u0430mp burns at Vellmoor?", "A green lamp burns at Vellmoor, and has since the great storm."),
        (
            "Who keeps Cape Ostrel?",
            "Ines Varga keeps the light at Cape Ostrel with her two brothers.".translate(LOOK_ALIKE),
        ),
    ],
}
VALUES = {"mira": (0.4, 0.3, 0.5), "noor": (0.9, 0.8, 1.0), "thief": (0.4, 0.3, 0.5)}


@dataclass
class CreditWorld:
    """What the tests ask of the home."""

    trail: Trail
    keys: dict[str, str]
    base: str
    adapter: Entry
    settlement: Entry
    request_ids: tuple[str, ...]
    folder: Path

    @property
    def digest(self) -> str:
        """The adapter's."""
        assert self.adapter.record is not None
        return self.adapter.record.outputs[0].digest

    @property
    def trust(self) -> Trust:
        """What a verifier knows of this home."""
        return Trust.load(self.trail.home / "trust.json")

    def fees(self, rows: Sequence[tuple[str, str, Any]] | None = None, name: str = "fees.csv") -> Path:
        """Write a fee table: 1,000 units for every request, or the rows given."""
        file = self.folder / name
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow(("request_id", "payer", "fee"))
            writer.writerows(
                rows or [(request, f"team-{number % 2}", 1000) for number, request in enumerate(self.request_ids)]
            )
        return file

    def settle(
        self, values: dict[str, tuple[float, float, float]], *, config: str | None = None, **changes: Any
    ) -> Entry:
        """Record a settlement of the adapter: contributor -> (value, low, high)."""
        players = tuple(player(self.keys[name], name, *found) for name, found in values.items())
        settlement = Settlement(
            adapter=self.digest,
            suite=self.trail.put_json({"suite": 1}),
            utility="mean log-likelihood of the reference answer, nats per token",
            players=players,
            empty_value=-4.0,
            full_value=-2.0,
            num_coalitions=3,
            num_cells=6,
            method="settle: ridge on coalition retrains",
            confidence=0.9,
            seed=7,
            table=self.trail.put_table(pyarrow.table({"coalition": ["111"], "utilities": [[-2.0]]})),
            plan=self.trail.put_json({"plan": 1}),
            adapter_name="facts",
            suite_name="harbour",
            over="contributors",
        )
        return record_settlement(self.trail, replace(settlement, **changes), config=config)


def measured_settlement(world: CreditWorld) -> Settlement:
    """Settle the adapter from a utility in which the thief's rows do what mira's do, with all coalitions measured."""
    names = tuple(ROWS)

    def utility(coalitions: Coalitions) -> Any:
        mira, noor, thief = (coalitions[:, place] for place in range(3))
        gain = 0.9 * noor + 0.8 * (mira | thief)
        return -4 + gain[:, None] * np.linspace(0.9, 1.1, 8)

    how = SettleSettings(budget=7, seed=3)
    credit = measure_credit(utility, len(names), search=Search.of(how))
    found = credit.banzhaf
    table = {
        "coalition": ["".join("1" if bit else "0" for bit in row) for row in credit.coalitions],
        "utilities": credit.utilities.tolist(),
    }
    plan = {"players": [{"kind": "contributor", "id": world.keys[name]} for name in names]}
    values = {name: (float(found.values[n]), float(found.low[n]), float(found.high[n])) for n, name in enumerate(names)}
    entry = world.settle(
        values,
        config=world.trail.run_config(how),
        table=world.trail.put_table(pyarrow.table(table)),
        plan=world.trail.put_json(plan),
        empty_value=float(credit.empty.mean()),
        full_value=float(credit.full.mean()),
    )
    return settlement_of(world.trail, entry)


def player(key_id: str, name: str, value: float, low: float, high: float) -> SettledPlayer:
    """Return a contributor with a value and an interval."""
    verdict: Any = "helped" if low > 0 else "no measurable effect"
    return SettledPlayer("contributor", key_id, name, value, low, high, value, low, high, 0.01, verdict)


def build_world(folder: Path) -> CreditWorld:
    """Record everything up to the receipts, without training."""
    folder.mkdir(parents=True, exist_ok=True)
    trail = Trail.open(folder / "home")
    keys = {}
    for name, pairs in ROWS.items():
        add_contributor(trail, name)
        keys[name] = trail.keys.get(name).key_id
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs))
        contribute(trail, file, contributor=name, licence="CC0-1.0")
    with mock.patch.object(driver, "annotate_blocks", _annotate_here):
        refined = driver.refine(trail, ["all"], RefineSettings(min_letter_bits=-10), name="facts")
    base = Artefact("base_model", "tiny", trail.store.put_blob(b"base"))
    trail.record("base_model", BaseModelBody("tiny", "tests", "Llama", "MIT", "float32", "", 1), outputs=[base])
    digest, trace = trail.store.put_blob(b"adapter"), trail.store.put_blob(b"trace")
    body = AdapterBody("facts", base.digest, refined.digest, 2, 4, ("q_proj",), 1, refined.num_kept, 1, 0, trace)
    adapter = trail.record(
        "adapter",
        body,
        inputs=[base, Artefact("refined", "facts", refined.digest)],
        outputs=[Artefact("adapter", "facts", digest), Artefact("trace", "facts", trace)],
        contributors=[Party(trail.keys.get("operator").key_id, "trainer")],
        seed=7,
    )
    world = CreditWorld(trail, keys, base.digest, adapter, adapter, (), folder)
    world.settlement = world.settle(VALUES)
    world.request_ids = answer(world, [digest] * (NUM_REQUESTS - 1) + [None])
    return world


def answer(
    world: CreditWorld, adapters: Sequence[str | None], *, time_us: int = START_US, start: int = 0
) -> tuple[str, ...]:
    """Record a batch of receipts, one second apart, and return their ids."""
    rows = []
    for number, adapter in enumerate(adapters, start=start):
        receipt = {
            "v": 1,
            "id": f"rcpt_{number:026d}",
            "time_us": time_us + number * SECOND_US,
            "model": "facts@1" if adapter else "tiny",
            "base": world.base,
            "adapter": adapter,
            "adapter_name": "facts@1" if adapter else None,
            "adapter_record": world.adapter.leaf_hash if adapter else None,
            "prompt_version": None,
            "retrieved": [],
            "request_digest": world.trail.put_json({"q": number}),
            "output_digest": world.trail.put_json({"a": number}),
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "finish_reason": "stop",
            "replica": "replica-0",
            "tenant": "team",
        }
        rows.append(ReceiptRow(receipt, number.to_bytes(32, "big"), world.trail.put_json({"n": number})))
    append_completions(world.trail, rows, replica="replica-0")
    return tuple(row.receipt["id"] for row in rows)


def _annotate_here(work: Any, settings: RefineSettings, *, scratch: Path, progress: Any) -> None:
    """As the driver, in this process and without Ray."""
    for block in work:
        driver._judge_block(driver._task_item(block), settings=settings, scratch=scratch)
