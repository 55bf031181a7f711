"""What the workflow commands show: plans, progress, closing tables, and the story of a workflow."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from attribution.bodies import BenchmarkBody, WorkflowEffectBody
from attribution.evidence import MICRO
from attribution.log.facts import utc
from attribution.workflow_effects import Effect, verdict_of
from attribution.workflow_patches import Patch, recorded_patches
from attribution.workflow_runs import SHORT, Run, StepRun, recorded_runs
from cluster.workflow import Changed, Event, Finished, Measured, Resumed
from cluster.workflow_plan import Decision
from cluster.workflow_story import Approval, failed_steps, recorded_workflow, runs_of, story_of

if TYPE_CHECKING:
    from attribution.approvals import Request
    from attribution.trail import Trail
    from configs.workflow import Workflow

COLOURS = {
    "done": "green",
    "reused": "dim",
    "run": "bold",
    "reuse": "dim",
    "ask": "yellow",
    "waiting": "yellow",
    "failed": "red",
    "killed": "red",
    "refused": "red",
    "stopped": "yellow",
}


class Teller:
    """Prints a run's events as they come, and its end; to be passed as `tell`."""

    def __init__(self, console: Console, trail: "Trail", workflow: "Workflow") -> None:
        self._console = console
        self._trail = trail
        self._workflow = workflow

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Changed(leaf_hash, author, diff):
                self._console.print(f"[bold]patched[/bold] by {escape(author)} (record {leaf_hash[:12]})")
                self._console.print(Syntax(diff.rstrip(), "diff", background_color="default"))
            case Resumed(attempt, before):
                self._console.print(f"attempt {attempt}: the one before was {_coloured(before.status)}")
                for step in failed_steps(before):
                    self._console.print(f"  {step.name} {_coloured(step.status)}: {escape(step.reason)}")
            case Decision(name, kind, _, why):
                self._console.rule(f"[bold]{name}[/bold] ({kind}): {escape(why)}", align="left")
            case StepRun():
                self._console.print(_step_line(event))
            case Measured(entry):
                body = entry.record.body if entry.record is not None else None
                if isinstance(body, WorkflowEffectBody):
                    self._console.print(*effect_view(self._trail, body))

    def close(self, finished: Finished) -> None:
        """Print the closing table and what to do next."""
        run = finished.run
        if not finished.is_new:
            if run.status in ("done", "partial"):
                self._console.print(f"[green]{run.workflow}: nothing to do[/green]; every step stands as it is")
            else:
                self._console.print(f"{run.workflow}: still {_coloured(run.status)}; nothing was done")
        else:
            self._console.print(steps_table(run))
        for line in _next_steps(run):
            self._console.print(line, soft_wrap=True)


def plan_table(workflow: "Workflow", decisions: Sequence[Decision]) -> Table:
    """Return what would run and why."""
    table = Table("step", "kind", "would", "why", title=f"{workflow.name}: dry run", title_justify="left")
    for decision in decisions:
        table.add_row(decision.name, decision.kind, _coloured(decision.action), escape(decision.why))
    return table


def steps_table(run: Run) -> Table:
    """Return the steps of an attempt: status, time, what each made."""
    title = f"{run.run_id}, attempt {run.attempt}: {run.status}"
    table = Table("step", "status", "s", "made", "record", "why", title=title, title_justify="left")
    for step in run.steps:
        seconds = (step.ended_us - step.started_us) / 1e6 if step.status not in ("reused", "skipped") else None
        made = ", ".join(f"{output.name} {output.artefact.digest[SHORT]}" for output in step.outputs)
        records = ", ".join(leaf[:12] for leaf in step.records)
        table.add_row(
            step.name,
            _coloured(step.status),
            "" if not seconds or seconds < 0 else f"{seconds:.1f}",
            made,
            records,
            escape(step.reason or step.why),
        )
    return table


def request_table(trail: "Trail", request: "Request") -> Table:
    """Return what an approval would be of, benchmarks with their figures."""
    table = Table("kind", "name", "digest", "what it says", title=f"{request.workflow}: {request.step} asks for")
    for item in request.artefacts:
        maker = trail.find(item.digest)
        body = maker.record.body if maker is not None and maker.record is not None else None
        figures = ""
        if isinstance(body, BenchmarkBody):
            figures = "; ".join(
                f"{metric.metric} {metric.base_micro / MICRO:.3f} -> {metric.adapter_micro / MICRO:.3f}"
                for metric in body.metrics
            )
        table.add_row(item.kind, item.name, item.digest, figures)
    return table


def effect_view(trail: "Trail", body: WorkflowEffectBody) -> list[RenderableType]:
    """Return what patches did to the outcome."""
    known = {patch.leaf_hash: patch for patch in recorded_patches(trail, body.workflow)}
    patches = [known[leaf] for leaf in body.patches if leaf in known]
    named = "; ".join(f"{patch.author}: {patch.reason}" for patch in patches)
    shown: list[RenderableType] = [
        f"effect of {escape(named)}: [bold]{body.verdict}[/bold] {escape(body.reason)}".rstrip()
    ]
    if body.changes:
        level = f"{body.confidence_micro / MICRO:.0%} interval"
        table = Table("benchmark", "metric", "before", "after", "change", level, "items", "")
        for change in body.changes:
            before, after, delta, low, high = (
                micro / MICRO
                for micro in (
                    change.before_micro,
                    change.after_micro,
                    change.delta_micro,
                    change.low_micro,
                    change.high_micro,
                )
            )
            interval = f"{low:+.3f} .. {high:+.3f}"
            figures = (f"{before:.3f}", f"{after:.3f}", f"{delta:+.3f}", interval, str(change.num_items))
            table.add_row(change.benchmark, change.metric, *figures, verdict_of(change))
        shown.append(table)
    if body.also_changed:
        shown.append(f"[yellow]not by the patch alone:[/yellow] {escape(', '.join(body.also_changed))} changed too")
    return shown


def workflows_table(trail: "Trail") -> Table:
    """Return every workflow with its last run."""
    table = Table("workflow", "runs", "attempts", "patches", "last run", "status", "ended")
    by_name: dict[str, list[Run]] = {}
    for run in recorded_runs(trail):
        by_name.setdefault(run.workflow, []).append(run)
    for name, runs in by_name.items():
        num_patches = sum(bool(patch.before) for patch in recorded_patches(trail, name))
        last = runs[-1]
        counts = (str(last.number), str(len(runs)), str(num_patches))
        table.add_row(name, *counts, last.run_id, _coloured(last.status), utc(last.ended_us))
    return table


def run_view(trail: "Trail", reference: str) -> list[RenderableType]:
    """Return the last attempt of a run, with its definition."""
    run = runs_of(trail, reference)[-1]
    workflow = recorded_workflow(trail, run)
    facts = Table(show_header=False)
    facts.add_row("record", run.leaf_hash)
    facts.add_row("attempt before", run.parent or "none")
    facts.add_row("began, ended", f"{utc(run.started_us)}, {utc(run.ended_us)}")
    facts.add_row("definition", f"{run.definition} from {run.source or 'no file'}")
    return [steps_table(run), facts, Syntax(workflow.text.rstrip(), "yaml", background_color="default")]


def story_view(trail: "Trail", reference: str, *, with_diffs: bool) -> list[RenderableType]:
    """Return everything recorded about a workflow, oldest first."""
    shown: list[RenderableType] = []
    for event in story_of(trail, reference):
        match event:
            case Run():
                what = f"{event.run_id} attempt {event.attempt} {_coloured(event.status)}"
                shown.append(_event(event.ended_us, event.leaf_hash, what))
                shown += [
                    f"    {step.name} {_coloured(step.status)}: {escape(step.reason)}" for step in failed_steps(event)
                ]
            case Patch():
                what = "patched" if event.before else "written"
                told = f"[bold]{what}[/bold] by {escape(event.author)}: {escape(event.reason)}"
                shown.append(_event(event.time_us, event.leaf_hash, told))
                if with_diffs:
                    shown.append(Syntax(event.diff.rstrip(), "diff", background_color="default"))
            case Effect():
                first, *rest = effect_view(trail, event.body)
                shown += [_event(event.time_us, event.leaf_hash, str(first)), *rest]
            case Approval():
                void = "" if event.is_valid else " [red](void: not signed with a good key of theirs)[/red]"
                note = f": {escape(event.body.reason)}" if event.body.reason else ""
                told = f"{escape(event.step)} {event.body.decision} by {escape(event.name)}{note}{void}"
                shown.append(_event(event.time_us, event.leaf_hash, told))
    return shown


def bars_for(kind: str, console: Console) -> AbstractContextManager[Any]:
    """Return the progress bars of a kind of step, to be used as a context."""
    from cluster.commands.data_tables import RowBar
    from cluster.commands.settle_tables import SettleBars
    from cluster.commands.train_tables import BenchmarkBars, TrainBars

    bars: dict[str, Any] = {"refine": RowBar, "train": TrainBars, "benchmark": BenchmarkBars, "settle": SettleBars}
    shown: AbstractContextManager[Any] = bars[kind](console)
    return shown


def _event(time_us: int, leaf_hash: str, what: str) -> str:
    return f"[dim]{utc(time_us)} {leaf_hash[:12]}[/dim]  {what}"


def _step_line(step: StepRun) -> str:
    made = ", ".join(f"{output.name} {output.artefact.digest[SHORT]}" for output in step.outputs)
    detail = step.reason or made
    return f"{step.name}: {_coloured(step.status)}" + (f": {escape(detail)}" if detail else "")


def _next_steps(run: Run) -> list[str]:
    lines = []
    for step in run.steps:
        if step.status in ("waiting", "refused"):
            who = escape(step.reason)
            lines.append(f"[yellow]{step.name}[/yellow]: {who}")
            lines.append(
                f"  trailmark approve {run.run_id} {step.name} --as NAME [--reject] [--note WHY]".replace("[", "\\[")
            )
        if step.status == "failed":
            lines.append(f"[red]{step.name}[/red] failed: {escape(step.reason)}")
    if run.status in ("failed", "waiting", "refused"):
        lines.append(f"Go on afterwards with: trailmark run --resume {run.workflow}")
    return lines


def _coloured(status: str) -> str:
    return f"[{COLOURS[status]}]{status}[/{COLOURS[status]}]" if status in COLOURS else status
