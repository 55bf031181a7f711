"""How a query's loss would move if an example's weight did: the recorded AdamW run, differentiated exactly.

The principle is MAGIC's (Ilyas and Engstrom 2025, https://arxiv.org/abs/2504.16430): a reverse sweep over the updates,
their states recomputed from about sqrt(steps) kept ones. Scores are derivatives: what they promise is the effect of a
small removal. By Euler's identity they do not add up to what training gained: Adam does not care for the scale of the
loss, so sum_i w_i dL/dw_i is about zero whatever the examples are worth.

Shape legend: q queries, n examples, k rows of a step, p weights.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution.influence.gradients import Encoded
from attribution.influence.replay import CLIP_EPS, LoraRun, RunState, clip
from attribution.influence.stacked_lora import TokenRows

QuerySet = Sequence[Encoded]
"""Queries whose mean loss is one quantity to explain; a single completion is a set of one."""
QUERIES_AT_ONCE = 16
"""Cotangents carried by one sweep. They share every forward and first backward; see benchmarks/audit_cost.py."""


@dataclass(frozen=True)
class Cotangent:
    """d loss / d state of each query, [q, p] each."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class Unrolled:
    """What a sweep found.

    scores: float64 [q, n], nats per target token by which the query set's mean loss rises when an example's weight goes
    from 1 to 0, to first order (-dL/dw): positive when the example helped. losses: float64 [q] at the run's end.
    drift: largest difference of any weight between a kept state and the one recomputed from the kept state before it.
    """

    scores: NDArray[np.float64]
    losses: NDArray[np.float64]
    drift: float
    cpu_seconds: float
    num_states_held: int

    @property
    def cancellation(self) -> NDArray[np.float64]:
        """Return float64 [q]: |sum of the scores| over the sum of their sizes; near zero by Euler's identity."""
        size = np.abs(self.scores).sum(axis=1)
        return np.abs(self.scores.sum(axis=1)) / np.maximum(size, np.finfo(np.float64).tiny)


def keep_states(run: LoraRun, example_weights: Tensor | None = None, *, num_segments: int = 0) -> dict[int, RunState]:
    """Run once and return about sqrt(steps) of its states (or `num_segments`) by their number of updates, both ends in.

    For a run that nobody recorded; a trace has its own.
    """
    segments = num_segments or max(1, math.isqrt(run.num_steps))
    wanted = {round(run.num_steps * part / segments) for part in range(segments + 1)}
    state = run.initial()
    states = {0: state}
    with run.lora.attached():
        for step in range(run.num_steps):
            state = run.advance(state, step, example_weights)
            if step + 1 in wanted:
                states[step + 1] = state
    return states


def unrolled_scores(
    run: LoraRun,
    queries: Sequence[QuerySet],
    *,
    states: Mapping[int, RunState] | None = None,
    example_weights: Tensor | None = None,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Unrolled:
    """Differentiate the loss of each query set through the run, at weights [n] (all 1 by default).

    `states` are kept ones by number of updates, 0 and the last among them; missing ones are recomputed. Memory: the
    states of one segment, the kept ones if they are in memory, 3 cotangents [q, p] and one step's graph.
    """
    started = time.process_time()
    states = states if states is not None else keep_states(run, example_weights)
    weights = example_weights if example_weights is not None else torch.ones(run.num_examples)
    weights = weights.to(run.lora.own_weights())
    parts = [
        _sweep(run, queries[start : start + queries_at_once], states, weights)
        for start in range(0, len(queries), queries_at_once)
    ]
    return Unrolled(
        scores=np.concatenate([part.scores for part in parts]),
        losses=np.concatenate([part.losses for part in parts]),
        drift=max(part.drift for part in parts),
        cpu_seconds=time.process_time() - started,
        num_states_held=max(part.num_states_held for part in parts),
    )


def _sweep(run: LoraRun, queries: Sequence[QuerySet], states: Mapping[int, RunState], weights: Tensor) -> Unrolled:
    """Carry the cotangents of some queries from the last update to the first, a segment at a time."""
    started = time.process_time()
    kept = sorted(states)
    assert kept[0] == 0 and kept[-1] == run.num_steps, "kept states must hold both ends of the run"
    total = torch.zeros(len(queries), run.num_examples, dtype=torch.float64, device=weights.device)
    drift = 0.0
    with run.lora.attached():
        losses, cotangent = _final_cotangent(run, states[kept[-1]], queries)
        for start, end in zip(kept[-2::-1], kept[:0:-1], strict=True):
            segment = _segment(run, states[start], end, weights)
            drift = max(drift, float((segment[-1].weights - states[end].weights).abs().max()))
            for step in range(end - 1, start - 1, -1):
                before, after = segment[step - start], segment[step + 1 - start]
                cotangent = _step_back(run, before, after, cotangent, weights=weights, total=total)
    longest = max(end - start for start, end in pairwise(kept)) if len(kept) > 1 else 0
    scores = -total.cpu().numpy()
    return Unrolled(scores, losses.double().cpu().numpy(), drift, time.process_time() - started, longest + 1)


def _segment(run: LoraRun, start: RunState, end: int, weights: Tensor) -> list[RunState]:
    """Return the states from `start` to the one after update `end`, both included."""
    states = [start]
    for step in range(start.step, end):
        states.append(run.advance(states[-1], step, weights))
    return states


def _final_cotangent(run: LoraRun, state: RunState, queries: Sequence[QuerySet]) -> tuple[Tensor, Cotangent]:
    """Return (losses [q], their cotangent): the gradient of each set's mean loss at the run's last weights."""
    losses, gradients = [], []
    for query_set in queries:
        data = TokenRows.of(query_set, device=run.lora.device)
        with torch.enable_grad():
            leaf = state.weights.detach()[None].requires_grad_()
            rows = run.lora.row_losses(leaf, *data.take(torch.arange(len(data), device=leaf.device)))
            loss = (rows[0] / data.num_targets).mean()
            gradients.append(torch.autograd.grad(loss, leaf)[0][0])
        losses.append(loss.detach())
    stacked = torch.stack(gradients)
    return torch.stack(losses), Cotangent(stacked, torch.zeros_like(stacked), torch.zeros_like(stacked))


def _step_back(
    run: LoraRun, before: RunState, after: RunState, cotangent: Cotangent, *, weights: Tensor, total: Tensor
) -> Cotangent:
    """Return the cotangent of the state before an update, and add the examples' part of it to `total` [q, n]."""
    step, recipe = before.step, run.recipe
    rows = run.rows_of(step)
    with torch.enable_grad():
        leaf, row_weights = before.weights.detach()[None].requires_grad_(), weights[rows][None].requires_grad_()
        loss = (run.row_losses(leaf, rows[None]) * row_weights).sum() / run.divisor_of(step)
        gradient = torch.autograd.grad(loss, leaf, create_graph=True)[0]
    clipped = clip(gradient.detach(), recipe.max_grad_norm)[0]
    weights_part, exp_avg, exp_avg_sq = _through_adamw(run, after, cotangent)
    on_clipped = (1 - recipe.beta1) * exp_avg + 2 * (1 - recipe.beta2) * clipped * exp_avg_sq
    on_gradient = _through_clip(gradient.detach()[0], on_clipped, recipe.max_grad_norm)
    # One graph for all queries: the product with the Hessian, and with each row's own gradient.
    hessian, per_row = torch.autograd.grad(
        gradient, (leaf, row_weights), grad_outputs=on_gradient[:, None], is_grads_batched=True
    )
    total.index_add_(1, rows, per_row[:, 0].double())
    return Cotangent(weights_part + hessian[:, 0], recipe.beta1 * exp_avg, recipe.beta2 * exp_avg_sq)


def _through_adamw(run: LoraRun, after: RunState, cotangent: Cotangent) -> tuple[Tensor, Tensor, Tensor]:
    """Return [q, p] each: cotangents of the weights before the update (the decay's part) and of both new moments.

    Where the second moment is exactly zero so was every gradient; its root has no derivative there, and none is needed:
    what reaches the weights comes by the first moment alone.
    """
    recipe, number = run.recipe, after.step
    lr = recipe.steps[number - 1].lr
    correction = (1 - recipe.beta2**number) ** 0.5
    rate = lr / (1 - recipe.beta1**number)
    root = (after.exp_avg_sq + recipe.eps_root).sqrt()
    divisor = root / correction + recipe.eps
    slope = torch.where(root > 0, 0.5 / root, torch.zeros_like(root)) / correction
    exp_avg = cotangent.exp_avg - rate * cotangent.weights / divisor
    exp_avg_sq = cotangent.exp_avg_sq + rate * cotangent.weights * (after.exp_avg / divisor.square() * slope)
    return cotangent.weights * (1 - lr * recipe.weight_decay), exp_avg, exp_avg_sq


def _through_clip(gradient: Tensor, cotangent: Tensor, max_norm: float) -> Tensor:
    """Return [q, p]: the cotangent of the gradient [p] from that of its clipped self [q, p]."""
    norm = torch.linalg.vector_norm(gradient)
    if max_norm <= 0 or norm + CLIP_EPS <= max_norm:
        return cotangent
    scale = max_norm / (norm + CLIP_EPS)
    along = (cotangent @ gradient) * (scale / ((norm + CLIP_EPS) * norm))
    return scale * cotangent - along[:, None] * gradient
