"""A recorded run beside its replay: the kept states, and how far the replay lies from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from attribution.influence.replay import LoraRun, RunState
from attribution.influence.store import Trace

EXACT_SHARE = 1e-3
"""A replay is called exact when no weight ends further from the recorded one than this share of the largest move that
training made. Sums in another order (more workers, another attention kernel) stay well below; see docs/log.md."""


class KeptStates(Mapping[int, RunState]):
    """The states that a trace kept, by number of updates; each is read when it is asked for, and not held."""

    def __init__(self, trace: Trace, run: LoraRun) -> None:
        self._trace, self._run = trace, run

    def __getitem__(self, step: int) -> RunState:
        state = self._trace.state(step)
        parts = (self._run.lora.flatten(part) for part in (state.weights, state.exp_avg, state.exp_avg_sq))
        return RunState(step, *parts)

    def __iter__(self) -> Iterator[int]:
        return iter(self._trace.state_steps)

    def __len__(self) -> int:
        return len(self._trace.state_steps)


@dataclass(frozen=True)
class Fidelity:
    """How well a run was replayed from its first weights to its last.

    max_abs_diff: largest difference of any final weight from the recorded one. max_rel_diff: the same over the largest
    distance that training moved a weight. drift: the largest difference between two kept states, each segment replayed
    from the kept state before it; this is what the sweep stands on.
    """

    max_abs_diff: float
    max_rel_diff: float
    drift: float

    @property
    def is_exact(self) -> bool:
        return self.max_rel_diff <= EXACT_SHARE


def fidelity(run: LoraRun, states: Mapping[int, RunState], *, drift: float, replayed: RunState) -> Fidelity:
    """Compare a whole replay with the recorded end."""
    final = states[run.num_steps].weights
    difference = _largest(replayed.weights - final)
    return Fidelity(difference, difference / max(_largest(final - states[0].weights), 1e-30), drift)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
