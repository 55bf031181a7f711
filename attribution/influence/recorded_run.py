"""A recorded run beside its replay: the kept states, and how far the replay lies from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from attribution.influence.replay import LoraRun, RunState
from attribution.influence.store import Trace

EXACT_SHARE = 1e-3
"""A replay is called exact when its end lies no further from the recorded one than this share of the way that training
went. Sums in another order (more workers, another attention kernel) stay below it; see docs/log.md. Single weights may
differ by more: where a gradient is nearly zero, Adam turns its rounding into a whole step."""


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

    max_abs_diff: largest difference of any final weight from the recorded one. share_of_move: |replayed - recorded| by
    |recorded - first|, as vectors. drift: the largest difference of any weight between a kept state and its replay from
    the kept state before it, which is all that the sweep stands on.
    """

    max_abs_diff: float
    share_of_move: float
    drift: float

    @property
    def is_exact(self) -> bool:
        return self.share_of_move <= EXACT_SHARE


def fidelity(run: LoraRun, states: Mapping[int, RunState], *, drift: float, replayed: RunState) -> Fidelity:
    """Compare a whole replay with the recorded end."""
    final = states[run.num_steps].weights
    difference = replayed.weights - final
    move = float(torch.linalg.vector_norm(final - states[0].weights))
    share = float(torch.linalg.vector_norm(difference)) / max(move, torch.finfo(final.dtype).tiny)
    return Fidelity(float(difference.abs().max()), share, drift)
