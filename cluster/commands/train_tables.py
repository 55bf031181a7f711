"""What train and benchmark show: bars fed by the run's own events, and closing tables."""

import itertools
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines.train.driver import Planned
from pipelines.train.trace import AttemptStarted, GradientsTaken, StepTaken

if TYPE_CHECKING:
    from pipelines.benchmark.run import BenchmarkProgress, BenchmarkReport
    from pipelines.train.driver import TrainReport
    from pipelines.train.trace import Event

METRIC_NOTES = {
    "loss": "mean nats per token of the reference; lower is better",
    "exact_match": "answers equal to an expected text or the reference",
    "contains": "answers that hold an expected text",
}
STAGE_TITLES = {"loss": "Reference loss", "answers": "Answers"}


class TrainBars:
    """Progress of one training run, to be passed as `progress`; use it as a context."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[facts]}"), console=console)
        self._console = console
        self._steps = self._progress.add_task("Training", total=None, facts="starting workers")
        self._gradients = self._progress.add_task("Gradients", total=None, visible=False, facts="of every example")

    def __enter__(self) -> "TrainBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: "Planned | Event") -> None:
        """Show one event."""
        if isinstance(event, Planned):
            self._progress.update(self._steps, total=event.num_steps)
            for example_id, reason in event.skipped:
                self._console.print(f"[yellow]row {example_id} is left out:[/yellow] {reason}")
            for warning in event.warnings:
                self._console.print(f"[yellow]Warning:[/yellow] {warning}")
            if event.refresh_steps:
                self._console.print(
                    f"In-run scores: the queries' gradients are taken every {event.refresh_steps} steps"
                )
        elif isinstance(event, AttemptStarted):
            if event.attempt > 1:
                self._console.print(f"[yellow]attempt {event.attempt}:[/yellow] resumed after step {event.step}")
            self._progress.update(self._steps, completed=event.step, facts=f"{event.world_size} workers")
        elif isinstance(event, StepTaken):
            self._progress.update(self._steps, completed=event.step, facts=_step_facts(event))
        elif isinstance(event, GradientsTaken):
            self._progress.update(
                self._gradients, visible=True, completed=event.num_done, total=event.num_total, facts="of every example"
            )


class BenchmarkBars:
    """Progress of one benchmark, to be passed as `progress`; use it as a context."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._tasks = {stage: self._progress.add_task(title, total=None) for stage, title in STAGE_TITLES.items()}

    def __enter__(self) -> "BenchmarkBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: "BenchmarkProgress") -> None:
        """Show one event."""
        self._progress.update(self._tasks[event.stage], completed=event.num_done, total=event.num_total)


def training_table(report: "TrainReport", name: str) -> Table:
    """Return the facts of a finished run."""
    table = Table(title=f"Adapter {name}", show_header=False)
    table.add_row("digest", report.digest)
    table.add_row("record", report.entry.leaf_hash[:12])
    table.add_row("trace", report.trace_digest)
    table.add_row("steps, examples", f"{report.num_steps}, {report.num_examples}")
    table.add_row("loss, first and last step", f"{report.losses[0]:.4f}, {report.losses[-1]:.4f} nats per token")
    table.add_row("speed", f"{report.tokens_per_s:.0f} real tokens/s, {report.padding_share:.1%} padding on top")
    table.add_row("reloaded logits differ by", f"{report.reload_max_abs_diff:.2g} at most")
    facts = report.facts
    num_states, size_mb = len(facts.state_steps), facts.bytes_per_state / 1e6
    table.add_row("kept for replay", f"the start and {num_states} states of {size_mb:.1f} MB")
    if report.in_run is not None:
        for name, queries in itertools.groupby(report.in_run.queries, key=lambda query: query.query_set):
            table.add_row(f"scored against {name}", f"{sum(query.num_items for query in queries)} queries")
        every, count = report.in_run.refresh_steps, report.in_run.num_refreshes
        taken = f"gradients every {every} steps, {count} in all"
        table.add_row("in-run scores", f"{taken}; {report.in_run.overhead:.1%} on top of the steps' time")
    if report.num_attempts > 1:
        table.add_row("attempts", str(report.num_attempts))
    return table


def benchmark_table(report: "BenchmarkReport", title: str, *, confidence: float) -> Table:
    """Return base against adapter, metric by metric."""
    table = Table(title=title, caption=f"record {report.entry.leaf_hash[:12]}; answers in table {report.details}")
    for column in ("metric", "base", "adapter", "difference", f"{confidence:.0%} interval", "items"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    table.add_column("")
    for m in report.metrics:
        interval = f"{m.low:+.3f} .. {m.high:+.3f}"
        note = METRIC_NOTES[m.metric] + ("" if m.is_distinct else "; not distinct from zero")
        table.add_row(
            m.metric, f"{m.base:.3f}", f"{m.adapter:.3f}", f"{m.delta:+.3f}", interval, str(m.num_items), note
        )
    return table


def _step_facts(step: StepTaken) -> str:
    speed = step.num_tokens / step.seconds
    return f"loss {step.loss:.4f}  lr {step.lr:.2e}  {speed:.0f} tokens/s  padding {step.padding_share:.0%}"
