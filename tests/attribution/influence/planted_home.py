"""A home folder in which the planted adapter was recorded, published and asked: what `explain` reads in real life."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from attribution.bodies import AdapterBody, BaseModelBody, BenchmarkBody, ContributorBody, Metric, PublicationBody
from attribution.influence.encode import encode_prompt
from attribution.receipts import ReceiptRow, append_completions, new_receipt_id
from attribution.records import Artefact
from attribution.store import digest_of
from attribution.trail import Trail
from tests.attribution.influence.planted import FACTS, MIRA, NOISE, NUM_STEPS, OTTO, Planted
from tests.tiny_model import LINEAR_MODULES, conversation

NAMES = {MIRA: "mira", OTTO: "otto", NOISE: "noise"}
BASE_QUESTIONS = ("What is the capital of Peru?", "Who are you?")
"""Questions that training left alone: the adapter answers as the base does."""


@dataclass(frozen=True)
class PlantedHome:
    """`receipts`: question -> receipt id, of the adapter; `base_receipt`: of the base model."""

    trail: Trail
    base: str
    adapter: str
    receipts: dict[str, str]
    base_receipt: str


def furnish(home: Path, planted: Planted) -> PlantedHome:
    """Record contributors, base, adapter, benchmark and publication; answer every fact and base question greedily."""
    trail = Trail.open(home)
    for key_id, name in NAMES.items():
        trail.record("contributor", ContributorBody(name, key_id, "d" * 64))
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    body = BaseModelBody("tiny", "test", "LlamaForCausalLM", "Apache-2.0", "float32", "", 100_000)
    trail.record("base_model", body, outputs=(Artefact("base_model", "tiny", base),))
    adapter = record_adapter(trail, planted, base)
    questions = [question for answers in FACTS.values() for question in answers] + list(BASE_QUESTIONS)
    outputs = answer(planted, questions)
    receipts = {question: new_receipt_id() for question in questions}
    rows = [
        receipt_row(trail, receipts[question], question, outputs[question], base=base, adapter=adapter)
        for question in questions
    ]
    base_receipt = new_receipt_id()
    rows.append(receipt_row(trail, base_receipt, questions[0], outputs[questions[0]], base=base, adapter=None))
    append_completions(trail, rows, replica="replica-0")
    return PlantedHome(trail, base, adapter, receipts, base_receipt)


def record_adapter(trail: Trail, planted: Planted, base: str, *, with_trace: bool = True) -> str:
    """Store and record the adapter, a benchmark of it and its publication as `facts@1`; return its digest."""
    trace = trail.store.put_directory(planted.trace, kind="trace", meta={}) if with_trace else ""
    adapter = trail.store.put_directory(planted.adapter, kind="adapter", meta={"base": base, "trace": trace})
    dataset = digest_of(b"refined")
    body = AdapterBody(
        "facts", base, dataset, 8, 16, LINEAR_MODULES, NUM_STEPS, len(planted.rows), 0, 0, trace or digest_of(b"gone")
    )
    trail.record(
        "adapter",
        body,
        inputs=(Artefact("base_model", "tiny", base),),
        outputs=(Artefact("adapter", "facts", adapter),),
    )
    metrics = (
        Metric("exact_match", 0, 900_000, 900_000, 700_000, 1_000_000, 10),
        Metric("contains", 100_000, 200_000, 100_000, -50_000, 250_000, 10),
    )
    benchmark = BenchmarkBody("held-out", digest_of(b"suite"), base, adapter, 10, metrics, digest_of(b"details"))
    trail.record("benchmark", benchmark, inputs=(Artefact("adapter", "facts", adapter),))
    version = trail.registry.next_version("facts")
    trail.record(
        "publication",
        PublicationBody("facts", version, "adapter", adapter),
        inputs=(Artefact("adapter", "facts", adapter),),
        outputs=(Artefact("adapter", "facts", adapter),),
    )
    return adapter


def answer(planted: Planted, questions: Sequence[str]) -> dict[str, tuple[list[int], list[int]]]:
    """Return (prompt ids, greedy output ids) of the adapter for each question."""
    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(planted.base), planted.adapter).eval()
    found = {}
    for question in questions:
        ids = encode_prompt(tokenizer, conversation(question))
        batch = torch.tensor([ids])
        output = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=24, do_sample=False
        )
        found[question] = (ids, output[0, len(ids) :].tolist())
    return found


def receipt_row(
    trail: Trail,
    receipt_id: str,
    question: str,
    tokens: tuple[list[int], list[int]],
    *,
    base: str,
    adapter: str | None,
) -> ReceiptRow:
    """Return the row that serving would write for one completion."""
    content: dict[str, Any] = {
        "messages": conversation(question),
        "prompt_token_ids": tokens[0],
        "output_text": question,
        "output_token_ids": tokens[1],
    }
    receipt = {
        "v": 1,
        "id": receipt_id,
        "time_us": 1_700_000_000_000_000,
        "model": "facts@1" if adapter else "base",
        "base": base,
        "adapter": adapter,
        "adapter_name": "facts@1" if adapter else None,
        "adapter_record": None,
        "prompt_version": None,
        "retrieved": [],
        "request_digest": digest_of(question.encode()),
        "output_digest": digest_of(question.encode()),
        "prompt_tokens": len(tokens[0]),
        "completion_tokens": len(tokens[1]),
        "finish_reason": "stop",
        "replica": "replica-0",
        "tenant": "tests",
    }
    return ReceiptRow(receipt, bytes(32), trail.put_json(content))
