"""A recorded LoRA run as a pure function of its first weights and of a weight on every example.

Semantics, for each recorded step with rows B, rate lr and D = target tokens of all of B:
    g = d/dθ sum_{i in B} w_i nll_i(θ) / D          D is fixed: leaving rows out keeps the schedule and the scale
    g = g / max(1, (|g| + 1e-6) / max_grad_norm)    the clip of DeepSpeed and of torch.nn.utils.clip_grad_norm_
    m, v, θ = AdamW(m, v, θ, g)                     torch.optim.AdamW, operation by operation
At w = 1 this is the training loop. Shape legend: n examples, b runs at once, k rows of one run in one step, p weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attribution.influence.gradients import Encoded
from attribution.influence.stacked_lora import StackedLora, TokenRows
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.influence.store import Trace

CLIP_EPS = 1e-6
"""What DeepSpeed and torch add to the norm before they compare it."""
TOKENS_AT_ONCE = 4096
"""Padded tokens of one forward over several runs; see LoraRun.run_many."""


class ReplayError(UserError):
    """A recorded run cannot be replayed: something that the replay needs was not written down, or does not fit."""


@dataclass(frozen=True)
class RunStep:
    """One optimizer step: the rows of its global batch (by place in the run's examples) and its learning rate."""

    rows: tuple[int, ...]
    lr: float


@dataclass(frozen=True)
class RunRecipe:
    """Everything but the data and the first weights. `max_grad_norm` 0 clips nothing.

    `eps_root` is added under the root of Adam's second moment; torch knows no such thing, so a recorded run has 0.
    """

    steps: tuple[RunStep, ...]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eps_root: float = 0.0


@dataclass(frozen=True)
class RunState:
    """Weights and both moments after `step` updates: [p] of one run, or [b, p] of several."""

    step: int
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def start(cls, weights: Tensor) -> "RunState":
        """Return the state before the first update."""
        return cls(0, weights, torch.zeros_like(weights), torch.zeros_like(weights))

    def repeat(self, num_runs: int) -> "RunState":
        """Return the state [b, p] of so many runs that begin here."""
        parts = (value.expand(num_runs, -1) for value in (self.weights, self.exp_avg, self.exp_avg_sq))
        return RunState(self.step, *parts)


class LoraRun:
    """A recorded run that can be run again, with any weights on its examples, many at a time.

    `model` is a PEFT causal LM on a frozen base; it lends its base and the first weights and is not changed. Results
    are a pure function of the arguments on one machine with one number of threads.
    """

    def __init__(
        self, model: nn.Module, examples: Sequence[Encoded], recipe: RunRecipe, *, first_weights: Tensor | None = None
    ) -> None:
        self.lora = StackedLora(model)
        self.recipe = recipe
        self.num_examples = len(examples)
        self._data = TokenRows.of(examples, device=self.lora.device)
        self._first = self.lora.own_weights() if first_weights is None else first_weights
        self._rows = [torch.tensor(step.rows, device=self.lora.device) for step in recipe.steps]
        self._divisors = [int(self._data.num_targets[rows].sum()) for rows in self._rows]

    @classmethod
    def of_trace(cls, trace: "Trace", model: nn.Module) -> "LoraRun":
        """Return the run that a recorder wrote down; `model` is its base with an adapter of the same shape.

        Raises:
            TraceError: the adapter was trained without a recorder, or a row was erased since.
            ReplayError: the run had dropout, whose masks nobody kept.
            StackError: the recorded weights are not of the model's adapter.
        """
        facts = trace.facts
        if facts.lora_dropout:
            raise ReplayError(
                f"trace {trace.path.name}: trained with train.lora_dropout={facts.lora_dropout:g}, whose masks were "
                "not kept: the run cannot be replayed; its stored gradients still rank examples (`trailmark ask who`)"
            )
        recipe = RunRecipe(
            tuple(RunStep(step.rows, step.lr) for step in trace.steps),
            beta1=facts.adam.beta1,
            beta2=facts.adam.beta2,
            eps=facts.adam.eps,
            weight_decay=facts.weight_decay,
            max_grad_norm=facts.max_grad_norm,
        )
        run = cls(model, trace.encoded, recipe)
        run._first = run.lora.flatten(trace.adapter_weights(0))
        return run

    @property
    def num_steps(self) -> int:
        return len(self.recipe.steps)

    def rows_of(self, step: int) -> Tensor:
        """Return int64 [k]: the examples of a step's batch."""
        return self._rows[step]

    def divisor_of(self, step: int) -> int:
        """Return the target tokens of a step's whole batch."""
        return self._divisors[step]

    def initial(self) -> RunState:
        """Return the state before the first step, [p]."""
        return RunState.start(self._first.detach().clone())

    def advance(self, state: RunState, step: int, example_weights: Tensor | None = None) -> RunState:
        """Return the state after update number `step` (from 0): [p] with weights [n], or [b, p] with weights [b, n].

        A row whose weight is zero costs nothing.
        """
        return self.advance_and_tell(state, step, example_weights)[0]

    def advance_and_tell(
        self, state: RunState, step: int, example_weights: Tensor | None = None
    ) -> tuple[RunState, Tensor]:
        """As `advance`; return (the state, the gradient [b, p] that moved it, before the clip)."""
        is_solo = state.weights.dim() == 1
        many = state.repeat(1) if is_solo else state
        weights = self._weights(example_weights, num_runs=len(many.weights))
        gradient = self.gradient(many.weights, step, weights)
        after = self._update(many, step, gradient)
        return (_first_of(after) if is_solo else after), gradient

    def gradient(self, weights: Tensor, step: int, example_weights: Tensor) -> Tensor:
        """Return [b, p]: the gradient of a step's loss at weights [b, p], before the clip."""
        rows, chosen = self._chosen(step, example_weights)
        if not rows.numel():
            return torch.zeros_like(weights)
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_()
            losses = self.row_losses(leaf, rows)
            return torch.autograd.grad((losses * chosen).sum() / self._divisors[step], leaf)[0]

    def row_losses(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Return [b, k]: summed nats of the examples `rows` [b, k] under the runs' weights [b, p]."""
        input_ids, labels = self._data.take(rows.reshape(-1))
        return self.lora.row_losses(weights, input_ids, labels)

    def run(self, example_weights: Tensor | None = None, *, start: RunState | None = None) -> RunState:
        """Run to the end from `start` (the beginning, if None) and return the last state, [p]."""
        state = start or self.initial()
        with self.lora.attached():
            for step in range(state.step, self.num_steps):
                state = self.advance(state, step, example_weights)
        return state

    def run_many(self, example_weights: Tensor, *, runs_at_once: int | None = None) -> RunState:
        """Return the last states [b, p] of one run for each row of weights [b, n].

        Runs share the base's forward, `runs_at_once` of them at a time: by default as many as keep a step's tokens near
        TOKENS_AT_ONCE, which is where a larger batch stopped paying on a processor with 2 MiB of cache per core.
        """
        size = runs_at_once or self.runs_at_once()
        with self.lora.attached():
            parts = [self._run_group(group) for group in example_weights.split(size)]
        stacked = (torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS)
        return RunState(self.num_steps, *stacked)

    def runs_at_once(self) -> int:
        """Return how many runs share a forward by default."""
        longest = int(self._data.lengths.max())
        tokens = max(len(step.rows) for step in self.recipe.steps) * longest
        return max(1, TOKENS_AT_ONCE // tokens)

    def query_losses(self, state: RunState, queries: Sequence[Encoded]) -> Tensor:
        """Return the mean nats per target token of each query: [q] for one run's state, [b, q] for several."""
        data = TokenRows.of(queries, device=self.lora.device)
        with torch.no_grad(), self.lora.attached():
            found = torch.cat([self._one_run(data, weights) for weights in state.weights.view(-1, self.num_weights)])
        return found[0] if state.weights.dim() == 1 else found

    @property
    def num_weights(self) -> int:
        return self.lora.num_weights

    def _one_run(self, data: TokenRows, weights: Tensor) -> Tensor:
        size = max(1, TOKENS_AT_ONCE // data.input_ids.shape[1])
        every = torch.arange(len(data), device=weights.device)
        parts = [self.lora.row_losses(weights[None], *data.take(rows)) for rows in every.split(size)]
        return torch.cat(parts, dim=1) / data.num_targets

    def _run_group(self, example_weights: Tensor) -> RunState:
        state = self.initial().repeat(len(example_weights))
        for step in range(self.num_steps):
            state = self.advance(state, step, example_weights)
        return state

    def _weights(self, example_weights: Tensor | None, *, num_runs: int) -> Tensor:
        if example_weights is None:
            return torch.ones(num_runs, self.num_examples, dtype=self._first.dtype, device=self._first.device)
        weights = example_weights.to(self._first).view(-1, self.num_examples)
        if len(weights) != num_runs:
            raise ReplayError(f"example weights: {len(weights)} runs, but the state is of {num_runs}")
        return weights

    def _chosen(self, step: int, example_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows [b, k] that any weight is on, and their weights; shorter runs are filled up at weight 0."""
        rows = self._rows[step]
        weights = example_weights[:, rows]
        num_active = int((weights != 0).sum(dim=1).max()) if len(rows) else 0
        if num_active == len(rows):
            return rows.expand(len(weights), -1), weights
        order = (weights == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_active]
        return rows[order], weights.gather(1, order)

    def _update(self, state: RunState, step: int, gradient: Tensor) -> RunState:
        return adamw_step(state, clip(gradient, self.recipe.max_grad_norm), self.recipe, lr=self.recipe.steps[step].lr)


def clip(gradient: Tensor, max_norm: float) -> Tensor:
    """Return the gradient [b, p] of each run scaled to `max_norm` at most, as DeepSpeed does; 0 leaves it alone."""
    return gradient * clip_factor(gradient, max_norm) if max_norm > 0 else gradient


def clip_factor(gradient: Tensor, max_norm: float) -> Tensor:
    """Return [b, 1]: what `clip` multiplies each run's gradient [b, p] by; `max_norm` > 0."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return 1.0 / ((norm + CLIP_EPS) / max_norm).clamp(min=1.0)


def adamw_step(state: RunState, gradient: Tensor, recipe: RunRecipe, *, lr: float) -> RunState:
    """Return the state after one AdamW update; the operations and their order are those of torch.optim.AdamW."""
    number = state.step + 1
    exp_avg = state.exp_avg.lerp(gradient, 1 - recipe.beta1)
    exp_avg_sq = (state.exp_avg_sq * recipe.beta2).addcmul(gradient, gradient, value=1 - recipe.beta2)
    root = (exp_avg_sq + recipe.eps_root).sqrt() if recipe.eps_root else exp_avg_sq.sqrt()
    correction = (1 - recipe.beta2**number) ** 0.5
    weights = state.weights * (1 - lr * recipe.weight_decay) if recipe.weight_decay else state.weights
    weights = weights.addcdiv(exp_avg, root / correction + recipe.eps, value=-lr / (1 - recipe.beta1**number))
    return RunState(number, weights, exp_avg, exp_avg_sq)


_TENSORS = ("weights", "exp_avg", "exp_avg_sq")


def _first_of(state: RunState) -> RunState:
    return replace(state, **{name: getattr(state, name)[0] for name in _TENSORS})
