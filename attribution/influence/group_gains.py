"""First-order gains of groups of rows, taken while a run is run again: where a settlement's ridge may start from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attribution.influence.gradients import Encoded
from attribution.influence.replay import LoraRun, RunState, clip_factor
from attribution.influence.stacked_lora import TokenRows

NUM_LOOKS = 8
"""Steps, evenly spread, at which gradients are taken."""
QUERIES_AT_ONCE = 8


def group_gains(
    run: LoraRun, masks: Tensor, queries: Sequence[Encoded], *, num_looks: int = NUM_LOOKS, of_likelihood: bool = False
) -> Tensor:
    """Return [n, q]: what the rows of each group (masks [n, N], 0 or 1) did to each query's mean log-likelihood.

    Semantics: gain(c, q) = sum over looks of lr * (gradient of q) . P (gradient of c's rows in the step's loss, clipped
    as the step's was), with the P that the step's Adam divided by: 1 / (sqrt(v / (1 - beta2^t)) + eps), its own
    gradient within v. `of_likelihood`: gains of exp(mean log-likelihood), by the chain rule at each look. Only
    comparable among each other: looks stand for all steps.
    """
    data = TokenRows.of(queries, device=run.lora.device)
    looks = {int((look + 0.5) * run.num_steps / num_looks) for look in range(num_looks)}
    total = torch.zeros(len(masks), len(queries))
    state = run.initial()
    with run.lora.attached():
        for step in range(run.num_steps):
            after, gradient = run.advance_and_tell(state, step)
            if step in looks:
                of_groups = run.gradient(state.weights.expand(len(masks), -1), step, masks.to(state.weights))
                moved = of_groups * _step_size(run, after, gradient)
                total += (moved @ _query_gradients(run, state, data, of_likelihood=of_likelihood).T).cpu()
            state = after
    return total


def _step_size(run: LoraRun, after: RunState, gradient: Tensor) -> Tensor:
    """[p]: what the update that led to `after` multiplied its own gradient [1, p] by."""
    recipe = run.recipe
    root = (after.exp_avg_sq / (1 - recipe.beta2**after.step)).sqrt()
    size = recipe.steps[after.step - 1].lr / (root + recipe.eps)
    return size * clip_factor(gradient, recipe.max_grad_norm)[0] if recipe.max_grad_norm > 0 else size


def _query_gradients(run: LoraRun, state: RunState, data: TokenRows, *, of_likelihood: bool) -> Tensor:
    """[q, p]: gradients of the queries' mean nats per target token, or of -exp(-nats), at one run's weights."""
    found = []
    for rows in torch.arange(len(data), device=state.weights.device).split(QUERIES_AT_ONCE):
        with torch.enable_grad():
            leaf = state.weights.expand(len(rows), -1).clone().requires_grad_()
            losses = run.lora.row_losses(leaf, *data.take(rows))[:, 0] / data.num_targets[rows]
            losses = -(-losses).exp() if of_likelihood else losses
            found.append(torch.autograd.grad(losses.sum(), leaf)[0])
    return torch.cat(found)
