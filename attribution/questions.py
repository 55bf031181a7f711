"""The five questions, answered from what exists: numbers with interval, method, seed, records, and what is missing."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from attribution.evidence import (
    MICRO,
    NO_EFFECT,
    Contribution,
    MeasuredAdapter,
    Served,
    Spread,
    contributions,
    dataset_of_examples,
    dataset_scores,
    delta,
    measured_adapters,
    recorded_scores,
    resampled_mean,
    served,
    verdict_of,
    version_change,
)
from attribution.workflow_effects import recorded_effects
from attribution.workflow_patches import recorded_patches

if TYPE_CHECKING:
    from attribution.trail import Trail


@dataclass(frozen=True)
class Finding:
    """One number. `low` and `high` are None for a plain count; `links` are leaf hashes of the records it rests on.

    `confidence` is that of the interval, None without one or when the record no longer says.
    """

    subject: str
    measure: str
    value: float
    low: float | None
    high: float | None
    unit: str
    verdict: str
    links: tuple[str, ...]
    confidence: float | None = None


@dataclass(frozen=True)
class Missing:
    """Evidence that would make the answer firmer, and what supplies it."""

    evidence: str
    remedy: str


@dataclass(frozen=True)
class Answer:
    """The reply to one of the five questions. `details` is the whole attribution for "who", else empty."""

    question: str
    summary: str
    findings: tuple[Finding, ...]
    missing: tuple[Missing, ...]
    method: str
    confidence: float
    seed: int
    details: dict[str, Any]

    @property
    def links(self) -> tuple[str, ...]:
        """Leaf hashes of every record the answer rests on, each once."""
        return tuple(dict.fromkeys(link for finding in self.findings for link in finding.links))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, floats rounded to a millionth."""
        from attribution.influence.answer import plain

        return plain({**asdict(self), "links": self.links})


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn where a record does not already hold one."""

    num_draws: int = 2000
    confidence: float = 0.9
    seed: int = 0


ABLATION = Missing(
    "cause: which of data, rank, steps or seed made the difference was not tested",
    "train again without one of them and benchmark both on the same suite; coalition retrains will do this at scale",
)
NO_BENCHMARK = Missing("no benchmark of this adapter is recorded", "trailmark benchmark ADAPTER SUITE.jsonl")
NO_ADAPTER = Missing("no adapter is recorded", "trailmark train DATASET --name NAME")
NO_SETTLEMENT = Missing(
    "settled credit: no statement turns fees into shares, so nothing here is money",
    "a fee table and coalition retrains per period; influence alone never pays",
)


def ask_who(trail: "Trail", receipt_id: str, *, explain: Callable[[str], dict[str, Any]]) -> Answer:
    """Who made this completion? `explain` returns `Attribution.to_dict()`, computed here or by a scorer."""
    found = explain(receipt_id)
    links = [found["receipt_leaf"]]
    if found["adapter"] is not None:
        made = trail.find(found["adapter"])
        links += [made.leaf_hash] if made else []
    findings = tuple(
        Finding(
            subject=part["name"],
            measure="share",
            value=part["share"],
            low=part["low"],
            high=part["high"],
            unit="of 1",
            verdict=_paid(part),
            links=tuple(links),
            confidence=found["confidence"],
        )
        for part in found["contributors"]
    )
    missing = [Missing("cause: shares are stable under reweighting, not tested by retraining", ABLATION.remedy)]
    if found["adapter"] is not None and not found["base_did_it"] and not found["contributors"]:
        missing.insert(0, Missing(found["reason"], "train the adapter with `trailmark train`, which leaves a trace"))
    return Answer(
        question="Who made this answer?",
        summary=_who_summary(found),
        findings=findings or (_base_finding(found, tuple(links)),),
        missing=tuple(missing),
        method=found["method"],
        confidence=found["confidence"],
        seed=found["seed"],
        details=found,
    )


def ask_improved(trail: "Trail", adapter: str | None = None, *, resampling: Resampling | None = None) -> Answer:
    """What improved the model? Adapters against their base, versions against the one before, patches of workflows."""
    resampling = resampling or Resampling()
    adapters = measured_adapters(trail, adapter)
    findings = [*_deltas(adapters), *_version_changes(trail, adapters, resampling)]
    findings += _patch_effects(trail, None if adapter is None else {one.digest for one in adapters})
    improved = sum(finding.verdict == "improved" for finding in findings)
    summary = f"{improved} of {len(findings)} measured differences are improvements"
    method = "benchmark deltas and patch effects as recorded; versions paired by item, Dirichlet bootstrap over items"
    return _answer(
        "What improved the model?", summary, findings, [*_unmeasured(adapters), ABLATION], method, resampling
    )


def ask_adapter(trail: "Trail", adapter: str | None = None, *, resampling: Resampling | None = None) -> Answer:
    """Which adapter changed performance? Every benchmark of every adapter against its base."""
    resampling = resampling or Resampling()
    adapters = measured_adapters(trail, adapter)
    findings = list(_deltas(adapters))
    changed = sorted({finding.subject for finding in findings if finding.verdict != NO_EFFECT})
    summary = f"{len(changed)} of {len(adapters)} adapters changed a measure" + (
        f": {', '.join(changed)}" if changed else ""
    )
    single = Missing("spread over training seeds: each adapter was trained once", "train again under other seeds")
    missing = [*_unmeasured(adapters), *([single] if findings else [])]
    method = "paired bootstrap over the suite's items, as recorded by each benchmark"
    return _answer("Which adapter changed performance?", summary, findings, missing, method, resampling)


def ask_dataset(trail: "Trail", adapter: str | None = None, *, resampling: Resampling | None = None) -> Answer:
    """Which dataset mattered? Rows kept of each contribution, and its summed influence over explained answers."""
    resampling = resampling or Resampling()
    findings: list[Finding] = []
    missing: list[Missing] = []
    num_answers = 0
    for one in measured_adapters(trail, adapter):
        of_adapter, seen = _dataset_findings(trail, one, resampling)
        findings += of_adapter
        num_answers += seen
        if not of_adapter:
            missing.append(
                Missing(f"{one.label}: its refined dataset is not in this log", "trailmark refine, then train")
            )
        elif not seen:
            missing.append(
                Missing(f"{one.label}: no influence is recorded", "trailmark ask who RECEIPT, for some receipts")
            )
    if not findings and not missing:
        missing.append(NO_ADAPTER)
    summary = _dataset_summary(findings, num_answers)
    method = "rows kept by refinement; predicted gain summed over each dataset's rows, Dirichlet bootstrap over answers"
    return _answer("Which dataset mattered?", summary, findings, [*missing, ABLATION], method, resampling)


def ask_value(trail: "Trail", *, resampling: Resampling | None = None) -> Answer:
    """What part created value? What each model answered, beside what it was measured to change."""
    resampling = resampling or Resampling()
    adapters = {one.digest: one for one in measured_adapters(trail)}
    found = served(trail)
    findings = [finding for item in found for finding in _served_findings(item, found, adapters)]
    findings += _deltas([adapters[item.model] for item in found if item.model in adapters])
    total = sum(item.num_completions for item in found)
    by_base = sum(item.num_completions for item in found if item.is_base)
    summary = f"{total} completions served, {total - by_base} through an adapter, {by_base} by a base alone"
    missing = [NO_SETTLEMENT]
    if not found:
        missing.insert(0, Missing("no completion is recorded", "trailmark up, then ask the API something"))
    method = "counts of receipts; benchmark deltas as recorded"
    return _answer("What part created value?", summary, findings, missing, method, resampling)


def _deltas(adapters: Sequence[MeasuredAdapter]) -> Iterator[Finding]:
    """Each recorded metric of each adapter, adapter minus base."""
    for one in adapters:
        for measured in one.benchmarks:
            for metric in measured.body.metrics:
                measure = f"{metric.metric} on {measured.body.name} ({metric.num_items} items), against the base"
                links = (measured.leaf_hash, one.leaf_hash)
                yield _finding(one.label, measure, metric.metric, delta(metric), links, measured.confidence)


def _version_changes(trail: "Trail", adapters: Sequence[MeasuredAdapter], resampling: Resampling) -> Iterator[Finding]:
    """Each published version against the one before it, on suites both were asked."""
    by_reference = {reference: one for one in measured_adapters(trail) for reference in one.references}
    wanted = {one.digest for one in adapters}
    for reference, newer in by_reference.items():
        name, _, version = reference.rpartition("@")
        older = by_reference.get(f"{name}@{int(version) - 1}")
        if older is None or older.digest == newer.digest or newer.digest not in wanted:
            continue
        change = _data_change(trail, older, newer)
        for old, new in itertools.product(older.benchmarks, newer.benchmarks):
            links = (old.leaf_hash, new.leaf_hash, newer.leaf_hash)
            for metric, spread in version_change(trail, old.body, new.body, **asdict(resampling)).items():
                measure = f"{metric} on {new.body.name}, against version {int(version) - 1} ({change})"
                yield _finding(reference, measure, metric, spread, links, resampling.confidence)


def _patch_effects(trail: "Trail", wanted: set[str] | None) -> Iterator[Finding]:
    """What each patch of a workflow was measured to do, under its author's name; of `wanted` adapters, if given."""
    patches = {patch.leaf_hash: patch for patch in recorded_patches(trail)}
    for effect in recorded_effects(trail):
        if wanted is not None and wanted.isdisjoint(effect.adapters):
            continue
        named = [patches[leaf] for leaf in effect.body.patches if leaf in patches]
        authors = ", ".join(dict.fromkeys(patch.author for patch in named))
        why = "; ".join(patch.reason for patch in named)
        also = f"; {', '.join(effect.body.also_changed)} changed too" if effect.body.also_changed else ""
        confidence = effect.body.confidence_micro / MICRO
        for change in effect.body.changes:
            spread = Spread(change.delta_micro / MICRO, change.low_micro / MICRO, change.high_micro / MICRO)
            measure = f"{change.metric} on {change.benchmark} after the patch {why!r} of {effect.body.workflow}{also}"
            links = (effect.leaf_hash, *effect.body.patches)
            yield _finding(f"{authors} (patch)", measure, change.metric, spread, links, confidence)


def _data_change(trail: "Trail", older: MeasuredAdapter, newer: MeasuredAdapter) -> str:
    """Say how the data of two versions differ: contributions that came or went, and rows."""
    if older.body.dataset == newer.body.dataset:
        return "same data"
    before, after = ({item.leaf_hash: item for item in contributions(trail, one)[1]} for one in (older, newer))
    came = [item.name for leaf, item in after.items() if leaf not in before]
    went = [item.name for leaf, item in before.items() if leaf not in after]
    rows = sum(item.num_kept for item in after.values()) - sum(item.num_kept for item in before.values())
    changes = [f"{rows:+d} rows"] + [f"with {name}" for name in came] + [f"without {name}" for name in went]
    return ", ".join(changes)


def _dataset_findings(trail: "Trail", adapter: MeasuredAdapter, resampling: Resampling) -> tuple[list[Finding], int]:
    """Return the findings on an adapter's contributions and the number of explained answers they rest on."""
    refinement, items = contributions(trail, adapter)
    if refinement is None:
        return [], 0
    recorded = list(recorded_scores(trail, adapter.digest))
    sums = dataset_scores(
        [scores for _, scores in recorded], dataset_of_examples(trail, adapter), [item.leaf_hash for item in items]
    )
    findings = []
    for item in items:
        findings.append(_kept_finding(item, adapter, refinement))
        if recorded:
            spread = resampled_mean(sums[item.leaf_hash], **asdict(resampling))
            links = (item.leaf_hash, *(leaf for leaf, _ in recorded))
            measure = f"mean predicted gain of {adapter.label} over {len(recorded)} explained answers"
            verdict = NO_EFFECT if not spread.is_distinct else ("helped" if spread.value > 0 else "hindered")
            bounds = (spread.value, spread.low, spread.high)
            findings.append(
                Finding(item.name, measure, *bounds, "nats per answer", verdict, links, resampling.confidence)
            )
    return findings, len(recorded)


def _kept_finding(item: Contribution, adapter: MeasuredAdapter, refinement: str) -> Finding:
    verdict = "trained on" if item.num_kept else "dropped by refinement"
    measure = f"rows of {item.num_rows} kept for {adapter.label}"
    return Finding(item.name, measure, item.num_kept, None, None, "rows", verdict, (item.leaf_hash, refinement))


def _dataset_summary(findings: Sequence[Finding], num_answers: int) -> str:
    scored = [finding for finding in findings if finding.low is not None]
    if not scored:
        return "rows are counted, but no explained answer says which dataset mattered"
    helped = [finding.subject for finding in scored if finding.verdict == "helped"]
    return f"over {num_answers} explained answers these datasets helped: {', '.join(helped) or 'none measurably'}"


def _served_findings(item: Served, found: Sequence[Served], adapters: dict[str, MeasuredAdapter]) -> Iterator[Finding]:
    subject = adapters[item.model].label if item.model in adapters else f"base {item.model[7:19]}"
    total = sum(other.num_completion_tokens for other in found)
    share = item.num_completion_tokens / total if total else 0.0
    verdict = "base model alone" if item.is_base else "through an adapter"
    yield Finding(subject, "completions", item.num_completions, None, None, "receipts", verdict, item.links)
    yield Finding(subject, "completion tokens", item.num_completion_tokens, None, None, "tokens", verdict, item.links)
    yield Finding(subject, "share of completion tokens", share, None, None, "of 1", verdict, item.links)


def _finding(
    subject: str, measure: str, metric: str, spread: Spread, links: tuple[str, ...], confidence: float | None
) -> Finding:
    unit, verdict = "nats per token" if metric == "loss" else "of 1", verdict_of(metric, spread)
    return Finding(subject, measure, spread.value, spread.low, spread.high, unit, verdict, links, confidence)


def _unmeasured(adapters: Sequence[MeasuredAdapter]) -> list[Missing]:
    if not adapters:
        return [NO_ADAPTER]
    return [
        Missing(f"{one.label}: {NO_BENCHMARK.evidence}", NO_BENCHMARK.remedy) for one in adapters if not one.benchmarks
    ]


def _paid(part: dict[str, Any]) -> str:
    if part["share"] > 0:
        return "credited"
    return "cannot be told from zero" if part["score"] > 0 else "did not help"


def _base_finding(found: dict[str, Any], links: tuple[str, ...]) -> Finding:
    gain = found["gain_nats"]
    verdict = "the base made it" if found["base_did_it"] else "the adapter made it, its rows are unknown"
    if gain is None:
        return Finding("base model", "adapter's part", 0.0, None, None, "of 1", verdict, links)
    measure = "adapter's gain over the base per token"
    return Finding("adapter", measure, gain["mean"], gain["low"], gain["high"], "nats per token", verdict, links)


def _who_summary(found: dict[str, Any]) -> str:
    if found["base_did_it"]:
        return f"The base model made it: {found['reason']}."
    credited = [part for part in found["contributors"] if part["share"] > 0]
    if not credited:
        return f"The adapter {found['adapter_name']} made it; {found['reason']}."
    named = ", ".join(f"{part['name']} {part['share']:.0%}" for part in credited[:3])
    return f"The adapter {found['adapter_name']} made it, mostly on rows of {named}."


def _answer(
    question: str,
    summary: str,
    findings: Sequence[Finding],
    missing: Sequence[Missing],
    method: str,
    resampling: Resampling,
) -> Answer:
    return Answer(
        question=question,
        summary=summary,
        findings=tuple(findings),
        missing=tuple(missing),
        method=method,
        confidence=resampling.confidence,
        seed=resampling.seed,
        details={},
    )
