"""The audit tier: what an answer would lose if a few training rows had not been there, by exact differentiation.

Causal for small removals, to first order, in the recorded run: same base, same first weights, same order of batches.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.erasure import remaining
from attribution.influence.recorded_run import EXACT_SHARE, Fidelity, KeptStates, fidelity
from attribution.influence.replay import LoraRun
from attribution.influence.store import Trace
from attribution.influence.unrolled import QUERIES_AT_ONCE, QuerySet, unrolled_scores
from configs.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from attribution.trail import Trail

LABEL = "audit: causal for small removals"
METHOD = "unrolled-adamw/v1"
DOES_NOT_ADD_UP = (
    "These are derivatives: they do not add up to the value that training created. Adam does not care how large the "
    "loss is, so the effects of all rows nearly cancel (Euler's identity), whatever the rows are worth."
)
SMALL_SHARE = 0.05
"""A contributor with more of the rows than this is no small removal: the sum of their rows' effects is only a hint."""
MICRO = 1_000_000


class AuditError(UserError):
    """An answer that cannot be audited; the message says what can still be said of it."""


@dataclass(frozen=True)
class Question:
    """What is to be explained: a receipted completion, or a query set (both receipt fields are empty)."""

    name: str
    queries: QuerySet
    num_target_tokens: int
    receipt_id: str = ""
    receipt_leaf: str = ""


@dataclass(frozen=True)
class Swept:
    """What one worker found for some questions on one adapter: scores float64 [q, n], losses float64 [q]."""

    scores: "NDArray[np.float64]"
    losses: "NDArray[np.float64]"
    fidelity: Fidelity
    cpu_seconds: float
    num_threads: int


@dataclass(frozen=True)
class AuditedRow:
    """A training row and the nats per token by which the answer's loss would rise without it (negative: fall)."""

    example_id: str
    contributor: str
    name: str
    effect: float
    text: str


@dataclass(frozen=True)
class AuditedContributor:
    """The summed effects of a contributor's rows. `is_small`: whether removing them all is a small removal."""

    key_id: str
    name: str
    effect: float
    num_rows: int
    share_of_rows: float
    is_small: bool


@dataclass(frozen=True)
class Audit:
    """The answer to "what would this answer lose without these rows?", in nats per target token.

    `cancellation`: |sum of effects| over the sum of their sizes. `cpu_seconds`: of the sweep that this question shared
    with `num_shared` others. `record`: leaf hash of the influence record, empty when none was made.
    """

    question: str
    receipt_id: str
    adapter: str
    adapter_name: str
    loss: float
    num_target_tokens: int
    contributors: tuple[AuditedContributor, ...]
    helped: tuple[AuditedRow, ...]
    hindered: tuple[AuditedRow, ...]
    num_rows: int
    fidelity: Fidelity
    is_exact: bool
    cancellation: float
    cpu_seconds: float
    num_shared: int
    method: str
    label: str
    caveats: tuple[str, ...]
    seed: int
    record: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """A question and the artefacts that answer it."""

    question: Question
    base: str
    adapter: str
    adapter_name: str


def ask_of_receipt(trail: "Trail", receipt_id: str) -> Asked:
    """Return what a receipt asks. Raises AuditError for one that is unknown, of the base model, or without a target."""
    from attribution.influence.query import Completion
    from attribution.receipts import find_receipt, receipt_content

    stored = find_receipt(trail, receipt_id)
    if stored is None:
        raise AuditError(f"receipt {receipt_id!r}: not in this home's log; `trailmark log show` lists what is")
    receipt = stored.row.receipt
    if receipt["adapter"] is None:
        raise AuditError(
            f"receipt {receipt['id']}: the base model alone answered, whose training nobody recorded here: no row of "
            "this home made it, and there is nothing to audit"
        )
    content = receipt_content(trail, receipt["id"])
    completion = Completion(tuple(content["prompt_token_ids"]), tuple(content["output_token_ids"]))
    num_targets = len(completion.output_token_ids) - (not completion.prompt_token_ids)
    if num_targets < 1:
        raise AuditError(
            f"receipt {receipt['id']}: the completion has no token that was predicted from another, so nothing made "
            f"it; its lineage still says who is behind {receipt['adapter_name']} (`trailmark lineage`)"
        )
    question = Question(f"receipt {receipt['id']}", [completion.encoded], num_targets, receipt["id"], stored.leaf_hash)
    return Asked(question, receipt["base"], receipt["adapter"], receipt["adapter_name"] or receipt["model"])


def trace_of(trail: "Trail", adapter: str) -> Trace:
    """Return an adapter's trace. Raises AuditError when it has none, TraceError when it cannot be replayed."""
    digest = remaining(trail, str(trail.store.manifest(adapter).meta.get("trace") or ""))
    if not digest or not trail.store.has(digest):
        raise AuditError(
            f"adapter {adapter[:19]}: it has no training trace (trained elsewhere, merged, or its trace was removed), "
            "so its run cannot be replayed; its lineage still says who is behind it (`trailmark lineage`)"
        )
    trace = Trace(trail.store.get_directory(digest))
    trace.facts  # noqa: B018 - refuses a trace without a recorder, and says what is left
    return trace


def sweep(
    base: Path, adapter: Path, trace: Trace, questions: Sequence[QuerySet], *, queries_at_once: int = QUERIES_AT_ONCE
) -> Swept:
    """Replay the run and differentiate every question through it; the unit of work of one process."""
    import torch

    started = time.process_time()
    run = LoraRun.of_trace(trace, load_model(base, adapter))
    states = KeptStates(trace, run)
    replayed = run.run()
    found = unrolled_scores(run, questions, states=states, queries_at_once=queries_at_once)
    seen = fidelity(run, states, drift=found.drift, replayed=replayed)
    if not math.isfinite(seen.max_abs_diff):
        raise AuditError(f"trace {trace.path.name}: the replay ends in weights that are not finite; it says nothing")
    return Swept(found.scores, found.losses, seen, time.process_time() - started, torch.get_num_threads())


def load_model(base: Path, adapter: Path) -> Any:
    """Return the base in float32 with the adapter on it, gradients to the base switched off."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    plain.requires_grad_(False)
    return PeftModel.from_pretrained(plain, str(adapter)).eval()


def audits_of(
    trail: "Trail", asked: Sequence[Asked], trace: Trace, swept: Swept, *, num_top: int, record: bool
) -> list[Audit]:
    """Return one audit for each question that shared a sweep; `record` writes those of receipts to the log."""
    from attribution.lineage import Lineage

    names = dict(Lineage(trail).contributor_names())
    audits = []
    for place, one in enumerate(asked):
        leaf = _record(trail, one, trace, swept, swept.scores[place]) if record and one.question.receipt_id else ""
        audits.append(_audit(one, trace, swept, place, names=names, num_top=num_top, record=leaf, shared=len(asked)))
    return audits


def _audit(
    asked: Asked,
    trace: Trace,
    swept: Swept,
    place: int,
    *,
    names: dict[str, str],
    num_top: int,
    record: str,
    shared: int,
) -> Audit:
    import numpy as np

    effects = swept.scores[place]
    order = sorted(range(len(effects)), key=lambda row: (-effects[row], row))
    contributors = _contributors(trace, effects, names)
    question = asked.question
    return Audit(
        question=question.name,
        receipt_id=question.receipt_id,
        adapter=asked.adapter,
        adapter_name=asked.adapter_name,
        loss=float(swept.losses[place]),
        num_target_tokens=question.num_target_tokens,
        contributors=contributors,
        helped=tuple(_row(trace, row, effects, names) for row in order[:num_top] if effects[row] > 0),
        hindered=tuple(_row(trace, row, effects, names) for row in order[::-1][:num_top] if effects[row] < 0),
        num_rows=len(effects),
        fidelity=swept.fidelity,
        is_exact=swept.fidelity.is_exact,
        cancellation=float(abs(effects.sum()) / max(np.abs(effects).sum(), np.finfo(np.float64).tiny)),
        cpu_seconds=swept.cpu_seconds,
        num_shared=shared,
        method=_method(trace, swept.fidelity),
        label=LABEL if swept.fidelity.is_exact else _not_exact(swept.fidelity),
        caveats=tuple(_caveats(question, trace, swept.fidelity, contributors)),
        seed=trace.facts.seed,
        record=record,
    )


def _row(trace: Trace, row: int, effects: "NDArray[np.float64]", names: dict[str, str]) -> AuditedRow:
    example = trace.examples[row]
    name = names.get(example.contributor, example.contributor[:12])
    return AuditedRow(example.example_id, example.contributor, name, float(effects[row]), example.text)


def _contributors(
    trace: Trace, effects: "NDArray[np.float64]", names: dict[str, str]
) -> tuple[AuditedContributor, ...]:
    rows_of: dict[str, list[int]] = {}
    for row, example in enumerate(trace.examples):
        rows_of.setdefault(example.contributor, []).append(row)
    found = []
    for key_id, rows in rows_of.items():
        share = len(rows) / len(effects)
        name, effect = names.get(key_id, key_id[:12]), float(effects[rows].sum())
        found.append(AuditedContributor(key_id, name, effect, len(rows), share, share <= SMALL_SHARE))
    return tuple(sorted(found, key=lambda part: (-part.effect, part.key_id)))


def _not_exact(seen: Fidelity) -> str:
    return (
        f"not exact: the replay ends {seen.share_of_move:.1e} of training's way from the recorded weights (over "
        f"{EXACT_SHARE:g}), so no causal claim; read it as a ranking"
    )


def _caveats(question: Question, trace: Trace, seen: Fidelity, contributors: Sequence[AuditedContributor]) -> list[str]:
    found = [DOES_NOT_ADD_UP]
    if not seen.is_exact:
        found.append(
            f"The replay diverges: a final weight differs by {seen.max_abs_diff:.2e}. The run was of dtype "
            f"{trace.facts.dtype} on {trace.facts.device}, with {trace.facts.attention} attention; train again with "
            "train.dtype=float32 on the kind of machine that audits."
        )
    if question.num_target_tokens == 1:
        found.append("The completion has one token: its effects are on one probability, and say little of a text.")
    large = [part.name for part in contributors if not part.is_small]
    if large:
        found.append(
            f"{', '.join(large[:3])}{' and others' if len(large) > 3 else ''} gave more than {SMALL_SHARE:.0%} of the "
            "rows: leaving them all out is no small removal, and their sums are hints. `trailmark settle` retrains."
        )
    return found


def _method(trace: Trace, seen: Fidelity) -> str:
    segments = len(trace.state_steps) - 1
    kind = "exact" if seen.is_exact else "NOT exact"
    return (
        f"{METHOD}: reverse sweep through {len(trace.steps)} AdamW updates in {segments} segments; replay {kind}, "
        f"final weights within {seen.max_abs_diff:.1e} ({seen.share_of_move:.1e} of the way); "
        "-dL/dw in nats per token"
    )


def _record(trail: "Trail", asked: Asked, trace: Trace, swept: Swept, effects: "NDArray[np.float64]") -> str:
    """Append an `influence` record of every row's effect, unless it is there already; return its leaf hash.

    It names no shares: effects of small removals are nothing to pay by.
    """
    import pyarrow as pa

    from attribution.bodies import InfluenceBody
    from attribution.records import Artefact

    columns = {
        "example_id": [example.example_id for example in trace.examples],
        "contributor": [example.contributor for example in trace.examples],
        "score_micro": [round(float(effect) * MICRO) for effect in effects],
    }
    question = asked.question
    table = trail.put_table(pa.table(columns))
    method = _method(trace, swept.fidelity)
    body = InfluenceBody(question.receipt_id, question.receipt_leaf, method, table, ())
    for entry in trail.entries(kind="influence"):
        if entry.record is not None and entry.record.body == body:
            return entry.leaf_hash
    made_by = trail.find(asked.adapter)
    entry = trail.record(
        "influence",
        body,
        inputs=(Artefact("adapter", asked.adapter_name, asked.adapter),),
        outputs=(Artefact("table", f"audit of {question.receipt_id}", table),),
        parents=[question.receipt_leaf, *([made_by.leaf_hash] if made_by else [])],
        seed=trace.facts.seed,
    )
    return entry.leaf_hash
