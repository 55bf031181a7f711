"""Unrolled scores against finite differences in float64 and against real removals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from attribution.influence.gradients import Encoded
from attribution.influence.replay import LoraRun, RunRecipe, RunState
from attribution.influence.unrolled import keep_states, unrolled_scores
from tests.attribution.influence.test_replay import facts, peft_model, recipe


class PlainNorm(nn.Module):
    """RMS norm in its input's dtype; transformers' own rounds to float32 on the way."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


def in_float64(model: PeftModel) -> PeftModel:
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, PlainNorm(child))
    return model


def started_off_zero(run: LoraRun) -> torch.Tensor:
    """First weights whose B is not zero, so that no gradient is."""
    noise = torch.randn(run.num_weights, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return run.initial().weights + 0.02 * noise


@pytest.fixture(scope="module")
def examples(tiny_base: Path) -> list[Encoded]:
    return facts(tiny_base)


def exact_run(base: Path, examples: list[Encoded], wanted: RunRecipe) -> LoraRun:
    run = LoraRun(in_float64(peft_model(base, rank=2)), examples, wanted)
    return LoraRun(run.lora.model, examples, wanted, first_weights=started_off_zero(run))


def central_differences(run: LoraRun, queries: list[list[Encoded]], rows: list[int], *, width: float) -> torch.Tensor:
    """Minus the slope of each query's loss along the weight of each row, [rows, queries], by training anew."""
    weights = torch.ones(2 * len(rows), run.num_examples, dtype=torch.float64)
    for place, row in enumerate(rows):
        weights[2 * place, row] += width
        weights[2 * place + 1, row] -= width
    final = run.run_many(weights)
    losses = torch.stack([run.query_losses(final, query).mean(dim=1) for query in queries], dim=1)
    return -(losses[0::2] - losses[1::2]) / (2 * width)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05], ids=["no-clip", "clip"])
def test_scores_are_the_finite_differences(tiny_base: Path, examples: list[Encoded], max_grad_norm: float) -> None:
    run = exact_run(tiny_base, examples, recipe(len(examples), weight_decay=0.1, max_grad_norm=max_grad_norm))
    queries = [examples[:1], examples[3:5]]
    found = unrolled_scores(run, queries)
    # Adam's first update is nearly the sign of the gradient: a wider difference would step over a change of sign.
    rows, width = [0, 3, 7, 10], 1e-6
    wide, narrow = (central_differences(run, queries, rows, width=one) for one in (width, width / 2))
    expected = (4 * narrow - wide) / 3  # Richardson: the error left is of fourth order in the width
    np.testing.assert_allclose(found.scores[:, rows].T, expected.numpy(), rtol=2e-5, atol=1e-9)
    assert np.abs(found.scores).max() > 1e-4, "there must be something to find"


def test_scores_do_not_depend_on_what_was_kept(tiny_base: Path, examples: list[Encoded]) -> None:
    run = exact_run(tiny_base, examples, recipe(len(examples)))
    whole = unrolled_scores(run, [examples[:1], examples[1:2], examples[2:3]], states=keep_states(run, num_segments=1))
    parts = unrolled_scores(
        run,
        [examples[:1], examples[1:2], examples[2:3]],
        states=keep_states(run, num_segments=run.num_steps),
        queries_at_once=2,
    )
    np.testing.assert_allclose(whole.scores, parts.scores, rtol=1e-9)
    assert (whole.num_states_held, parts.num_states_held) == (run.num_steps + 1, 2)
    assert whole.drift == parts.drift == 0.0


def test_a_changed_state_shows_as_drift(tiny_base: Path, examples: list[Encoded]) -> None:
    run = LoraRun(peft_model(tiny_base), examples, recipe(len(examples)))
    states = keep_states(run)
    middle = sorted(states)[1]
    moved = states[middle].weights.clone()
    moved[5] += 0.25
    states[middle] = replace(states[middle], weights=moved)
    assert unrolled_scores(run, [examples[:1]], states=states).drift == pytest.approx(0.25, rel=0.1)


def test_scores_predict_real_removals(tiny_base: Path, examples: list[Encoded]) -> None:
    """Leave each example out in truth. Ranks, and sizes to first order, must come out as predicted."""
    run = LoraRun(peft_model(tiny_base), examples, recipe(len(examples)))
    queries = [examples[row : row + 1] for row in range(4)]
    found = unrolled_scores(run, queries)
    without = run.query_losses(run.run_many(1 - torch.eye(run.num_examples)), [query[0] for query in queries])
    real = (without - run.query_losses(run.run(), [query[0] for query in queries])).numpy().T
    correlation = [np.corrcoef(_ranks(found.scores[row]), _ranks(real[row]))[0, 1] for row in range(len(queries))]
    assert np.mean(correlation) > 0.8, correlation


def test_untouched_weights_stay_finite(tiny_base: Path, examples: list[Encoded]) -> None:
    """LoRA starts with B = 0: at the first step A has gradient zero and second moment zero."""
    run = LoraRun(peft_model(tiny_base), examples, recipe(len(examples)))
    first: RunState = run.advance(run.initial(), 0)
    assert (first.exp_avg_sq == 0).any()
    found = unrolled_scores(run, [examples[:1]])
    assert np.isfinite(found.scores).all() and np.abs(found.scores).max() > 0


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)
