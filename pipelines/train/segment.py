"""Take a stretch of a recorded run again: from one stored state to the next, by the workers and steps of training."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.influence.store import Trace, TraceState
from configs.errors import UserError
from configs.schema import TrainSettings
from pipelines.train.data import Example, plan_steps
from pipelines.train.driver import new_run_folder, prepare, run_workers
from pipelines.train.plan import Plan

if TYPE_CHECKING:
    from attribution.trail import Trail


class SegmentError(UserError):
    """A stretch of a run that this code cannot take again."""


@dataclass(frozen=True)
class Segment:
    """The state after `stop` updates, as it was stored and as it came out again from the one after `start`."""

    start: int
    stop: int
    stored: TraceState
    again: TraceState

    @property
    def largest_differences(self) -> dict[str, float]:
        """Largest absolute difference of weights and of each moment; all zero when the run was equal bit by bit."""
        return {
            name: max(
                float((value - getattr(self.again, name)[key]).abs().max())
                for key, value in getattr(self.stored, name).items()
            )
            for name in ("weights", "exp_avg", "exp_avg_sq")
        }


def replay_segment(
    trail: "Trail", trace: Trace, *, base: Path, base_name: str, settings: TrainSettings, start: int
) -> Segment:
    """Run from the state after `start` updates to the next one that was kept, with the recorded number of workers.

    Raises:
        TraceError: a trace without a recorder or with erased rows, or no state after `start` updates.
        SegmentError: `start` is the end, or this code would take other rows than the run did.
        TrainError: the workers failed.
    """
    stored = trace.state(start)
    later = [step for step in trace.state_steps if step > start]
    if not later:
        raise SegmentError(f"step {start}: the run ended there; start from one of {trace.state_steps[:-1]}")
    examples = _examples(trace)
    settings = settings.model_copy(update={"query_sets": ()})
    planned = plan_steps(examples, settings)
    if [step.rows for step in planned] != [step.rows for step in trace.steps]:
        raise SegmentError(
            f"trace {trace.path.name}: this code deals the rows to steps in another order than the run did; "
            "replay it with the code of its record"
        )
    plan = Plan(new_run_folder(trail, "segment"), str(base), base_name, settings, stop_after=later[0])
    try:
        prepare(plan, examples, num_steps=len(planned))
        return _run(plan, trace, stored, stop=later[0])
    finally:
        shutil.rmtree(plan.run_folder)


def _run(plan: Plan, trace: Trace, stored: TraceState, *, stop: int) -> Segment:
    from pipelines.train.checkpoint import Checkpoint, load, save

    if stored.step:
        state = Checkpoint(stored.step, stored.weights, stored.exp_avg, stored.exp_avg_sq)
        save(state, plan.checkpoint_folder(stored.step))
    run_workers(plan, progress=lambda _: None)
    again = load(plan.checkpoint_folder(stop))
    made = TraceState(stop, again.weights, again.exp_avg, again.exp_avg_sq)
    return Segment(stored.step, stop, trace.state(stop), made)


def _examples(trace: Trace) -> tuple[Example, ...]:
    return tuple(
        Example(row, example.example_id, example.contributor, example.text, *encoded)
        for row, (example, encoded) in enumerate(zip(trace.examples, trace.encoded, strict=True))
    )
