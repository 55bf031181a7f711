"""Two versions of one model, with tables of rows, benchmarks, answers: what lineage questions are asked about."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import pyarrow as pa

from attribution.bodies import (
    AdapterBody,
    BaseModelBody,
    BenchmarkBody,
    ContributorBody,
    ContributorRows,
    DatasetBody,
    InfluenceBody,
    Metric,
    PromptBody,
    PublicationBody,
    RefinementBody,
    RuleUse,
)
from attribution.private_records import PrivateRecords
from attribution.receipts import ReceiptRow, append_completions
from attribution.records import Artefact, Party
from attribution.trail import Entry, Trail
from configs.schema import Settings


def erase(trail: Trail, leaf_hash: str) -> None:
    """Remove the private half of a record."""
    assert PrivateRecords(trail.home / "records").erase(trail.entry_index(leaf_hash), leaf_hash)


def digest_of(*words: object) -> str:
    return f"sha256:{sha256(' '.join(map(str, words)).encode()).hexdigest()}"


@dataclass
class Versions:
    """The entries, by short names; `rows[name]` are the example ids that a contributor gave."""

    trail: Trail
    entries: dict[str, Entry] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    receipts: dict[str, list[str]] = field(default_factory=dict)

    def leaf(self, name: str) -> str:
        return self.entries[name].leaf_hash


def tell_versions(trail: Trail) -> Versions:
    """Record: mira's rows make support@1; mira's rows but one, and otto's, make support@2 with another rank."""
    story = Versions(trail)
    base = trail.store.put_blob(b"weights")
    body = BaseModelBody("tiny", "tests", "LlamaForCausalLM", "Apache-2.0", "float32", "", 1000)
    story.entries["base"] = trail.record("base_model", body, outputs=[Artefact("base_model", "tiny", base)])
    _contribute(story, "mira", 5)
    _contribute(story, "otto", 3)
    story.entries["prompt"] = trail.record(
        "prompt", PromptBody("greeting", digest_of("t")), outputs=[Artefact("prompt", "greeting", digest_of("t"))]
    )
    add_version(story, 1, {"mira": story.rows["mira"]}, rank=8, right=2)
    add_version(story, 2, {"mira": story.rows["mira"][1:], "otto": story.rows["otto"]}, rank=16, right=10)
    _answer(story, "both", ["adapter1", "adapter2", None])
    _answer(story, "second", ["adapter2", "adapter2"])
    receipt = story.receipts["second"][0]
    batch = story.leaf("second")
    story.entries["influence"] = trail.record(
        "influence", InfluenceBody(receipt, batch, "tracin", digest_of("scores"), ()), parents=[batch]
    )
    return story


def _contribute(story: Versions, name: str, num_rows: int) -> None:
    trail = story.trail
    key = trail.keys.create(name)
    who = [Party(key.key_id, "contributor")]
    story.entries[name] = trail.record(
        "contributor", ContributorBody(name, key.key_id, key.public_hex), contributors=who, signer=key
    )
    story.rows[name] = [digest_of("row", name, number) for number in range(num_rows)]
    rows = trail.put_table(pa.table({"contribution_id": story.rows[name]}))
    story.entries[f"{name}-rows"] = trail.record(
        "dataset",
        DatasetBody(f"{name}-rows", "CC0-1.0", "jsonl", num_rows, 0, rows, "rows.jsonl"),
        outputs=[Artefact("dataset", f"{name}-rows", rows)],
        contributors=who,
        signer=key,
    )


def add_version(story: Versions, version: int, kept: dict[str, Sequence[str]], *, rank: int, right: int) -> None:
    trail = story.trail
    settings = Settings()
    changed = settings.model_copy(update={"train": settings.train.model_copy(update={"rank": rank})})
    refinement = _refine(story, version, kept)
    digest = trail.store.put_blob(f"adapter {version}".encode())
    base = story.entries["base"].record.outputs[0].digest
    refined = refinement.record.outputs[0].digest
    adapter = trail.record(
        "adapter",
        AdapterBody("support", base, refined, rank, 16, ("q_proj",), 20, 7, 1_250_000, 0, digest_of("trace", version)),
        inputs=[*story.entries["base"].record.outputs, *refinement.record.outputs],
        outputs=[Artefact("adapter", "support", digest)],
        config=trail.run_config(changed),
        seed=version,
    )
    story.entries[f"adapter{version}"] = adapter
    made = adapter.record.outputs[0]
    story.entries[f"publication{version}"] = trail.record(
        "publication", PublicationBody("support", version, "adapter", digest), inputs=[made], outputs=[made]
    )
    story.entries[f"benchmark{version}"] = _benchmark(story, adapter, right)


def _refine(story: Versions, version: int, kept: dict[str, Sequence[str]]) -> Entry:
    trail = story.trail
    names = list(kept)
    columns = {
        "example_id": [row for rows in kept.values() for row in rows],
        "dataset": [story.leaf(f"{name}-rows") for name in names for _ in kept[name]],
        "contributor": [story.entries[name].record.body.key_id for name in names for _ in kept[name]],
    }
    rows = trail.put_table(pa.table(columns))
    rules = (RuleUse("length", digest_of("length"), f'{{"min_chars":{version}}}'),)
    parts = tuple(
        ContributorRows(story.entries[name].record.body.key_id, len(story.rows[name]), len(kept[name]))
        for name in names
    )
    num_kept = sum(map(len, kept.values()))
    body = RefinementBody("facts", rules, 8, num_kept, (), parts, digest_of("decisions", version), rows)
    story.entries[f"refinement{version}"] = trail.record(
        "refinement",
        body,
        inputs=[output for name in names for output in story.entries[f"{name}-rows"].record.outputs],
        outputs=[Artefact("refined", "facts", digest_of("refined", version))],
    )
    return story.entries[f"refinement{version}"]


def _benchmark(story: Versions, adapter: Entry, right: int) -> Entry:
    trail = story.trail
    made = adapter.record.outputs[0]
    scores = [float(number < right) for number in range(12)]
    details = trail.put_table(pa.table({"id": [f"q{number}" for number in range(12)], "adapter_contains": scores}))
    share = round(1e6 * right / 12)
    metric = Metric("contains", 0, share, share, max(0, share - 100_000), share + 100_000, 12)
    base = story.entries["base"].record.outputs[0].digest
    return trail.record(
        "benchmark",
        BenchmarkBody("questions", digest_of("suite"), base, made.digest, 12, (metric,), details),
        inputs=[made],
        config=trail.put_json({"confidence": "0.9"}),
    )


def _answer(story: Versions, name: str, adapters: Sequence[str | None]) -> None:
    trail = story.trail
    clock = itertools.count(1_795_000_000_000_000)
    base = story.entries["base"].record.outputs[0].digest
    rows = []
    for number, adapter in enumerate(adapters):
        entry = story.entries[adapter] if adapter else None
        receipt = {
            "v": 1,
            "id": f"rcpt_{name.ljust(25, '0')}{number}",
            "time_us": next(clock),
            "model": f"support@{adapter[-1]}" if adapter else "tiny",
            "base": base,
            "adapter": entry.record.outputs[0].digest if entry else None,
            "adapter_name": f"support@{adapter[-1]}" if adapter else None,
            "adapter_record": entry.leaf_hash if entry else None,
            "prompt_version": None,
            "retrieved": [],
            "request_digest": digest_of("request", name, number),
            "output_digest": digest_of("output", name, number),
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "finish_reason": "stop",
            "replica": "replica-0",
            "tenant": "acme" if number else "other",
        }
        content = trail.put_json({"prompt": "q", "output_text": "a"})
        rows.append(ReceiptRow(receipt, sha256(f"{name}{number}".encode()).digest(), content))
    story.entries[name] = append_completions(trail, rows, replica="replica-0")
    story.receipts[name] = [row.receipt["id"] for row in rows]
