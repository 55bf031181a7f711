"""Running a workflow: steps in order, each once per key, resumed where an earlier attempt ended, all of it recorded.

The steps' work is injected as kinds (see workflow_steps.py), so the engine knows nothing of Ray or of models.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attribution.workflow_effects import Resampling, record_effect
from attribution.workflow_patches import record_patch, unified_diff
from attribution.workflow_runs import (
    GOOD,
    MAX_REASON_CHARS,
    UNFINISHED,
    Output,
    Run,
    RunStatus,
    StepRun,
    record_run,
    recorded_runs,
)
from cluster.workflow_journal import Journal, find_made, killed
from cluster.workflow_plan import Choice, Decision, Planner
from cluster.workflow_steps import Refused, StepKind, Waiting
from configs.errors import UserError
from configs.schema import BenchmarkSettings
from configs.workflow import ANY, Workflow

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

FIRST_REASON = "first version"


@dataclass(frozen=True)
class Changed:
    """The definition was patched before the run; `leaf_hash` is the patch's record."""

    leaf_hash: str
    author: str
    diff: str


@dataclass(frozen=True)
class Resumed:
    """An attempt follows one that did not end well."""

    attempt: int
    before: Run


@dataclass(frozen=True)
class Measured:
    """The effect of patches was recorded."""

    entry: "Entry"


Event = Changed | Resumed | Decision | StepRun | Measured
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Author:
    """Who changed the definition, and why."""

    name: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Finished:
    """A run that ended. `is_new` is False when nothing was done, and nothing recorded."""

    run: Run
    is_new: bool


class Driver:
    """Runs one workflow in one trail."""

    def __init__(
        self,
        trail: "Trail",
        workflow: Workflow,
        kinds: Mapping[str, StepKind],
        *,
        source: str = "",
        choice: Choice | None = None,
        tell: Tell = lambda _: None,
    ) -> None:
        self._trail = trail
        self._workflow = workflow
        self._kinds = kinds
        self._source = source
        self._choice = choice or Choice()
        self._tell = tell
        self._journal = Journal(trail.home, workflow.name)

    def plan(self) -> list[Decision]:
        """Return what `run` would do and why, doing nothing.

        Raises:
            UserError: an unknown step, approver, dataset, base or suite.
        """
        left_behind = self._journal.read()
        runs = recorded_runs(self._trail, self._workflow.name)
        planner = self._planner([*runs, self._settled(left_behind)] if left_behind else runs)
        planner.check()
        return planner.plan()

    def run(self, author: Author | None = None) -> Finished:
        """Run what is not done yet, record the attempt and, if patches await it, their effect.

        Raises:
            UserError: another driver is at it, what `plan` raises, or a changed definition without author and reason.
        """
        with self._journal.locked():
            self._record_left_behind()
            runs = recorded_runs(self._trail, self._workflow.name)
            planner = self._planner(runs)
            planner.check()
            planner.plan()  # --only without its inputs is told before anything is written
            is_patched = self._record_patch(runs, planner.definition, author or Author())
            run = self._begin(runs, planner.definition)
            try:
                for name in self._workflow.order():
                    run = self._advance(run, name, planner)
            except KeyboardInterrupt:
                self._end(replace(killed(self._journal.read() or run), status="stopped"), runs)
                raise
            run = replace(run, status=_status_of(run), ended_us=_now_us())
            if not is_patched and _adds_nothing(run, runs):
                self._journal.clear()
                return Finished(run, False)
            return Finished(self._end(run, runs), True)

    def _planner(self, runs: Sequence[Run]) -> Planner:
        definition = self._trail.store.put_blob(self._workflow.text.encode())
        return Planner(self._trail, self._workflow, self._kinds, runs, self._choice, definition)

    def _begin(self, runs: Sequence[Run], definition: str) -> Run:
        """The next attempt of a run that did not end well, or the first of a new run; a new definition is a new run."""
        last = runs[-1] if runs else None
        is_again = last is not None and last.status in UNFINISHED and last.definition == definition
        if last is not None and is_again:
            self._tell(Resumed(last.attempt + 1, last))
            number, attempt, parent = last.number, last.attempt + 1, last.leaf_hash
        else:
            number, attempt, parent = (last.number if last else 0) + 1, 1, ""
        return Run(
            self._workflow.name, number, attempt, "running", definition, self._source, (), _now_us(), parent=parent
        )

    def _advance(self, run: Run, name: str, planner: Planner) -> Run:
        """Return the run with one more step: reused, made, or held back by one that it needs."""
        kind = self._workflow.kind_of(name)
        for need in self._workflow.needs(name):
            before = run.step(need)
            if before is not None and before.status not in (*GOOD, "left out"):
                return self._ended(
                    run, StepRun(name, kind, "skipped", reason=f"needs {need}, which is {before.status}")
                )
        results = {step.name: step for step in run.steps if step.status in GOOD}
        try:
            if not self._choice.only or name in self._choice.only:
                self._kinds[kind].prepare(self._trail, planner.task(name, results))
            decision = planner.decide(name, results)
        except Exception as error:
            return self._ended(run, self._failed(StepRun(name, kind, "running", started_us=_now_us()), error))
        if decision.action == "leave out":
            return self._ended(run, StepRun(name, kind, "left out", decision.why, decision.key))
        if decision.action == "reuse" and decision.found is not None:
            return self._ended(run, replace(decision.found, name=name, status="reused", why=decision.why))
        self._tell(decision)
        size = self._trail.log.size
        begun = StepRun(name, kind, "running", decision.why, decision.key, started_us=_now_us(), log_size=size)
        self._journal.write(run.with_step(begun))
        return self._ended(run, self._made(begun, planner, results))

    def _made(self, begun: StepRun, planner: Planner, results: Mapping[str, StepRun]) -> StepRun:
        """Do a step's work; what it raises becomes its status and reason."""
        try:
            entries = self._kinds[begun.kind].make(self._trail, planner.task(begun.name, results))
        except Waiting as error:
            return replace(begun, status="waiting", reason=str(error), ended_us=_now_us())
        except Refused as error:
            return replace(begun, status="refused", reason=str(error), ended_us=_now_us())
        except Exception as error:
            return self._failed(begun, error)
        return self._done(begun, entries)

    def _failed(self, begun: StepRun, error: Exception) -> StepRun:
        """The step with what went wrong, whatever it was: each failure is recorded with its reason."""
        trace = self._trail.store.put_blob("".join(traceback.format_exception(error)).encode())
        return replace(begun, status="failed", reason=_reason_of(error), trace=trace, ended_us=_now_us())

    def _done(self, begun: StepRun, entries: "Sequence[Entry]") -> StepRun:
        """The step with the outputs that its first record names."""
        first = entries[0].record
        assert first is not None, "a record just made is there"
        makes = self._workflow.steps[begun.name].makes if begun.name in self._workflow.steps else {}
        outputs = tuple(
            Output(name, next(item for item in first.outputs if kind in (ANY, item.kind)))
            for name, kind in makes.items()
        )
        records = tuple(entry.leaf_hash for entry in entries)
        return replace(begun, status="done", outputs=outputs, records=records, ended_us=_now_us())

    def _ended(self, run: Run, step: StepRun) -> Run:
        self._tell(step)
        run = run.with_step(step)
        self._journal.write(run)
        return run

    def _end(self, run: Run, runs: Sequence[Run]) -> Run:
        """Record an attempt, then the effect of the patches that waited for it."""
        run = replace(run, ended_us=run.ended_us or _now_us())
        run = replace(run, leaf_hash=record_run(self._trail, run).leaf_hash)
        self._journal.clear()
        if run.status not in ("killed", "stopped"):
            effect = record_effect(self._trail, run, runs, resampling=self._resampling())
            if effect is not None:
                self._tell(Measured(effect))
        return run

    def _record_left_behind(self) -> None:
        """Record the run of a driver that was killed; a step whose record it still appended counts as done."""
        run = self._journal.read()
        if run is not None:
            self._end(self._settled(run), recorded_runs(self._trail, self._workflow.name))

    def _settled(self, run: Run) -> Run:
        for step in run.steps:
            if step.status == "running" and step.key is not None and step.kind in self._kinds:
                kind = self._kinds[step.kind].makes_record
                entry = find_made(self._trail, step.key, kind=kind, log_size=step.log_size)
                if entry is not None:
                    run = run.with_step(self._done(step, [entry]))
        return killed(run)

    def _record_patch(self, runs: Sequence[Run], definition: str, author: Author) -> bool:
        """Record a changed definition as its author's contribution; return whether there was one.

        The first version is recorded when its author is named.
        """
        before = runs[-1].definition if runs else ""
        maker = self._trail.find(definition)
        since = self._trail.entry_index(runs[-1].leaf_hash) if runs else -1
        if before == definition or (maker is not None and maker.index > since):
            return False
        store = self._trail.store
        diff = unified_diff(self._workflow.name, store.get_blob(before).decode() if before else "", self._workflow.text)
        if before and (author.name is None or not author.reason):
            raise UserError(
                f"workflow {self._workflow.name!r}: changed since its last run; say who changed it and why: "
                f"--as NAME --reason TEXT\n{diff.rstrip()}"
            )
        if author.name is None:
            return False
        entry = record_patch(
            self._trail,
            self._workflow.name,
            before=before,
            after=definition,
            author=author.name,
            reason=author.reason or FIRST_REASON,
        )
        self._tell(Changed(entry.leaf_hash, author.name, diff))
        return True

    def _resampling(self) -> Resampling:
        """As the benchmark steps draw theirs."""
        steps = [name for name in self._workflow.steps if self._workflow.kind_of(name) == "benchmark"]
        section = self._workflow.settings[steps[0]].benchmark if steps else BenchmarkSettings()
        return Resampling(section.num_bootstrap, section.confidence, section.seed)


def _status_of(run: Run) -> RunStatus:
    found = {step.status for step in run.steps}
    for status in ("failed", "refused", "waiting"):
        if status in found:
            return status
    return "partial" if "left out" in found else "done"


def _adds_nothing(run: Run, runs: Sequence[Run]) -> bool:
    """Whether no step was made and the run stands as it stood."""
    if not runs or any(step.status in ("done", "failed") for step in run.steps):
        return False
    return run.status in (runs[-1].status, "partial")


def _reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[-1]}"
    return text[:MAX_REASON_CHARS]


def _now_us() -> int:
    return time.time_ns() // 1000
