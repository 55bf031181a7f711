"""First-order gains of groups of rows, taken while a run is run again: where a settlement's ridge may start from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attribution.influence.gradients import Encoded
from attribution.influence.replay import LoraRun, RunState
from attribution.influence.stacked_lora import TokenRows

NUM_LOOKS = 8
"""Steps, evenly spread, at which gradients are taken."""
QUERIES_AT_ONCE = 8


def group_gains(run: LoraRun, masks: Tensor, queries: Sequence[Encoded], *, num_looks: int = NUM_LOOKS) -> Tensor:
    """Return [n, q]: what the rows of each group (masks [n, N], 0 or 1) did to each query's mean log-likelihood.

    Semantics: gain(c, q) = sum over looks of lr * (gradient of q) . P (gradient of c's rows in the step's loss), with
    Adam's P = 1 / (sqrt(v / (1 - beta2^t)) + eps). Only comparable among each other: looks stand for all steps.
    """
    data = TokenRows.of(queries, device=run.lora.device)
    looks = {round((look + 0.5) * run.num_steps / num_looks) for look in range(num_looks)}
    total = torch.zeros(len(masks), len(queries))
    state = run.initial()
    with run.lora.attached():
        for step in range(run.num_steps):
            if step in looks and state.step:
                root = (state.exp_avg_sq / (1 - run.recipe.beta2**state.step)).sqrt()
                scale = run.recipe.steps[step].lr / (root + run.recipe.eps)
                of_groups = run.gradient(state.weights.expand(len(masks), -1), step, masks.to(state.weights)) * scale
                total += (of_groups @ _query_gradients(run, state, data).T).cpu()
            state = run.advance(state, step)
    return total


def _query_gradients(run: LoraRun, state: RunState, data: TokenRows) -> Tensor:
    """[q, p]: gradients of the queries' mean nats per target token at one run's weights."""
    found = []
    for rows in torch.arange(len(data), device=state.weights.device).split(QUERIES_AT_ONCE):
        with torch.enable_grad():
            leaf = state.weights.expand(len(rows), -1).clone().requires_grad_()
            losses = run.lora.row_losses(leaf, *data.take(rows))[:, 0] / data.num_targets[rows]
            found.append(torch.autograd.grad(losses.sum(), leaf)[0])
    return torch.cat(found)
