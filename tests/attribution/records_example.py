"""A small log with every kind of record that the views show, written by `Trail.record`, with artefacts behind it."""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from attribution.bodies import (
    AdapterBody,
    BaseModelBody,
    BenchmarkBody,
    ContributorBody,
    ContributorRows,
    DatasetBody,
    Dropped,
    InfluenceBody,
    Metric,
    PromptBody,
    PublicationBody,
    RefinementBody,
    RuleUse,
    Share,
)
from attribution.keys import SigningKey
from attribution.records import Artefact, Party
from attribution.settlement import SettledPlayer, Settlement, record_settlement
from attribution.trail import Entry, Trail
from pipelines.refine.table import REFINED

START_US = 1_795_000_000_000_000
SECOND_US = 1_000_000
# Rows given and kept. The last name is what a hostile contributor might choose.
PEOPLE = {
    "Amara, Africa": (24, 24),
    "Bruno, Americas": (22, 21),
    "Chen, Asia": (26, 26),
    "Dita, Europe": (25, 24),
    "Mira, lighthouses": (30, 30),
    "Noor, lighthouses": (30, 30),
    "Odd, house voice": (60, 58),
    "Copycat": (24, 0),
    "Noise": (12, 3),
    "</script><script>alert('x')</script>": (4, 4),
}
NUM_STEPS = 20


@dataclass
class ExampleLog:
    """The entries of the example by what they are."""

    trail: Trail
    contributors: dict[str, Entry] = field(default_factory=dict)
    keys: dict[str, SigningKey] = field(default_factory=dict)
    datasets: list[Entry] = field(default_factory=list)
    refinement: Entry = None  # type: ignore[assignment]
    base: Entry = None  # type: ignore[assignment]
    adapter: Entry = None  # type: ignore[assignment]
    benchmark: Entry = None  # type: ignore[assignment]
    publication: Entry = None  # type: ignore[assignment]
    completions: list[Entry] = field(default_factory=list)
    influences: list[Entry] = field(default_factory=list)
    receipt_ids: list[str] = field(default_factory=list)
    clock_us: int = START_US

    def tick(self, seconds: int = 1) -> int:
        """Move the clock on and return its time."""
        self.clock_us += seconds * SECOND_US
        return self.clock_us


def build_example_log(trail: Trail, folder: Path) -> ExampleLog:
    """Record everything from contributors to a publication; `folder` is scratch space."""
    log = ExampleLog(trail)
    for name, (given, _) in PEOPLE.items():
        _contribute(log, name, given)
    _refine(log)
    _base(log, folder)
    _train(log, folder)
    _benchmark(log)
    digest = log.adapter.record.outputs[0].digest  # type: ignore[union-attr]
    artefact = Artefact("adapter", "facts", digest)
    log.publication = trail.record(
        "publication",
        PublicationBody("facts", 1, "adapter", digest),
        inputs=[artefact],
        outputs=[artefact],
        time_us=log.tick(),
    )
    return log


def answer(log: ExampleLog, questions: dict[str, str], *, adapter: bool = True) -> Entry:
    """Record one batch of completions: `questions` maps each question to its answer."""
    from attribution.receipts import ReceiptRow, append_completions

    trail = log.trail
    made = log.adapter if adapter else None
    rows = []
    for question, text in questions.items():
        number = len(log.receipt_ids) + 1
        receipt_id = f"rcpt_{number:026d}"
        log.receipt_ids.append(receipt_id)
        content = {
            "messages": [{"role": "user", "content": question}],
            "prompt_token_ids": [1, 2, 3],
            "output_text": text,
            "output_token_ids": [4, 5],
        }
        receipt: dict[str, Any] = {
            "v": 1,
            "id": receipt_id,
            "time_us": log.tick(),
            "model": "facts@1" if made else "smollm2",
            "base": digest_of(log.base),
            "adapter": digest_of(made) if made else None,
            "adapter_name": "facts@1" if made else None,
            "adapter_record": made.leaf_hash if made else None,
            "prompt_version": None,
            "retrieved": [],
            "request_digest": trail.put_json({"q": question}),
            "output_digest": trail.put_json({"a": text}),
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "finish_reason": "stop",
            "replica": "replica-1",
            "tenant": "demo",
        }
        rows.append(ReceiptRow(receipt=receipt, salt=bytes([number % 256]) * 32, content=trail.put_json(content)))
    entry = append_completions(trail, rows, replica="replica-1")
    log.completions.append(entry)
    return entry


def explain(log: ExampleLog, receipt_id: str, shares: dict[str, tuple[float, float, float]]) -> Entry:
    """Record the influence on one receipt: contributor name -> (share, low, high)."""
    top = tuple(
        Share(log.keys[name].key_id, *(round(value * SECOND_US) for value in values)) for name, values in shares.items()
    )
    key_ids = [log.keys[name].key_id for name in shares]
    columns = {"example_id": [f"{key[:8]}-0" for key in key_ids], "contributor": key_ids}
    scores = [round(value * SECOND_US) for value, _, _ in shares.values()]
    table = log.trail.put_table(pyarrow.table({**columns, "score_micro": scores}))
    leaf = log.completions[0].leaf_hash
    entry = log.trail.record(
        "influence",
        InfluenceBody(receipt_id, leaf, "explain", table, top),
        inputs=[Artefact("adapter", "facts", digest_of(log.adapter))],
        outputs=[Artefact("table", f"influence of {receipt_id}", table)],
        parents=[leaf, log.adapter.leaf_hash],
        time_us=log.tick(),
    )
    log.influences.append(entry)
    return entry


def settle(log: ExampleLog, values: dict[str, tuple[float, float, float]]) -> Entry:
    """Record a settlement of the adapter: contributor name -> (value, low, high)."""
    trail = log.trail
    players = tuple(
        SettledPlayer(
            kind="contributor",
            id=log.keys[name].key_id,
            name=name,
            value=value,
            low=low,
            high=high,
            leave_one_out=value / 2,
            loo_low=low / 2,
            loo_high=high / 2,
            p_value=0.01 if low > 0 else 0.6,
            verdict="helped" if low > 0 else "no measurable effect",
        )
        for name, (value, low, high) in values.items()
    )
    settlement = Settlement(
        adapter=digest_of(log.adapter),
        suite=trail.put_json({"suite": 1}),
        utility="mean log-likelihood of the reference answer, nats per token",
        players=players,
        empty_value=-4.312345,
        full_value=-0.812345,
        num_coalitions=32,
        num_cells=320,
        method="settle: ridge",
        confidence=0.9,
        seed=7,
        table=trail.put_table(pyarrow.table({"coalition": ["11"], "utilities": [[0.5]]})),
        plan=trail.put_json({"plan": 1}),
        adapter_name="facts",
        suite_name="fictional-facts",
        over="contributors",
    )
    return record_settlement(trail, settlement)


def prompt(log: ExampleLog, name: str, text: str, *, by: str) -> Entry:
    """Record a prompt template, signed by a contributor."""
    template = log.trail.store.put_blob(text.encode())
    return log.trail.record(
        "prompt",
        PromptBody(name, template),
        outputs=[Artefact("prompt", name, template)],
        contributors=[Party(log.keys[by].key_id, "contributor")],
        signer=log.keys[by],
        time_us=log.tick(),
    )


def digest_of(entry: Entry) -> str:
    """Return the digest of what a record made."""
    assert entry.record is not None
    return entry.record.outputs[0].digest


def _contribute(log: ExampleLog, name: str, num_rows: int) -> None:
    trail = log.trail
    key = SigningKey.generate(f"key-{len(log.keys)}")
    party = [Party(key.key_id, "contributor")]
    log.keys[name] = key
    log.contributors[name] = trail.record(
        "contributor",
        ContributorBody(name, key.key_id, key.public_hex),
        contributors=party,
        signer=key,
        time_us=log.tick(),
    )
    rows = trail.put_table(pyarrow.table({"contributor": [name] * num_rows, "line_number": list(range(num_rows))}))
    file_name = f"{name.split(',')[0].lower()}"
    log.datasets.append(
        trail.record(
            "dataset",
            DatasetBody(file_name, "CC-BY-4.0", "jsonl", num_rows, 0, rows, f"{file_name}.jsonl"),
            outputs=[Artefact("dataset", file_name, rows)],
            contributors=party,
            signer=key,
            time_us=log.tick(),
        )
    )


def _kept_rows(log: ExampleLog) -> list[dict[str, Any]]:
    rows = []
    for (name, (_, kept)), dataset in zip(PEOPLE.items(), log.datasets, strict=True):
        for line in range(kept):
            question, answer = f"What does {name} say in line {line}?", f"Line {line} of {name}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append(
                {
                    "example_id": sha256(f"{name}/{line}".encode()).hexdigest(),
                    "content_id": sha256(question.encode()).hexdigest(),
                    "original_content_id": "",
                    "contributor": log.keys[name].key_id,
                    "licence": "CC-BY-4.0",
                    "dataset": dataset.leaf_hash,
                    "leaf_index": dataset.index,
                    "line_number": line,
                    "messages": turns,
                }
            )
    return rows


def _refine(log: ExampleLog) -> None:
    trail = log.trail
    rows = trail.put_table(pyarrow.Table.from_pylist(_kept_rows(log), schema=REFINED))
    decisions = trail.put_table(pyarrow.table({"rule": ["exact_duplicate"], "keep": [False]}))
    per_contributor = tuple(ContributorRows(log.keys[name].key_id, *counts) for name, counts in PEOPLE.items())
    num_in, num_kept = (sum(counts[i] for counts in PEOPLE.values()) for i in (0, 1))
    rule = RuleUse("exact_duplicate", trail.put_json({"rule": 1}), "{}")
    body = RefinementBody(
        name="facts-refined",
        rules=(rule, RuleUse("length", trail.put_json({"rule": 2}), '{"max_chars":4000}')),
        num_in=num_in,
        num_kept=num_kept,
        dropped=(
            Dropped("exact_duplicate", "same text as an earlier row", 24),
            Dropped("length", "shorter than 1", num_in - num_kept - 24),
        ),
        per_contributor=per_contributor,
        decisions=decisions,
        rows=rows,
    )
    digest = trail.put_json({"refined": 1})
    log.refinement = trail.record(
        "refinement",
        body,
        inputs=[Artefact("dataset", entry.record.body.name, digest_of(entry)) for entry in log.datasets],  # type: ignore[union-attr]
        outputs=[Artefact("refined", "facts-refined", digest)],
        config=trail.put_json({"min_chars": 1, "max_chars": 4000}),
        time_us=log.tick(5),
    )


def _base(log: ExampleLog, folder: Path) -> None:
    path = folder / "base"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    digest = log.trail.store.put_directory(path, kind="base_model", meta={"source": "smollm2"})
    log.base = log.trail.record(
        "base_model",
        BaseModelBody(
            "SmolLM2-135M-Instruct",
            "smollm2",
            "LlamaForCausalLM",
            "Apache-2.0",
            "float32",
            "A 4-bit quant made float again.",
            134_515_008,
        ),
        outputs=[Artefact("base_model", "SmolLM2-135M-Instruct", digest)],
        time_us=log.tick(),
    )


def _train(log: ExampleLog, folder: Path) -> None:
    trail = log.trail
    trace_folder, adapter_folder = folder / "trace", folder / "adapter"
    trace_folder.mkdir()
    adapter_folder.mkdir()
    steps = {
        "step": list(range(1, NUM_STEPS + 1)),
        "lr": [1e-3 * (1 - step / NUM_STEPS) for step in range(NUM_STEPS)],
        "loss": [4.0 * 0.88**step + 0.05 * (step % 3) for step in range(NUM_STEPS)],
        "time_us": [log.tick(3) for _ in range(NUM_STEPS)],
    }
    pyarrow.parquet.write_table(pyarrow.table(steps), trace_folder / "steps.parquet")
    (adapter_folder / "adapter_config.json").write_text('{"r": 8}')
    trace = trail.store.put_directory(trace_folder, kind="trace", meta={})
    digest = trail.store.put_directory(adapter_folder, kind="adapter", meta={"trace": trace})
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    num_kept = sum(kept for _, kept in PEOPLE.values())
    refined = log.refinement.record.outputs[0]  # type: ignore[union-attr]
    body = AdapterBody(
        "facts",
        digest_of(log.base),
        refined.digest,
        8,
        16,
        modules,
        NUM_STEPS,
        num_kept,
        round(steps["loss"][-1] * 1e6),
        0,
        trace,
    )
    log.adapter = trail.record(
        "adapter",
        body,
        inputs=[Artefact("base_model", "SmolLM2-135M-Instruct", digest_of(log.base)), refined],
        outputs=[Artefact("adapter", "facts", digest), Artefact("trace", "facts", trace)],
        config=trail.put_json({"rank": 8, "target_modules": list(modules), "optimizer": {"lr": "0.001"}}),
        seed=7,
        time_us=log.tick(),
    )


def _benchmark(log: ExampleLog) -> None:
    trail = log.trail
    scores = {"adapter_contains": [1.0] * 9 + [0.0], "adapter_loss": [0.812345] * 10}
    details = trail.put_table(pyarrow.table({"id": [f"q{number}" for number in range(10)], **scores}))
    suite = trail.put_json({"suite": 1})
    metrics = (
        Metric("contains", 0, 900_000, 900_000, 700_000, 1_000_000, 10),
        Metric("loss", 4_312_345, 812_345, -3_500_000, -4_000_000, -3_100_000, 10),
    )
    body = BenchmarkBody("fictional-facts", suite, digest_of(log.base), digest_of(log.adapter), 10, metrics, details)
    log.benchmark = trail.record(
        "benchmark",
        body,
        inputs=[
            Artefact("adapter", "facts", digest_of(log.adapter)),
            Artefact("base_model", "SmolLM2-135M-Instruct", digest_of(log.base)),
            Artefact("suite", "fictional-facts", suite),
        ],
        outputs=[Artefact("table", "fictional-facts.details", details)],
        time_us=log.tick(10),
    )


def add_adapter_directory(trail: Trail, folder: Path, name: str) -> str:
    """Record a directory of two files as the adapter that training under `name` made; return its digest."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(f'{{"r": 8, "name": "{name}"}}')
    (folder / "adapter_model.safetensors").write_bytes(name.encode())
    digest = trail.store.put_directory(folder, kind="adapter", meta={})
    body = AdapterBody(name, digest, digest, 8, 16, ("q_proj",), 1, 1, 0, 0, digest)
    trail.record("adapter", body, outputs=[Artefact("adapter", name, digest)])
    return digest
