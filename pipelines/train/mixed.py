"""Train several adapters on one base at once: every step is one forward over rows that belong to different adapters.

Each adapter has its own rows, order, rates, clip, Adam and early stop, and ends where its solo run would end. What goes
wrong in one, a loss that is not finite, ends that one alone: rows meet only in products that keep them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.gradients import Encoded
from attribution.influence.replay import RunRecipe, RunState, adamw_step, clip
from attribution.influence.stacked_lora import StackedLora, TokenRows
from configs.errors import UserError


class MixedError(UserError):
    """Jobs that cannot share a base, or a job without steps."""


@dataclass(frozen=True)
class EarlyStop:
    """Stop when the mean loss of `queries`, taken every `every` steps, missed its best `patience` times running."""

    queries: Sequence[Encoded]
    every: int
    patience: int


@dataclass(frozen=True)
class MixedJob:
    """One adapter to train: [p] first weights in the layout of the shared model's adapter, rows, recipe."""

    name: str
    examples: Sequence[Encoded]
    recipe: RunRecipe
    first_weights: Tensor
    early_stop: EarlyStop | None = None


@dataclass(frozen=True)
class MixedOutcome:
    """Where an adapter ended. `losses`: mean nats per target token of each step taken, before its update.

    `reason`: "finished", "stopped early", or "diverged" (the state is then the last finite one).
    """

    name: str
    state: RunState
    losses: tuple[float, ...]
    reason: str


class _Learner:
    """One job's state between steps."""

    def __init__(self, job: MixedJob, lora: StackedLora) -> None:
        if not job.recipe.steps:
            raise MixedError(f"job {job.name!r}: its recipe has no step")
        if job.first_weights.shape != (lora.num_weights,):
            raise MixedError(
                f"job {job.name!r}: {job.first_weights.numel()} first weights, but the shared model's adapter has "
                f"{lora.num_weights}; adapters of one mix have the same rank and modules"
            )
        self.job = job
        self.data = TokenRows.of(job.examples, device=lora.device)
        self.state = RunState.start(job.first_weights.to(lora.device))
        self.losses: list[float] = []
        self.reason = ""
        self._best, self._num_worse = float("inf"), 0

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of the next step."""
        return self.job.recipe.steps[self.state.step].rows

    def update(self, loss: float, gradient: Tensor) -> None:
        """Take one step unless the loss or the gradient is not finite."""
        if not (torch.isfinite(gradient).all() and loss == loss and abs(loss) != float("inf")):
            self.reason = "diverged"
            return
        recipe = self.job.recipe
        lr = recipe.steps[self.state.step].lr
        self.state = adamw_step(self.state, clip(gradient, recipe.max_grad_norm), recipe, lr=lr)
        self.losses.append(loss)
        if self.state.step == len(recipe.steps):
            self.reason = "finished"

    def watch(self, lora: StackedLora) -> None:
        """Look at the held-out queries when it is time, and stop when they got no better for too long."""
        watch = self.job.early_stop
        if watch is None or self.reason or self.state.step % watch.every:
            return
        data = TokenRows.of(watch.queries, device=lora.device)
        with torch.no_grad():
            every = torch.arange(len(data), device=lora.device)
            summed = lora.row_losses(self.state.weights[None], *data.take(every))[0]
        loss = float((summed / data.num_targets).mean())
        self._num_worse = 0 if loss < self._best else self._num_worse + 1
        self._best = min(self._best, loss)
        if self._num_worse >= watch.patience:
            self.reason = "stopped early"


def train_mixed(model: nn.Module, jobs: Sequence[MixedJob]) -> list[MixedOutcome]:
    """Train every job to its end on the shared base of `model`, a PEFT causal LM, and return them in order.

    Each adapter's result equals `LoraRun(model, job.examples, job.recipe, first_weights=...).run()` within rounding.
    Raises MixedError for a job without steps or of another rank.
    """
    lora = StackedLora(model)
    learners = [_Learner(job, lora) for job in jobs]
    with lora.attached():
        while active := [learner for learner in learners if not learner.reason]:
            _step(lora, active)
            for learner in active:
                learner.watch(lora)
    return [MixedOutcome(one.job.name, one.state, tuple(one.losses), one.reason) for one in learners]


def _step(lora: StackedLora, active: Sequence[_Learner]) -> None:
    """Run one forward and one backward over every active adapter's rows, then each one's own update."""
    input_ids, labels, counts, divisors = _batch(active)
    with torch.enable_grad():
        weights = torch.stack([learner.state.weights for learner in active]).requires_grad_()
        losses = (lora.row_losses(weights, input_ids, labels) * counts).sum(dim=1) / divisors
        gradients = torch.autograd.grad(losses.sum(), weights)[0]
    for learner, loss, gradient in zip(active, losses.tolist(), gradients, strict=True):
        learner.update(loss, gradient)


def _batch(active: Sequence[_Learner]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (ids, labels) [b*k, t], which rows count [b, k], target tokens [b]; short steps repeat their first row."""
    width = max(len(learner.rows) for learner in active)
    taken, counts, divisors = [], [], []
    for learner in active:
        rows = learner.rows
        device = learner.data.input_ids.device
        filled = torch.tensor([*rows, *[rows[0]] * (width - len(rows))], device=device)
        taken.append(learner.data.take(filled))
        counts.append([1.0] * len(rows) + [0.0] * (width - len(rows)))
        divisors.append(int(learner.data.num_targets[list(rows)].sum()))
    longest = max(ids.shape[1] for ids, _ in taken)
    input_ids = torch.cat([nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids, _ in taken])
    padded = [nn.functional.pad(part, (0, longest - part.shape[1]), value=IGNORED_LABEL) for _, part in taken]
    weights = active[0].state.weights
    return input_ids, torch.cat(padded), weights.new_tensor(counts), weights.new_tensor(divisors)
