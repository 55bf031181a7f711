"""A home with a large log for `lineage_scale`: leaves, signed envelopes, salts, tables of rows, a signed checkpoint.

Records are written past `Trail.record` (no fsync, no parent look-up, one checkpoint at the end), in the formats that it
writes. The shape, for N records:

    contributors N/2000, the r-th with weight 1/r     datasets N/200, 200 rows each    refinements N/400
        of 1 to 30 datasets (geometric, mean 8), each keeping 9 rows of 10, with 6 rules in 3 versions
    base models 3    prompts N/5000    adapters N/100, one refinement and one base each
    benchmarks N/100    publications N/125, up to 8 versions of a name    adapter_loaded N/30
    influence N/50 (of a batch of completions and its first adapter)    redactions N/20000 (of datasets and refinements)
    completions: the rest, each of 1 to 4 adapters, drawn by 1/rank, newer adapters more popular, and their bases;
        every other one of a prompt, the r-th with weight 1/r

in 100 rounds, so that all kinds lie mixed through the log. Redacted records have no private half. Each completions
record names one of at most 1,000 tables of 16 receipts.
"""

import json
import random
import secrets
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.keys import SigningKey
from attribution.lineage_facts import seal_private
from attribution.log.merkle import Frontier, hash_leaf
from attribution.log.note import Checkpoint, sign_checkpoint
from attribution.log.sequencer import CHECKPOINT, ENTRIES, LENGTH_BYTES
from attribution.private_records import PrivateRecords
from attribution.records import PAYLOAD_TYPE, STATEMENT_TYPE, pre_auth_encoding
from attribution.store import write_atomically
from attribution.trail import MAX_GROUP, Trail

NUM_ROUNDS = 100
ROWS_PER_DATASET = 200
MAX_TABLES, RECEIPTS_PER_TABLE = 1000, 16
RULES = ("length", "language", "licence", "pii", "decontaminate", "dedup")
START_US = 1_795_000_000_000_000
CODE = {"commit": "0" * 40, "dirty": False, "version": "0.1.0"}
BUFFER_BYTES = 1 << 20


@dataclass
class Shape:
    """How many records of each kind there are."""

    num_records: int

    def counts(self) -> dict[str, int]:
        """Return the number of records by kind; completions are the rest."""
        size = self.num_records
        fixed = {
            "contributor": max(2, size // 2000),
            "base_model": 3,
            "prompt": max(1, size // 5000),
            "dataset": max(4, size // 200),
            "refinement": max(2, size // 400),
            "adapter": max(2, size // 100),
            "benchmark": size // 100,
            "publication": size // 125,
            "adapter_loaded": size // 30,
            "influence": size // 50,
            "redaction": size // 20_000,
        }
        return {**fixed, "completions": size - sum(fixed.values())}


@dataclass
class Made:
    """What has been recorded so far, by leaf hash; what queries may be drawn from."""

    contributors: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    bases: list[tuple[str, str]] = field(default_factory=list)  # leaf hash, digest
    prompts: list[str] = field(default_factory=list)
    datasets: list[tuple[str, str, int]] = field(default_factory=list)  # leaf hash, digest of rows, contributor
    refinements: list[tuple[str, str]] = field(default_factory=list)
    adapters: list[tuple[str, str, int]] = field(default_factory=list)  # leaf hash, digest, base
    completions: list[str] = field(default_factory=list)
    row_ids: dict[str, list[str]] = field(default_factory=dict)  # by dataset
    redacted: set[str] = field(default_factory=set)


def digest_of(*parts: object) -> str:
    """Return `sha256:<hex>` of some words."""
    return f"sha256:{sha256(' '.join(map(str, parts)).encode()).hexdigest()}"


class HomeWriter:
    """Writes a home's records one after another."""

    def __init__(self, home: Path, *, num_records: int, seed: int = 0) -> None:
        self.trail = Trail.open(home)
        self.made = Made()
        self._shape = Shape(num_records)
        self._random = random.Random(seed)
        self._operator = self.trail.keys.get("operator")
        self._frontier = Frontier()
        self._entries = (home / "log" / ENTRIES).open("wb", buffering=BUFFER_BYTES)
        self._private: list[tuple[str, bytes]] = []
        self._to_erase: list[tuple[int, str]] = []
        self._index: dict[str, int] = {}  # of datasets and refinements
        self._tables: list[str] = []
        self._versions: dict[str, int] = {}

    def write(self) -> Made:
        """Write every record, then the checkpoint."""
        counts = self._shape.counts()
        self._tables = [
            self._receipts_table(number) for number in range(min(MAX_TABLES, self._shape.num_records // 20))
        ]
        done = dict.fromkeys(counts, 0)
        for round_number in range(1, NUM_ROUNDS + 1):
            for kind, total in counts.items():  # makers before what is made of them
                target = -(-total * round_number // NUM_ROUNDS) if kind != "base_model" else total
                for number in range(done[kind], target):
                    getattr(self, f"_{kind}")(number)
                done[kind] = max(done[kind], target)
        self._flush_private()
        self._entries.close()
        log = self.trail.log
        note = sign_checkpoint(
            Checkpoint(log.key.name, self._frontier.size, self._frontier.root()), self.trail.keys.get("log")
        )
        write_atomically(log.directory / CHECKPOINT, note.encode())
        return self.made

    def _contributor(self, number: int) -> None:
        name = f"person-{number}"
        seed = SigningKey.from_seed(name, sha256(name.encode()).digest())
        body = {"name": name, "key_id": seed.key_id, "public_key": seed.public_hex}
        self.made.contributors.append(self._record("contributor", body))
        self.made.names.append(name)

    def _base_model(self, number: int) -> None:
        digest = digest_of("base", number)
        body = {"name": f"base-{number}", "source": "made up", "architecture": "LlamaForCausalLM", "dtype": "float32"}
        body |= {"licence": "Apache-2.0", "note": "", "num_parameters": 1000}
        leaf = self._record("base_model", body, outputs=[("base_model", f"base-{number}", digest)])
        self.made.bases.append((leaf, digest))

    def _prompt(self, number: int) -> None:
        digest = digest_of("template", number)
        body = {"name": f"prompt-{number}", "template": digest}
        self.made.prompts.append(self._record("prompt", body, outputs=[("prompt", f"prompt-{number}", digest)]))

    def _dataset(self, number: int) -> None:
        who = self._by_rank(len(self.made.contributors))
        ids = [digest_of("row", number, row) for row in range(ROWS_PER_DATASET)]
        rows = self._parquet({"contribution_id": ids})
        body = {"name": f"rows-{number}", "licence": "CC0-1.0", "format": "jsonl", "num_rows": len(ids), "rows": rows}
        body |= {"num_rejected": 0, "source_file_name": "rows.jsonl"}
        outputs = [("dataset", f"rows-{number}", rows)]
        leaf = self._record("dataset", body, parents=[self.made.contributors[who]], outputs=outputs)
        self.made.datasets.append((leaf, rows, who))
        self.made.row_ids[leaf] = ids

    def _refinement(self, number: int) -> None:
        size = min(30, len(self.made.datasets), 1 + int(self._random.expovariate(1 / 8)))
        chosen = self._random.sample(self.made.datasets, size)
        kept = [(row, leaf) for leaf, _, _ in chosen for row in self.made.row_ids[leaf] if self._random.random() < 0.9]
        rows = self._parquet({"example_id": [row for row, _ in kept], "dataset": [leaf for _, leaf in kept]})
        version = number * 3 // max(3, self._shape.counts()["refinement"])
        rules = [{"name": rule, "digest": digest_of(rule, version), "params": "{}"} for rule in RULES]
        body = {"name": f"facts-{number}", "rules": rules, "num_in": size * ROWS_PER_DATASET, "num_kept": len(kept)}
        body |= {"dropped": [], "per_contributor": [], "decisions": digest_of("decisions", number), "rows": rows}
        digest = digest_of("refined", number)
        inputs = [("dataset", "rows", rows_digest) for _, rows_digest, _ in chosen]
        outputs = [("refined", f"facts-{number}", digest)]
        parents = [leaf for leaf, _, _ in chosen]
        leaf = self._record("refinement", body, parents=parents, inputs=inputs, outputs=outputs)
        self.made.refinements.append((leaf, digest))

    def _adapter(self, number: int) -> None:
        refinement, refined = self._random.choice(self.made.refinements)
        base = self._random.randrange(3)
        digest, trace = digest_of("adapter", number), digest_of("trace", number)
        body = {
            "name": f"adapter-{number}",
            "base": self.made.bases[base][1],
            "dataset": refined,
            "rank": 8,
            "alpha": 16,
        }
        body |= {"target_modules": ["q_proj", "v_proj"], "num_steps": 48, "num_examples": 1800, "trace": trace}
        body |= {"final_loss_micro": 1_250_000, "reload_max_abs_diff_micro": 0}
        leaf = self._record(
            "adapter",
            body,
            parents=[self.made.bases[base][0], refinement],
            inputs=[("base_model", "base", self.made.bases[base][1]), ("refined", "facts", refined)],
            outputs=[("adapter", f"adapter-{number}", digest), ("trace", f"adapter-{number}", trace)],
        )
        self.made.adapters.append((leaf, digest, base))

    def _benchmark(self, number: int) -> None:
        leaf, digest, base = self.made.adapters[min(number, len(self.made.adapters) - 1)]
        metric = {"metric": "contains", "base_micro": 0, "adapter_micro": 900_000, "delta_micro": 900_000}
        metric |= {"low_micro": 700_000, "high_micro": 1_000_000, "num_items": 10}
        body = {"name": "questions", "suite": digest_of("suite"), "base": self.made.bases[base][1], "adapter": digest}
        body |= {"num_items": 10, "metrics": [metric], "details": digest_of("details", number)}
        self._record(
            "benchmark", body, parents=[leaf, self.made.bases[base][0]], inputs=[("adapter", "adapter", digest)]
        )

    def _publication(self, number: int) -> None:
        leaf, digest, _ = self.made.adapters[min(number, len(self.made.adapters) - 1)]
        name = f"model-{number // 8}"
        version = self._versions[name] = self._versions.get(name, 0) + 1
        body = {"name": name, "version": version, "artefact_kind": "adapter", "digest": digest}
        artefact = [("adapter", name, digest)]
        self._record("publication", body, parents=[leaf], inputs=artefact, outputs=artefact)

    def _adapter_loaded(self, number: int) -> None:
        leaf, digest, base = self._popular_adapter()
        body = {"replica": f"replica-{number % 16}", "adapter": digest, "base": self.made.bases[base][1]}
        self._record("adapter_loaded", body, parents=[leaf], inputs=[("adapter", "adapter", digest)])

    def _completions(self, number: int) -> None:
        adapters = list({self._popular_adapter() for _ in range(self._random.randint(1, 4))})
        bases = {base for _, _, base in adapters}
        inputs = [("adapter", "adapter", digest) for _, digest, _ in adapters]
        inputs += [("base_model", "base", self.made.bases[base][1]) for base in bases]
        table = self._tables[number % len(self._tables)]
        body = {"replica": f"replica-{number % 16}", "root": table[7:], "count": RECEIPTS_PER_TABLE, "table": table}
        body |= {"first_time_us": START_US, "last_time_us": START_US}
        parents = [leaf for leaf, _, _ in adapters] + [self.made.bases[base][0] for base in bases]
        if number % 2:
            prompt = self._by_rank(len(self.made.prompts))
            inputs.append(("prompt", f"prompt-{prompt}", digest_of("template", prompt)))
            parents.append(self.made.prompts[prompt])
        self.made.completions.append(self._record("completions", body, parents=parents, inputs=inputs))

    def _influence(self, number: int) -> None:
        if not self.made.completions:
            self._completions(number)
            return
        batch = self._random.choice(self.made.completions[-20_000:])
        leaf, digest, _ = self._popular_adapter()
        table = digest_of("influence", number)
        body = {
            "receipt_id": f"rcpt_{number:026d}",
            "receipt_leaf": batch,
            "method": "tracin",
            "table": table,
            "top": [],
        }
        self._record("influence", body, parents=[batch, leaf], inputs=[("adapter", "adapter", digest)])

    def _redaction(self, number: int) -> None:
        leaf = self._random.choice(self.made.datasets if number % 2 else self.made.refinements)[0]
        self.made.redacted.add(leaf)
        self._to_erase.append((self._index[leaf], leaf))
        self._record("redaction", {"leaf": leaf, "reason": "asked for"}, parents=[leaf])

    def _by_rank(self, size: int) -> int:
        """One of `size` things, the r-th about 1/r as often as the first."""
        return min(size - 1, int(size ** self._random.random()) - 1)

    def _popular_adapter(self) -> tuple[str, str, int]:
        return self.made.adapters[-1 - self._by_rank(len(self.made.adapters))]

    def _parquet(self, columns: dict[str, list[str]]) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return self.trail.store.put_blob(sink.getvalue().to_pybytes())

    def _receipts_table(self, number: int) -> str:
        receipts: list[Any] = []
        for inner in range(RECEIPTS_PER_TABLE):
            receipt = {"id": f"rcpt_{number * RECEIPTS_PER_TABLE + inner:026d}", "adapter_record": None, "tenant": "t"}
            receipt |= {"base": digest_of("base", 0), "request_digest": digest_of("q", inner), "replica": "replica-0"}
            receipts.append({"receipt": receipt, "salt": "00" * 32, "content": digest_of("content", number, inner)})
        return self.trail.put_json(receipts)

    def _record(
        self,
        kind: str,
        body: dict[str, Any],
        *,
        parents: Sequence[str] = (),
        inputs: Sequence[tuple[str, str, str]] = (),
        outputs: Sequence[tuple[str, str, str]] = (),
    ) -> str:
        """Sign a record, write its leaf, keep its private half for `_flush_private`; return the leaf hash."""
        time_us = START_US + self._frontier.size * 1000
        payload = _canonical(_statement(kind, body, inputs, outputs, time_us))
        signature = {"keyid": self._operator.key_id, "sig": _base64(self._operator.sign(pre_auth_encoding(payload)))}
        envelope = _canonical({"payload": _base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]})
        salt = secrets.token_bytes(32)
        named = [(item[0], item[2]) for item in (*outputs, *inputs) if item[0] in ("adapter", "base_model")]
        leaf = _canonical(
            {
                "v": 1,
                "kind": kind,
                "time_us": time_us,
                "parents": list(parents),
                "subjects": [{"kind": of_kind, "digest": digest} for of_kind, digest in dict.fromkeys(named)],
                "commitment": sha256(salt + envelope).hexdigest(),
            }
        )
        leaf_hash = hash_leaf(leaf)
        self._frontier.append(leaf_hash)
        self._entries.write(len(leaf).to_bytes(LENGTH_BYTES, "big") + leaf)
        if kind in ("dataset", "refinement"):
            self._index[leaf_hash.hex()] = self._frontier.size - 1
        self._private.append((leaf_hash.hex(), seal_private(envelope, salt)))
        if len(self._private) >= MAX_GROUP:  # as a commit of the log has them: segments get their usual size
            self._flush_private()
        return leaf_hash.hex()

    def _flush_private(self) -> None:
        """Write the private halves that wait, and erase those that were redacted meanwhile."""
        private = PrivateRecords(self.trail.home / "records")
        private.append(self._frontier.size - len(self._private), self._private, is_logged=lambda _: True)
        for index, leaf_hash in self._to_erase:
            private.erase(index, leaf_hash)
        self._private.clear()
        self._to_erase.clear()


def _statement(
    kind: str,
    body: dict[str, Any],
    inputs: Sequence[tuple[str, str, str]],
    outputs: Sequence[tuple[str, str, str]],
    time_us: int,
) -> dict[str, Any]:
    predicate = {
        "contributors": [],
        "inputs": [{"kind": of_kind, "name": name, "digest": digest} for of_kind, name, digest in inputs],
        "code": CODE,
        "environment": digest_of("environment"),
        "config": None,
        "seed": 0,
        "attempt": 1,
        "parent_attempt": None,
        "time_us": time_us,
        "body": body,
    }
    subject = [
        {"name": name, "digest": {"sha256": digest[7:]}, "annotations": {"kind": of_kind}}
        for of_kind, name, digest in outputs
    ]
    predicate_type = f"https://trailmark.dev/record/{kind}/v1"
    return {"_type": STATEMENT_TYPE, "subject": subject, "predicateType": predicate_type, "predicate": predicate}


def _canonical(value: Any) -> bytes:
    """RFC 8785 of what stands here: names and texts in ASCII, no floats; the test holds it to rfc8785."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
