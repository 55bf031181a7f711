"""What patches of a workflow did to the outcome: benchmarks before and after, paired item by item, as a record."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from attribution.bodies import BenchmarkBody, MetricChange, WorkflowEffectBody
from attribution.evidence import MICRO, NO_EFFECT, Spread, version_change
from attribution.evidence import verdict_of as metric_verdict
from attribution.records import Artefact, Party
from attribution.workflow_patches import Patch, recorded_patches
from attribution.workflow_runs import GOOD, Run, StepRun

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail


@dataclass(frozen=True)
class Effect:
    """A recorded effect of patches."""

    leaf_hash: str
    index: int
    time_us: int
    adapters: tuple[str, ...]
    body: WorkflowEffectBody


@dataclass(frozen=True)
class Resampling:
    """How the interval of a change is drawn."""

    num_draws: int
    confidence: float
    seed: int


def recorded_effects(trail: "Trail", workflow: str | None = None) -> list[Effect]:
    """Return the effects recorded for one workflow, or for all, in order of the log."""
    found = []
    for entry in trail.entries(kind="workflow_effect"):
        body = entry.record.body if entry.record is not None else None
        if entry.record is None or not isinstance(body, WorkflowEffectBody) or workflow not in (None, body.workflow):
            continue
        adapters = tuple(item.digest for item in entry.record.inputs if item.kind == "adapter")
        found.append(Effect(entry.leaf_hash, entry.index, entry.leaf.time_us, adapters, body))
    return found


def record_effect(trail: "Trail", run: Run, runs: Sequence[Run], *, resampling: Resampling) -> "Entry | None":
    """Append what the patches since the last measured run did to `run`, which is recorded; None when there are none.

    `runs` are the workflow's earlier attempts. Benchmarks are paired item by item under the same step and suite.
    """
    pending = _pending_patches(trail, run.workflow)
    after = _measured(trail, run)
    if not pending or (not after and run.status != "done"):
        return None
    base_index = pending[0].index
    earlier = [other for other in runs if trail.entry_index(other.leaf_hash) < base_index]
    before_run = next((other for other in reversed(earlier) if _measured(trail, other)), None)
    before = _measured(trail, before_run) if before_run is not None else {}
    changes = [change for name in after for change in _changes(trail, name, before.get(name), after[name], resampling)]
    verdict = _verdict(changes)
    also = _also_changed(trail, before_run, run) if before_run is not None else ()
    compared = [entry for name in after if name in before for entry in (before[name], after[name])] if changes else []
    body = WorkflowEffectBody(
        workflow=run.workflow,
        patches=tuple(patch.leaf_hash for patch in pending),
        verdict=verdict,
        reason="" if changes else _why_unmeasured(before_run, before, after),
        confidence_micro=round(resampling.confidence * MICRO),
        changes=tuple(changes),
        also_changed=also,
    )
    return trail.record(
        "workflow_effect",
        body,
        inputs=list(dict.fromkeys(_adapter_of(entry) for entry in compared)),
        contributors=[Party(trail.keys.get("operator").key_id, "operator")],
        parents=list(dict.fromkeys([*body.patches, run.leaf_hash, *(entry.leaf_hash for entry in compared)])),
        config=run.definition,
        seed=resampling.seed,
    )


def verdict_of(change: MetricChange) -> str:
    """Return `improved`, `worsened`, or that the interval holds zero."""
    return metric_verdict(change.metric, Spread(change.delta_micro, change.low_micro, change.high_micro))


def _pending_patches(trail: "Trail", workflow: str) -> list[Patch]:
    """The patches whose effect is not recorded; a workflow's first definition changed nothing."""
    told = {leaf for effect in recorded_effects(trail, workflow) for leaf in effect.body.patches}
    return [patch for patch in recorded_patches(trail, workflow) if patch.before and patch.leaf_hash not in told]


def _measured(trail: "Trail", run: Run) -> "dict[str, Entry]":
    """The benchmark record of each benchmark step, empty unless all of the run's ended well."""
    steps = [step for step in run.steps if step.kind == "benchmark"]
    if any(step.status not in GOOD for step in steps):
        return {}
    return {step.name: trail.entry(step.records[0]) for step in steps}


def _changes(
    trail: "Trail", name: str, before: "Entry | None", after: "Entry", resampling: Resampling
) -> Iterator[MetricChange]:
    old, new = _benchmark_body(before), _benchmark_body(after)
    if old is None or new is None:
        return
    levels_before, levels_after = (
        {metric.metric: metric.adapter_micro for metric in body.metrics} for body in (old, new)
    )
    for metric, spread in version_change(trail, old, new, **asdict(resampling)).items():
        delta, low, high = (round(value * MICRO) for value in (spread.value, spread.low, spread.high))
        yield MetricChange(
            name, metric, levels_before[metric], levels_after[metric], delta, low, high, num_items=new.num_items
        )


def _benchmark_body(entry: "Entry | None") -> BenchmarkBody | None:
    body = entry.record.body if entry is not None and entry.record is not None else None
    return body if isinstance(body, BenchmarkBody) else None


def _adapter_of(entry: "Entry") -> Artefact:
    assert entry.record is not None, "only records that were read are compared"
    return next(item for item in entry.record.inputs if item.kind == "adapter")


def _verdict(changes: Sequence[MetricChange]) -> Any:
    if not changes:
        return "not measured"
    told = {verdict_of(change) for change in changes} - {NO_EFFECT}
    return "mixed" if len(told) > 1 else next(iter(told), NO_EFFECT)


def _why_unmeasured(before_run: Run | None, before: "dict[str, Entry]", after: "dict[str, Entry]") -> str:
    if not after:
        return "the workflow has no benchmark"
    if before_run is None:
        return "no earlier run was measured"
    if not before.keys() & after.keys():
        return "no benchmark step stands in both runs"
    return "the suite is another one, or its answers are gone"


def _also_changed(trail: "Trail", before: Run, after: Run) -> tuple[str, ...]:
    """What differs between two runs in steps that no patch touched: contributions, suites, code."""
    definitions = [_steps_of(trail, run.definition) for run in (before, after)]
    changed = []
    for step in after.steps:
        other = before.step(step.name)
        if other is None or other.key is None or step.key is None:
            continue
        untouched = definitions[0].get(step.name) == definitions[1].get(step.name)
        if untouched and _outside(before, other) != _outside(after, step):
            changed.append(f"what goes into {step.name}")
        if other.key.code != step.key.code:
            changed.append(f"the code of {step.name}")
    return tuple(changed)


def _steps_of(trail: "Trail", definition: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(trail.store.get_blob(definition))["steps"]) if trail.store.has(definition) else {}


def _outside(run: Run, step: StepRun) -> set[str]:
    """The digests of a step's inputs that no step of its run made."""
    made = {output.artefact.digest for other in run.steps for output in other.outputs}
    return {item.digest for item in step.key.inputs} - made if step.key is not None else set()
