"""The five questions, answered from what exists: numbers with interval, method, seed, cost, records, what is missing.

Evidence of several tiers stands side by side and is never mixed: each finding names its tier, and what that promises.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attribution.answers import Answer, Cost, Finding, Missing, Resampling, Tier, links_of, records_of
from attribution.evidence import (
    MICRO,
    NO_EFFECT,
    TOO_FEW,
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
from attribution.in_run_evidence import in_run_findings
from attribution.paid_evidence import newest_statement, paid_details, paid_findings
from attribution.question_who import ask_who
from attribution.settled_evidence import (
    DATA_KINDS,
    NO_SETTLEMENT,
    newest_settlements,
    settled_cost,
    settled_details,
    settled_findings,
    whole_findings,
)
from attribution.settlement import Settlement
from attribution.statement_names import names_of
from attribution.workflow_effects import recorded_effects
from attribution.workflow_patches import recorded_patches

if TYPE_CHECKING:
    from attribution.trail import Trail

__all__ = [
    "NO_EFFECT", "Answer", "Finding", "Missing", "Resampling",
    "ask_adapter", "ask_dataset", "ask_improved", "ask_value", "ask_who",
]  # fmt: skip

NO_BENCHMARK = Missing("no benchmark of this adapter is recorded", "trailmark benchmark ADAPTER SUITE.jsonl")
NO_ADAPTER = Missing("no adapter is recorded", "trailmark train DATASET --name NAME")
NO_STATEMENT = Missing(
    "settled credit: no statement turns fees into shares, so nothing here is money",
    "trailmark statement, with a fee table, once the adapters are settled; influence alone never pays",
)


def ask_improved(trail: "Trail", adapter: str | None = None, *, resampling: Resampling | None = None) -> Answer:
    """What improved the model? What settlements found in its parts; adapters against their base, versions against the
    one before, patches of workflows.
    """
    resampling = resampling or Resampling()
    adapters = measured_adapters(trail, adapter)
    settled = newest_settlements(trail, {one.digest for one in adapters})
    compared = [*_deltas(adapters), *_version_changes(trail, adapters, resampling)]
    compared += _patch_effects(trail, None if adapter is None else {one.digest for one in adapters})
    improved = sum(finding.verdict == "improved" for finding in compared)
    summary = f"{improved} of {len(compared)} measured differences are improvements"
    method = "benchmark deltas and patch effects as recorded; versions paired by item, Dirichlet bootstrap over items"
    return _answer(
        trail,
        "What improved the model?",
        _with_settled(summary, settled),
        [*settled_findings(settled), *compared],
        _unmeasured(adapters),
        method=method,
        resampling=resampling,
        settled=settled,
        cost=_items_asked(adapters),
    )


def ask_adapter(trail: "Trail", adapter: str | None = None, *, resampling: Resampling | None = None) -> Answer:
    """Which adapter changed performance? Adapters switched off in settlements; every benchmark against the base."""
    resampling = resampling or Resampling()
    adapters = measured_adapters(trail, adapter)
    settled = newest_settlements(trail, {one.digest for one in adapters})
    compared = list(_deltas(adapters))
    changed = sorted({finding.subject for finding in compared if finding.verdict != NO_EFFECT})
    summary = f"{len(changed)} of {len(adapters)} adapters changed a measure" + (
        f": {', '.join(changed)}" if changed else ""
    )
    single = Missing("spread over training seeds: each adapter was trained once", "train again under other seeds")
    return _answer(
        trail,
        "Which adapter changed performance?",
        summary,
        [*whole_findings(trail, settled, resampling), *settled_findings(settled, kinds={"adapter"}), *compared],
        [*_unmeasured(adapters), *([single] if compared and not settled else [])],
        method="paired bootstrap over the suite's items, as recorded by each benchmark",
        resampling=resampling,
        settled=settled,
        cost=_items_asked(adapters),
    )


def ask_dataset(trail: "Trail", adapter: str | None = None, *, resampling: Resampling | None = None) -> Answer:
    """Which dataset mattered? What settlements measured without it; its summed influence over explained and audited
    answers; rows kept of each contribution.
    """
    resampling = resampling or Resampling()
    adapters = measured_adapters(trail, adapter)
    settled = newest_settlements(trail, {one.digest for one in adapters})
    findings = settled_findings(settled, kinds=DATA_KINDS)
    missing: list[Missing] = []
    num_answers = 0
    for one in adapters:
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
    return _answer(
        trail,
        "Which dataset mattered?",
        _with_settled(_dataset_summary(findings, num_answers), settled, kinds=DATA_KINDS),
        findings,
        missing,
        method="rows kept by refinement; scores summed over each dataset's rows, Dirichlet bootstrap over answers",
        resampling=resampling,
        settled=settled,
        cost=(Cost("answers explained before", num_answers, "answers"),) if num_answers else (),
    )


def ask_value(trail: "Trail", *, resampling: Resampling | None = None) -> Answer:
    """What part created value? What each model answered, what its parts were settled to be worth, what was paid."""
    resampling = resampling or Resampling()
    adapters = {one.digest: one for one in measured_adapters(trail)}
    found = served(trail)
    used = {item.model for item in found}
    settled = newest_settlements(trail, adapters.keys() & used)
    newest = newest_statement(trail)
    paid = None if newest is None else (*newest, names_of(trail, newest[1]))
    findings = [*(paid_findings(*paid) if paid else ()), *settled_findings(settled)]
    findings += [finding for item in found for finding in _served_findings(item, found, adapters)]
    findings += _deltas([adapters[item.model] for item in found if item.model in adapters])
    total = sum(item.num_completions for item in found)
    by_base = sum(item.num_completions for item in found if item.is_base)
    summary = f"{total} completions served, {total - by_base} through an adapter, {by_base} by a base alone"
    missing = [] if paid else [NO_STATEMENT]
    if not found:
        missing.insert(0, Missing("no completion is recorded", "trailmark up, then ask the API something"))
    return _answer(
        trail,
        "What part created value?",
        _with_settled(summary, settled),
        findings,
        missing,
        method="counts of receipts; benchmark deltas as recorded",
        resampling=resampling,
        settled=settled,
        details={"paid": paid_details(*paid)} if paid else None,
    )


def _with_settled(summary: str, settled: Sequence[Settlement], *, kinds: frozenset[str] | None = None) -> str:
    """Put what was measured by retraining before what was compared or ranked."""
    players = [player for one in settled for player in one.players if kinds is None or player.kind in kinds]
    if not players:
        return summary
    parts = [
        f"{verdict}: {', '.join(dict.fromkeys(player.name for player in players if player.verdict == verdict))}"
        for verdict in ("helped", "hindered")
        if any(player.verdict == verdict for player in players)
    ]
    told = "; ".join(parts) or "no part had a measurable effect"
    return f"measured by retraining, {told}; {summary}"


def _items_asked(adapters: Sequence[MeasuredAdapter]) -> tuple[Cost, ...]:
    asked = sum(2 * measured.body.num_items for one in adapters for measured in one.benchmarks)
    return (Cost("answers benchmarked before, of adapter and base", asked, "answers"),) if asked else ()


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
    audited, explained = (list(recorded_scores(trail, adapter.digest, audited=flag)) for flag in (True, False))
    findings = [
        *_summed(trail, adapter, items, audited, tier="audit", resampling=resampling),
        *_summed(trail, adapter, items, explained, tier="explain", resampling=resampling),
        *in_run_findings(trail, adapter, items, resampling),
    ]
    return [*findings, *(_kept_finding(item, adapter, refinement) for item in items)], len(explained)


def _summed(
    trail: "Trail",
    adapter: MeasuredAdapter,
    items: Sequence[Contribution],
    recorded: Sequence[tuple[str, dict[str, float]]],
    *,
    tier: Tier,
    resampling: Resampling,
) -> Iterator[Finding]:
    """The mean over answers of each contribution's summed scores, of one tier."""
    if not recorded:
        return
    leaves = [item.leaf_hash for item in items]
    sums = dataset_scores([scores for _, scores in recorded], dataset_of_examples(trail, adapter), leaves)
    what, unit = "predicted gain", "nats per answer"
    if tier == "audit":
        what, unit = "exact derivative (a hint beyond 5 % of the rows)", "nats per token"
    for item in items:
        spread = resampled_mean(sums[item.leaf_hash], **asdict(resampling))
        verdict = "helped" if spread.value > 0 else "hindered"
        if not spread.is_distinct:
            verdict = NO_EFFECT if spread.is_enough else TOO_FEW
        has_spread = len(recorded) > 1
        yield Finding(
            item.name,
            f"mean {what} of {adapter.label} over {_answers(len(recorded), tier)}",
            spread.value,
            spread.low if has_spread else None,
            spread.high if has_spread else None,
            unit,
            verdict,
            (item.leaf_hash, *(leaf for leaf, _ in recorded)),
            resampling.confidence if has_spread else None,
            tier=tier,
            kind="dataset",
        )


def _kept_finding(item: Contribution, adapter: MeasuredAdapter, refinement: str) -> Finding:
    verdict = "trained on" if item.num_kept else "dropped by refinement"
    measure = f"rows of {item.num_rows} kept for {adapter.label}"
    links = (item.leaf_hash, refinement)
    return Finding(
        item.name, measure, item.num_kept, None, None, "rows", verdict, links, tier="counted", kind="dataset"
    )


def _answers(count: int, tier: str) -> str:
    return f"{count} {tier}ed answer{'' if count == 1 else 's'}"


def _dataset_summary(findings: Sequence[Finding], num_answers: int) -> str:
    scored = [finding for finding in findings if finding.tier == "explain" and finding.unit == "nats per answer"]
    if not scored:
        return "rows are counted, but no explained answer says which dataset mattered"
    helped = [finding.subject for finding in scored if finding.verdict == "helped"]
    return f"over {_answers(num_answers, 'explain')} these datasets helped: {', '.join(helped) or 'none measurably'}"


def _served_findings(item: Served, found: Sequence[Served], adapters: dict[str, MeasuredAdapter]) -> Iterator[Finding]:
    subject = adapters[item.model].label if item.model in adapters else f"base {item.model[7:19]}"
    total = sum(other.num_completion_tokens for other in found)
    share = item.num_completion_tokens / total if total else 0.0
    verdict = "base model alone" if item.is_base else "through an adapter"
    counts = (
        ("completions", item.num_completions, "receipts"),
        ("completion tokens", item.num_completion_tokens, "tokens"),
        ("share of completion tokens", share, "of 1"),
    )
    kind = "base" if item.is_base else "adapter"
    for measure, value, unit in counts:
        yield Finding(subject, measure, value, None, None, unit, verdict, item.links, tier="counted", kind=kind)


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


def _answer(
    trail: "Trail",
    question: str,
    summary: str,
    findings: Sequence[Finding],
    missing: Sequence[Missing],
    *,
    method: str,
    resampling: Resampling,
    settled: Sequence[Settlement] = (),
    cost: tuple[Cost, ...] = (),
    details: dict[str, Any] | None = None,
) -> Answer:
    methods = dict.fromkeys(one.method for one in settled)
    return Answer(
        question=question,
        summary=summary,
        findings=tuple(findings),
        missing=(*missing, *(() if settled else (NO_SETTLEMENT,))),
        method="; ".join([*methods, method]),
        confidence=resampling.confidence,
        seed=resampling.seed,
        details={**({"settlements": settled_details(trail, settled)} if settled else {}), **(details or {})},
        cost=(*settled_cost(trail, settled), *cost),
        records=records_of(trail, links_of(findings)),
    )
