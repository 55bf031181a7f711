"""The kinds of step: what each one's result depends on, and how it is made.

A kind owns two callables. `ingredients` says, without making anything, what a step would be made from; the key by which
results are found again is computed from that. `make` does the work and returns the records it appended.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.approvals import Request, Standing, standing
from attribution.people import People, require_person
from attribution.records import Artefact
from attribution.store import digest_of
from attribution.workflow_runs import Key
from cluster.step_code import code_manifest
from configs.errors import UserError
from configs.schema import Settings
from configs.workflow import ApprovalStep, BenchmarkStep, PublishStep, RefineStep, SettleStep, Step, TrainStep

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail


@dataclass(frozen=True)
class Task:
    """One step, ready to be made. `inputs`: the artefacts behind each field that takes some."""

    workflow: str
    name: str
    step: Step
    inputs: Mapping[str, tuple[Artefact, ...]]
    settings: Settings
    base: str
    folder: Path
    approvers: tuple[str, ...]
    definition: Artefact

    @property
    def label(self) -> str:
        """The name of what the step makes."""
        return getattr(self.step, "name", None) or self.workflow

    def input(self, field: str) -> Artefact:
        """Return the only artefact of a field."""
        return self.inputs[field][0]


@dataclass(frozen=True)
class Ingredients:
    """What goes into a key. `base` is None where none is used, '' where it is not imported yet."""

    inputs: tuple[Artefact, ...]
    config: str
    seed: int = 0
    base: str | None = None


@dataclass(frozen=True)
class StepKind:
    """One kind of step. `modules`: where its code begins. `makes_record`: the kind of record that holds its outputs.

    `check` is asked of every step before the first one runs, inputs unknown; `prepare` before the key is computed.
    `asks` is set where people decide: what a step still waits for, '' once it may go on. It is asked each time.
    """

    makes_record: str
    modules: tuple[str, ...]
    ingredients: Callable[["Trail", Task], Ingredients]
    make: Callable[["Trail", Task], "Sequence[Entry]"]
    check: Callable[["Trail", Task], object] = lambda trail, task: None
    prepare: Callable[["Trail", Task], object] = lambda trail, task: None
    asks: Callable[["Trail", Task], str] | None = None


class Waiting(Exception):
    """A step that people must approve first; says who and how."""


class Refused(Exception):
    """A step that people refused."""


@dataclass(frozen=True)
class Tools:
    """What the real steps work with. `ray` joins or starts one the first time; `bars` shows a step's progress."""

    ray: Callable[[], None]
    bars: Callable[[str], AbstractContextManager[Any]]


def key_of(trail: "Trail", kind: str, task: Task, *, kinds: Mapping[str, StepKind]) -> Key | None:
    """Return the key of a step whose inputs are known; None while its base is not imported."""
    found = kinds[kind].ingredients(trail, task)
    if found.base == "":
        return None
    code = trail.store.put_blob(code_manifest(kinds[kind].modules))
    return Key(kind, task.label, found.inputs, found.config, code, found.seed, found.base)


def real_kinds(tools: Tools) -> dict[str, StepKind]:
    """Return the kinds of step as they run: in Ray where the pipeline needs it."""

    def refine(trail: "Trail", task: Task) -> "Sequence[Entry]":
        tools.ray()
        with tools.bars("refine") as bar:
            from pipelines.refine.driver import refine

            assert isinstance(task.step, RefineStep)
            options = {"name": task.label, "progress": bar, "workflow": task.definition}
            return [refine(trail, task.step.datasets, task.settings.refine, **options).entry]

    def train(trail: "Trail", task: Task) -> "Sequence[Entry]":
        tools.ray()
        with tools.bars("train") as bars:
            from pipelines.train.driver import train

            options = {"base": task.base, "settings": task.settings.train, "progress": bars}
            dataset = task.input("dataset").digest
            return [train(trail, dataset, name=task.label, workflow=task.definition, **options).entry]

    def benchmark(trail: "Trail", task: Task) -> "Sequence[Entry]":
        with tools.bars("benchmark") as bars:
            from pipelines.benchmark.run import benchmark

            options = {"settings": task.settings.benchmark, "progress": bars, "workflow": task.definition}
            return [benchmark(trail, task.input("adapter").digest, suite=_suite(task), **options).entry]

    def settle(trail: "Trail", task: Task) -> "Sequence[Entry]":
        from pipelines.settle.asked import asked

        assert isinstance(task.step, SettleStep)
        adapter, suite, section = task.input("adapter").digest, _suite(task), task.settings.settle
        ready = asked(trail, adapter, suite=suite, over=task.step.over, settings=section)
        tools.ray()
        with tools.bars("settle") as bars:
            from pipelines.settle.driver import settle

            report = settle(trail, ready, progress=bars, workflow=task.definition)
            assert report is not None, "only a dry run returns nothing"
            return [report.entry]

    return {
        "refine": StepKind("refinement", ("pipelines.refine.driver",), _for_refine, refine, _for_refine),
        "train": StepKind("adapter", ("pipelines.train.driver",), _for_train, train, _check_train, _import_base),
        "benchmark": StepKind("benchmark", ("pipelines.benchmark.run",), _for_benchmark, benchmark, _check_suite),
        "settle": StepKind("settlement", ("pipelines.settle.driver",), _for_settle, settle, _check_suite),
        "publish": StepKind("publication", ("pipelines.publish",), _for_publish, _publish, _check_name),
        "approval": approval_kind(),
    }


def approval_kind() -> StepKind:
    """Return the kind of step that waits for people."""
    modules = ("attribution.approvals",)
    return StepKind("approval", modules, _for_approval, _approve, _check_approvers, asks=_still_asked)


def request_of(task: Task) -> Request:
    """Return what an approval step asks for."""
    return Request(task.workflow, task.name, task.inputs["of"])


def standing_of(trail: "Trail", task: Task) -> Standing:
    """Return how an approval step stands. Raises UserError naming an approver nobody introduced."""
    assert isinstance(task.step, ApprovalStep)
    required = task.step.required or len(task.approvers)
    return standing(trail, request_of(task), approvers=task.approvers, required=required)


def _for_refine(trail: "Trail", task: Task) -> Ingredients:
    from pipelines.refine.read import refinable

    assert isinstance(task.step, RefineStep)
    chosen = refinable(trail, task.step.datasets)
    # The registration counts beside the rows: it decides which of two equal rows stays, and who is named.
    inputs = [Artefact("contribution", item.name, f"sha256:{item.origin.dataset}") for item in chosen]
    return Ingredients(tuple(inputs), trail.run_config(task.settings.refine))


def _for_train(trail: "Trail", task: Task) -> Ingredients:
    from pipelines.base_model import known_base
    from pipelines.train.queries import artefact_of

    section = task.settings.train
    base = known_base(trail, task.base) or ""
    queried = [artefact_of(trail, reference) for reference in section.query_sets]
    # As the record says it: by digest.
    config = trail.run_config(section.model_copy(update={"query_sets": tuple(found.digest for found in queried)}))
    return Ingredients((task.input("dataset"), *queried), config, section.seed, base)


def _check_train(trail: "Trail", task: Task) -> None:
    from pipelines.base_model import known_base
    from pipelines.train.queries import artefact_of

    _check_name(trail, task)
    known_base(trail, task.base)
    for reference in task.settings.train.query_sets:
        artefact_of(trail, reference)


def _import_base(trail: "Trail", task: Task) -> None:
    from pipelines.base_model import resolve_base

    resolve_base(trail, task.base)


def _for_benchmark(trail: "Trail", task: Task) -> Ingredients:
    suite, section = _suite(task), task.settings.benchmark
    inputs = (task.input("adapter"), Artefact("suite", suite.stem, digest_of(suite.read_bytes())))
    return Ingredients(inputs, trail.run_config(section), section.seed)


def _for_settle(trail: "Trail", task: Task) -> Ingredients:
    assert isinstance(task.step, SettleStep)
    suite, section = _suite(task), task.settings.settle
    inputs = (task.input("adapter"), Artefact("suite", suite.stem, digest_of(suite.read_bytes())))
    config = trail.put_json({"over": task.step.over, "settings": trail.run_config(section)})
    return Ingredients(inputs, config, section.seed)


def _check_suite(_: "Trail", task: Task) -> None:
    """A bad row is told before hours of training, not after."""
    from pipelines.benchmark.suites import read_suite

    read_suite(_suite(task))


def _for_publish(trail: "Trail", task: Task) -> Ingredients:
    return Ingredients(task.inputs["artefact"], trail.put_json({}))


def _check_name(_: "Trail", task: Task) -> None:
    from pipelines.publish import require_name

    require_name(task.label)


def _for_approval(trail: "Trail", task: Task) -> Ingredients:
    assert isinstance(task.step, ApprovalStep)
    approvers = list(task.approvers)
    config = {"approvers": approvers, "required": task.step.required or len(approvers)}
    return Ingredients(task.inputs["of"], trail.put_json(config))


def _check_approvers(trail: "Trail", task: Task) -> None:
    """Every approver must be known, and as many be asked as are required."""
    assert isinstance(task.step, ApprovalStep)
    if task.step.required is not None and task.step.required > len(task.approvers):
        raise UserError(
            f"steps.{task.name}.required = {task.step.required}: only {len(task.approvers)} approvers are named: "
            f"{', '.join(task.approvers)}"
        )
    for name in task.approvers:
        require_person(trail, name, what=f"steps.{task.name}.approvers")


def _still_asked(trail: "Trail", task: Task) -> str:
    found = standing_of(trail, task)
    return "" if found.status == "approved" else found.summary


def _publish(trail: "Trail", task: Task) -> "Sequence[Entry]":
    """Publish the artefact, unless it is what the name's newest version means already."""
    from attribution.void_records import require_counting, void_record
    from pipelines.publish import publish

    assert isinstance(task.step, PublishStep)
    artefact = task.input("artefact")
    require_counting(trail, artefact.digest, to="publish")
    newest = [item for item in trail.registry.list() if item.name == task.label][-1:]
    if newest and newest[0].digest == artefact.digest:
        entry = trail.entry(newest[0].leaf_hash)
        if void_record(People(trail), entry) is None:
            return [entry]
    return [publish(trail, task.label, artefact.digest, artefact.kind, workflow=task.definition)]


def _approve(trail: "Trail", task: Task) -> "Sequence[Entry]":
    """Return the approvals that were given; raises Waiting or Refused while they are not enough."""
    found = standing_of(trail, task)
    if found.status == "refused":
        raise Refused(found.summary)
    if found.status == "waiting":
        trail.store.put_blob(request_of(task).to_bytes())
        raise Waiting(found.summary)
    return [trail.entry(item.leaf_hash) for item in found.decisions if item.approved]


def _suite(task: Task) -> Path:
    assert isinstance(task.step, BenchmarkStep | SettleStep)
    suite = task.folder / task.step.suite
    if not suite.is_file():
        raise UserError(
            f"steps.{task.name}.suite = {task.step.suite!r}: no such file; it is looked for in {task.folder}"
        )
    return suite


def base_of(workflow_base: str, step: Step) -> str:
    """Return the base that a step trains on."""
    return (step.base if isinstance(step, TrainStep) else None) or workflow_base


def named_artefact(trail: "Trail", value: str, kind: str) -> Artefact:
    """Return the artefact that a name, name@version or digest in a workflow file means.

    Raises:
        UserError: nothing of that name, or of that kind, is recorded.
    """
    if kind == "refined":
        from pipelines.train.refined import resolve_refined

        return resolve_refined(trail, value).artefact
    if kind == "adapter":
        from pipelines.benchmark.run import resolve_adapter

        found = resolve_adapter(trail, value)
        return Artefact("adapter", found.name, found.digest)
    if value.startswith("sha256:"):
        entry = trail.find(value)
        outputs = entry.record.outputs if entry is not None and entry.record is not None else ()
        for output in outputs:
            if output.digest == value:
                return output
    published = trail.registry.resolve(value)
    return Artefact(published.kind, published.name, published.digest)
