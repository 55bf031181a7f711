"""Audit receipts and query sets: one sweep for all questions on an adapter, as Ray tasks when a cluster is up."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.influence.audit import (
    Asked,
    Audit,
    AuditError,
    Question,
    Swept,
    ask_of_receipt,
    audits_of,
    sweep,
    trace_of,
)
from attribution.influence.unrolled import QUERIES_AT_ONCE
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.influence.unrolled import QuerySet
    from attribution.trail import Trail

TASK_CPUS = 1


@dataclass(frozen=True)
class Refused:
    """A question that could not be audited, and what can still be said."""

    question: str
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """All answers of one command, in the order asked, and what was refused."""

    audits: tuple[Audit, ...]
    refused: tuple[Refused, ...]


@dataclass(frozen=True)
class _Job:
    """The questions of one sweep and where its parts lie."""

    asked: tuple[Asked, ...]
    base: Path
    adapter: Path
    trace: Path

    @property
    def questions(self) -> "list[QuerySet]":
        return [one.question.queries for one in self.asked]


def audit(
    trail: "Trail", asked: Sequence[Asked], *, num_top: int = 5, record: bool = True, on_cluster: bool = False
) -> AuditReport:
    """Sweep once for every adapter (and QUERIES_AT_ONCE questions) and return the audits in the order asked.

    `on_cluster`: sweeps run as tasks of the Ray that this process is connected to; the records are appended here.
    """
    jobs, refused = _jobs(trail, asked)
    audits: dict[str, Audit] = {}
    for job, swept in zip(jobs, _run_all(jobs, on_cluster=on_cluster), strict=True):
        if isinstance(swept, UserError):
            refused += [Refused(one.question.name, str(swept)) for one in job.asked]
            continue
        trace = trace_of(trail, job.asked[0].adapter)
        found = audits_of(trail, job.asked, trace, swept, num_top=num_top, record=record)
        audits |= {each.question: each for each in found}
    order = [one.question.name for one in asked]
    return AuditReport(tuple(audits[name] for name in order if name in audits), tuple(refused))


def ask_of_receipts(trail: "Trail", receipt_ids: Iterable[str]) -> tuple[list[Asked], list[Refused]]:
    """Return what can be asked of the receipts, and the rest with the reason."""
    asked, refused = [], []
    for receipt_id in receipt_ids:
        try:
            asked.append(ask_of_receipt(trail, receipt_id))
        except UserError as error:
            refused.append(Refused(f"receipt {receipt_id}", str(error)))
    return asked, refused


def draw_receipts(trail: "Trail", count: int, *, seed: int) -> list[str]:
    """Return up to `count` receipt ids of the home, drawn by a hash of (seed, id): anyone can draw the same."""
    from attribution.receipt_index import ReceiptIndex

    every = ReceiptIndex(trail).all()
    if not every:
        raise AuditError("--sample: this home has no receipt yet; serve a completion first")
    return sorted(every, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[:count]


def ask_of_suite(trail: "Trail", reference: str, *, adapter: str) -> Asked:
    """Return a query set's question to one adapter (name, name@version or digest): the mean loss over its answers."""
    from transformers import AutoTokenizer

    from attribution.bodies import AdapterBody
    from attribution.influence.encode import num_targets
    from pipelines.train.queries import read_query_sets

    digest = adapter if adapter.startswith("sha256:") else trail.registry.resolve(adapter, "adapter").digest
    entry = trail.find(digest)
    if entry is None or entry.record is None or not isinstance(entry.record.body, AdapterBody):
        raise AuditError(f"--adapter {adapter!r}: no adapter trained in this home; `trailmark ask adapter` lists them")
    body = entry.record.body
    tokenizer = AutoTokenizer.from_pretrained(trail.store.get_directory(body.base), local_files_only=True)
    (found,) = read_query_sets(trail, [reference], tokenizer, max_length=tokenizer.model_max_length)
    queries = [item.encoded for item in found.items]
    question = Question(f"query set {found.name}", queries, sum(num_targets(labels) for _, labels in queries))
    return Asked(question, body.base, digest, body.name)


def _jobs(trail: "Trail", asked: Sequence[Asked]) -> tuple[list[_Job], list[Refused]]:
    by_adapter: dict[tuple[str, str], list[Asked]] = {}
    for one in asked:
        by_adapter.setdefault((one.base, one.adapter), []).append(one)
    jobs: list[_Job] = []
    refused: list[Refused] = []
    for (base, adapter), group in by_adapter.items():
        try:
            trace = trace_of(trail, adapter).path
            folders = (trail.store.get_directory(base), trail.store.get_directory(adapter), trace)
        except UserError as error:
            refused += [Refused(one.question.name, str(error)) for one in group]
            continue
        for start in range(0, len(group), QUERIES_AT_ONCE):
            jobs.append(_Job(tuple(group[start : start + QUERIES_AT_ONCE]), *folders))
    return jobs, refused


def _run_all(jobs: Sequence[_Job], *, on_cluster: bool) -> "list[Swept | UserError]":
    if not on_cluster:
        return [_run(job) for job in jobs]
    import ray

    task = ray.remote(num_cpus=TASK_CPUS)(_run)
    return ray.get([task.remote(job) for job in jobs])


def _run(job: _Job) -> "Swept | UserError":
    """Sweep one job; a mistake of the user's comes back as a value, so that other adapters' answers are not lost."""
    from attribution.influence.store import Trace

    try:
        return sweep(job.base, job.adapter, Trace(job.trace), job.questions)
    except UserError as error:
        return UserError(str(error))
