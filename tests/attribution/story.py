"""A small trail as tests need it: two contributors, a refinement, an adapter, its publication, a batch of completions.

Inside `deterministic()` it comes out the same to the bit, which is how the golden files are made:
`python -m tests.attribution.story` writes them.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest import mock

from attribution.bodies import (
    AdapterBody,
    BaseModelBody,
    ContributorBody,
    ContributorRows,
    DatasetBody,
    Dropped,
    PublicationBody,
    RefinementBody,
    RuleUse,
)
from attribution.keys import SigningKey
from attribution.receipt_file import ancestry_file, receipt_file
from attribution.receipts import ReceiptRow, append_completions, receipt_bundle
from attribution.records import Artefact, CodeIdentity, Party
from attribution.trail import Entry, Trail

GOLDEN = Path(__file__).parents[1] / "golden"
START_US = 1_795_000_000_000_000
ENVIRONMENT = b'{"packages":[],"platform":"Linux-x86_64","python":"3.11.0","v":1}'
NAMES = ("Amara", "Noor")


@dataclass(frozen=True)
class Story:
    """The entries and receipt ids of the trail."""

    trail: Trail
    contributors: tuple[Entry, ...]
    datasets: tuple[Entry, ...]
    refinement: Entry
    base: Entry
    adapter: Entry
    publication: Entry
    completions: Entry
    receipt_ids: tuple[str, ...]

    @property
    def adapter_receipt(self) -> str:
        """A receipt answered with the adapter; odd ones are the base's."""
        return self.receipt_ids[2]

    @property
    def base_receipt(self) -> str:
        """A receipt answered by the base alone."""
        return self.receipt_ids[1]


def tell(trail: Trail, *, num_receipts: int = 5) -> Story:
    """Record the story."""
    clock = itertools.count(START_US, 1_000_000)
    base_digest = trail.store.put_blob(b"base model")
    base = trail.record(
        "base_model",
        BaseModelBody("tiny", "tests", "LlamaForCausalLM", "Apache-2.0", "float32", "", 1000),
        outputs=[Artefact("base_model", "tiny", base_digest)],
        time_us=next(clock),
    )
    contributors, datasets = zip(*(_contribute(trail, name, clock) for name in NAMES), strict=True)
    refinement = _refine(trail, datasets, contributors, next(clock))
    adapter = _train(trail, base, refinement, next(clock))
    made = adapter.record.outputs[0]
    publication = trail.record(
        "publication",
        PublicationBody("support", 1, "adapter", made.digest),
        inputs=[made],
        outputs=[made],
        time_us=next(clock),
    )
    rows = [receipt_row(trail, number, base, adapter, next(clock)) for number in range(num_receipts)]
    completions = append_completions(trail, rows, replica="replica-0")
    ids = tuple(row.receipt["id"] for row in rows)
    return Story(trail, contributors, datasets, refinement, base, adapter, publication, completions, ids)


def receipt_row(trail: Trail, number: int, base: Entry, adapter: Entry, time_us: int) -> ReceiptRow:
    """Return one completion's row; even numbers are answered with the adapter."""
    with_adapter = number % 2 == 0
    receipt = {
        "v": 1,
        "id": f"rcpt_{number:026d}",
        "time_us": time_us,
        "model": "support@1" if with_adapter else "tiny",
        "base": base.record.outputs[0].digest,
        "adapter": adapter.record.outputs[0].digest if with_adapter else None,
        "adapter_name": "support@1" if with_adapter else None,
        "adapter_record": adapter.leaf_hash if with_adapter else None,
        "prompt_version": None,
        "retrieved": [],
        "request_digest": f"sha256:{sha256(b'request %d' % number).hexdigest()}",
        "output_digest": f"sha256:{sha256(b'output %d' % number).hexdigest()}",
        "prompt_tokens": 10 + number,
        "completion_tokens": 3,
        "finish_reason": "stop",
        "replica": "replica-0",
        "tenant": "team",
    }
    content = trail.put_json({"prompt": f"question {number}", "output_text": f"answer {number}"})
    return ReceiptRow(receipt, sha256(b"salt %d" % number).digest(), content)


def _contribute(trail: Trail, name: str, clock: Iterator[int]) -> tuple[Entry, Entry]:
    key = trail.keys.create(name)
    who = (Party(key.key_id, "contributor"),)
    body = ContributorBody(name, key.key_id, key.public_hex)
    contributor = trail.record("contributor", body, contributors=who, signer=key, time_us=next(clock))
    rows = trail.store.put_blob(f"rows of {name}".encode())
    dataset = trail.record(
        "dataset",
        DatasetBody(f"{name}-rows", "CC0-1.0", "jsonl", 4, 1, rows, "rows.jsonl"),
        outputs=[Artefact("dataset", f"{name}-rows", rows)],
        contributors=who,
        signer=key,
        time_us=next(clock),
    )
    return contributor, dataset


def _refine(trail: Trail, datasets: tuple[Entry, ...], contributors: tuple[Entry, ...], time_us: int) -> Entry:
    digest = trail.store.put_blob(b"refined")
    rule = RuleUse("length", trail.store.put_blob(b"rule"), '{"min_chars":1}')
    rows = tuple(ContributorRows(entry.record.body.key_id, 4, 4 - n) for n, entry in enumerate(contributors))
    body = RefinementBody("facts", (rule,), 8, 7, (Dropped("length", "too short", 1),), rows, digest, digest)
    return trail.record(
        "refinement",
        body,
        inputs=[entry.record.outputs[0] for entry in datasets],
        outputs=[Artefact("refined", "facts", digest)],
        time_us=time_us,
    )


def _train(trail: Trail, base: Entry, refinement: Entry, time_us: int) -> Entry:
    digest, trace = trail.store.put_blob(b"adapter"), trail.store.put_blob(b"trace")
    base_digest, refined = base.record.outputs[0].digest, refinement.record.outputs[0].digest
    body = AdapterBody("support", base_digest, refined, 8, 16, ("q_proj", "v_proj"), 20, 7, 1_250_000, 0, trace)
    return trail.record(
        "adapter",
        body,
        inputs=[*base.record.outputs, *refinement.record.outputs],
        outputs=[Artefact("adapter", "support", digest), Artefact("trace", "support", trace)],
        seed=7,
        time_us=time_us,
    )


@contextmanager
def deterministic() -> Iterator[None]:
    """Fix keys, salts, code and environment; Ed25519 and RFC 8785 do the rest."""
    numbers = itertools.count(1)

    def generate(name: str) -> SigningKey:
        return SigningKey.from_seed(name, sha256(f"seed of {name}".encode()).digest())

    with (
        mock.patch.object(SigningKey, "generate", side_effect=generate),
        mock.patch("attribution.staging.secrets.token_bytes", lambda size: next(numbers).to_bytes(size, "big")),
        mock.patch("attribution.staging.time.time_ns", lambda: (START_US + 3_600_000_000) * 1000),
        mock.patch("attribution.staging.code_identity", lambda: CodeIdentity("0" * 40, False, "0.1.0")),
        mock.patch("attribution.trail.environment_manifest", lambda: ENVIRONMENT),
        mock.patch("attribution.trail.environment_digest", lambda: f"sha256:{sha256(ENVIRONMENT).hexdigest()}"),
        mock.patch("attribution.staging.environment_digest", lambda: f"sha256:{sha256(ENVIRONMENT).hexdigest()}"),
    ):
        yield


def golden_files(home: Path) -> dict[str, bytes]:
    """Return the bytes of every golden file: the formats that leave the system."""
    with deterministic():
        story = tell(Trail.open(home))
        trail = story.trail
        bundle = receipt_bundle(trail, story.adapter_receipt)
        base_bundle = receipt_bundle(trail, story.base_receipt)
        receipt = receipt_file(trail, story.adapter_receipt)
        ancestry = ancestry_file(trail, story.adapter_receipt)
        proof = trail.proof(story.adapter.leaf_hash)
    assert story.adapter.envelope is not None
    return {
        "record_envelope.json": story.adapter.envelope,
        "leaf.json": story.adapter.leaf.to_bytes(),
        "entries.bin": (home / "log" / "entries.bin").read_bytes(),
        "checkpoint": trail.log.checkpoint.encode(),
        "adapter.tlog-proof": proof["proof"].encode(),
        "record_proof.json": _pretty(proof),
        "receipt_bundle.json": _pretty(bundle),
        "base_receipt_bundle.json": _pretty(base_bundle),
        "receipt.json": json.dumps(receipt, separators=(",", ":"), ensure_ascii=False).encode() + b"\n",
        "ancestry.json": _pretty(ancestry),
        "trust.json": (home / "trust.json").read_bytes(),
    }


def _pretty(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file_name, data in golden_files(Path(tempfile.mkdtemp()) / "home").items():
        (GOLDEN / file_name).write_bytes(data)
