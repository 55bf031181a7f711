"""First-order gains of groups against finite differences along what each group's clipped gradient moved."""

from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from attribution.influence.group_gains import group_gains
from attribution.influence.replay import LoraRun
from tests.attribution.influence.test_replay import facts, peft_model, recipe

MAX_NORM = 0.05
H = 0.1


def test_a_gain_is_what_the_group_moved_times_what_that_did_to_a_query(tiny_base: Path) -> None:
    examples, queries = facts(tiny_base), facts(tiny_base)[:3]
    wanted = recipe(len(examples), max_grad_norm=MAX_NORM)
    run = LoraRun(peft_model(tiny_base), examples, wanted)
    masks = torch.zeros(2, len(examples))
    masks[0, ::2], masks[1, 1::2] = 1.0, 1.0
    expected = torch.zeros(2, 2, len(queries))  # of the log-likelihood, of the likelihood
    state = run.initial()
    for number, step in enumerate(wanted.steps):
        after = run.advance(state, number)
        root = (after.exp_avg_sq / (1 - wanted.beta2 ** (number + 1))).sqrt() + wanted.eps
        whole = torch.nn.Parameter(state.weights)
        whole.grad = run.gradient(state.weights[None], number, torch.ones(1, len(examples)))[0]
        norm = clip_grad_norm_([whole], MAX_NORM)
        assert norm > 2 * MAX_NORM, "the step must have been clipped"
        for group, mask in enumerate(masks):
            part = run.gradient(state.weights[None], number, mask[None])[0] * (MAX_NORM / norm)
            ahead, behind = (
                -run.query_losses(replace(state, weights=state.weights - sign * H * step.lr * part / root), queries)
                for sign in (1, -1)
            )
            expected[0, group] += (ahead - behind) / (2 * H)
            expected[1, group] += (ahead.exp() - behind.exp()) / (2 * H)
        state = after
    of_log, of_likelihood = (
        group_gains(run, masks, queries, num_looks=len(wanted.steps), of_likelihood=which) for which in (False, True)
    )
    torch.testing.assert_close(of_log, expected[0], rtol=0.02, atol=2e-4)
    torch.testing.assert_close(of_likelihood, expected[1], rtol=0.02, atol=2e-4)
    assert of_log.abs().max() > 0.5 and of_likelihood.abs().max() > 0.05, "too small to tell"
