"""What a workflow would do and why: each step is run, or what its key once made is used again.

One function decides for the dry run and for the run itself, so that both say the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from attribution.records import Artefact
from attribution.workflow_runs import GOOD, SHORT, Key, Run, StepRun, definition_artefact, find_result, last_of
from cluster.step_code import changed_code
from cluster.workflow_steps import StepKind, Task, base_of, key_of, named_artefact
from configs.errors import UserError
from configs.workflow import REFERENCE, ApprovalStep, Workflow
from configs.workflow_file import nearest

if TYPE_CHECKING:
    from attribution.trail import Trail

MAX_NAMED = 3  # differing settings, files or inputs named in a reason before the rest is counted

Results = Mapping[str, StepRun]
"""The steps that ended well so far, by name."""


@dataclass(frozen=True)
class Choice:
    """Which steps a user wants: `start` and what follows it anew; `only` some, the others as they are."""

    start: str | None = None
    only: tuple[str, ...] = ()

    def require_known(self, workflow: Workflow) -> None:
        """Raise UserError naming a step that the workflow does not have."""
        for option, name in [("--from", self.start), *(("--only", name) for name in self.only)]:
            if name is not None and name not in workflow.steps:
                raise UserError(f"{option} {name}: no such step; {nearest(name, list(workflow.steps))}")


@dataclass(frozen=True)
class Decision:
    """What is to be done about one step. `key` is None while an input is unknown; `found` is what can be reused."""

    name: str
    kind: str
    action: Literal["run", "reuse", "ask", "leave out"]
    why: str
    key: Key | None = None
    found: StepRun | None = None


@dataclass(frozen=True)
class Planner:
    """Decides about the steps of one workflow, given its earlier runs."""

    trail: "Trail"
    workflow: Workflow
    kinds: Mapping[str, StepKind]
    runs: Sequence[Run]
    choice: Choice
    definition: str

    def plan(self) -> list[Decision]:
        """Return a decision per step in running order, as far as it can be foreseen."""
        results: dict[str, StepRun] = {}
        decisions = []
        for name in self.workflow.order():
            decision = self.decide(name, results)
            decisions.append(decision)
            if decision.action == "reuse" and decision.found is not None:
                results[name] = decision.found
        self._require_inputs(decisions)
        return decisions

    def check(self) -> None:
        """Raise UserError for whatever can be seen to be wrong before the first step runs."""
        self.choice.require_known(self.workflow)
        for name in self.workflow.steps:
            self.kinds[self.workflow.kind_of(name)].check(self.trail, self.task(name, {}))

    def decide(self, name: str, results: Results) -> Decision:
        """Return what to do about a step whose needs ended as `results` says; those missing there are still to come."""
        kind = self.workflow.kind_of(name)
        is_chosen = not self.choice.only or name in self.choice.only
        missing = [need for need in self.workflow.needs(name) if need not in results]
        if missing:
            why = f"needs what {' and '.join(missing)} will make" if is_chosen else "not among --only"
            return Decision(name, kind, "run" if is_chosen else "leave out", why)
        task = self.task(name, results)
        key = key_of(self.trail, kind, task, kinds=self.kinds)
        if key is None:
            return Decision(name, kind, "run", f"its base {task.base} is not imported yet")
        found = find_result(self.trail, self.runs, key)
        asks = self.kinds[kind].asks
        if asks is not None:
            waits_for = asks(self.trail, task)
            if waits_for or found is None:
                return Decision(name, kind, "ask", waits_for or "what it asked for is given", key)
            return Decision(name, kind, "reuse", "approved, and nothing has changed since", key, found)
        if self.choice.start is not None and name in self.workflow.followers(self.choice.start) and is_chosen:
            return Decision(name, kind, "run", f"--from {self.choice.start}", key)
        if found is not None:
            return Decision(name, kind, "reuse", "nothing it depends on has changed", key, found)
        if not is_chosen:
            return Decision(name, kind, "leave out", "not among --only", key)
        return Decision(name, kind, "run", self._why(name, key), key)

    def task(self, name: str, results: Results) -> Task:
        """Return the step as its kind wants it; inputs are empty while `results` lack one."""
        workflow, step = self.workflow, self.workflow.steps[name]
        inputs = {
            field: tuple(self._artefact(value, step.takes[field], results) for value in values)
            for field, values in step.references().items()
            if all(need in results for need in workflow.needs(name))
        }
        return Task(
            workflow=workflow.name,
            name=name,
            step=step,
            inputs=inputs,
            settings=workflow.settings[name],
            base=base_of(workflow.base, step),
            folder=workflow.folder,
            approvers=workflow.people(step.approvers) if isinstance(step, ApprovalStep) else (),
            definition=definition_artefact(workflow.name, self.definition),
        )

    def _artefact(self, value: str, kind: str, results: Results) -> Artefact:
        match = REFERENCE.fullmatch(value)
        if match is None:
            return named_artefact(self.trail, value, kind)
        outputs = {output.name: output.artefact for output in results[match[1]].outputs}
        return outputs[match[2]]

    def _require_inputs(self, decisions: Sequence[Decision]) -> None:
        """A step of --only whose needs are neither there nor among --only cannot run."""
        left_out = {decision.name for decision in decisions if decision.action == "leave out"}
        for name in self.choice.only:
            missing = [need for need in self.workflow.needs(name) if need in left_out]
            if missing:
                raise UserError(
                    f"--only {name}: missing input: {missing[0]!r} has no result that is still valid; "
                    f"add --only {missing[0]}, or leave --only out"
                )

    def _why(self, name: str, key: Key) -> str:
        """Return why a key was never made: what differs from the last attempt at the step."""
        last = last_of(self.runs, name)
        if last is None or last.key is None:
            return "never ran"
        differing = list(self._differences(last.key, key))
        if differing:
            return "; ".join(differing)
        if last.status in GOOD:
            is_there = all(self.trail.store.has(output.artefact.digest) for output in last.outputs)
            return f"what it made is {'signed with a revoked key' if is_there else 'gone from the store'}"
        return f"{last.status} last time" + (f": {last.reason}" if last.reason else "")

    def _differences(self, old: Key, new: Key) -> list[str]:
        """Return which parts of two keys differ, in words."""
        found = []
        if old.kind != new.kind:
            found.append(f"kind {old.kind} -> {new.kind}")
        if old.name != new.name:
            found.append(f"name {old.name} -> {new.name}")
        if changed := _changed_inputs(old, new):
            found.append(f"inputs: {_few(changed)}")
        if old.config != new.config:
            found.append(f"config: {_few(_changed_fields(self._json(old.config), self._json(new.config)))}")
        if old.code != new.code:
            found.append(f"code: {_few(changed_code(self._json(old.code), self._json(new.code)))}")
        if old.seed != new.seed:
            found.append(f"seed {old.seed} -> {new.seed}")
        if old.base != new.base:
            found.append(f"base {(old.base or 'none')[SHORT]} -> {(new.base or 'none')[SHORT]}")
        return found

    def _json(self, digest: str) -> dict[str, Any]:
        return dict(self.trail.get_json(digest)) if self.trail.store.has(digest) else {}


def _changed_inputs(old: Key, new: Key) -> list[str]:
    """Each input that came, went or has another digest."""
    before, after = _digests(old), _digests(new)
    changed = []
    for kind, name in dict.fromkeys([*before, *after]):
        was, now = before.get((kind, name), []), after.get((kind, name), [])
        if was != now:
            came = "came" if not was else "went" if not now else f"{was[-1][SHORT]} -> {now[-1][SHORT]}"
            changed.append(f"{kind} {name} {came}")
    return changed


def _digests(key: Key) -> dict[tuple[str, str], list[str]]:
    """The digests of a key's inputs by kind and name, which several may share."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in key.inputs:
        found.setdefault((item.kind, item.name), []).append(item.digest)
    return found


def _changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names]


def _few(texts: Sequence[str]) -> str:
    more = len(texts) - MAX_NAMED
    return ", ".join(texts[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
