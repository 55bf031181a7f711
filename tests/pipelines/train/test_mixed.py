"""Adapters trained together against the same adapters trained alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attribution.influence.gradients import Encoded
from attribution.influence.replay import LoraRun, RunRecipe, RunStep
from pipelines.train.mixed import EarlyStop, MixedError, MixedJob, train_mixed
from tests.attribution.influence.test_replay import facts, peft_model

RECIPES = (
    RunRecipe(tuple(RunStep((step % 4, 4, 5), 4e-3) for step in range(6)), max_grad_norm=0.5),
    RunRecipe(tuple(RunStep((step % 5,), 1e-3) for step in range(9)), beta2=0.99, weight_decay=0.1),
    RunRecipe(tuple(RunStep((0, 1, 2, 3, 4), 2e-3 / (1 + step)) for step in range(4)), max_grad_norm=0.0),
)


@pytest.fixture(scope="module")
def examples(tiny_base: Path) -> list[Encoded]:
    return facts(tiny_base)


def jobs(base: Path, examples: list[Encoded]) -> list[MixedJob]:
    """Three adapters with rows, first weights, lengths and optimizers of their own."""
    found = []
    for number, recipe in enumerate(RECIPES):
        own = examples[2 * number : 2 * number + 6]
        first = LoraRun(peft_model(base, seed=number), own, recipe).initial().weights
        found.append(MixedJob(f"adapter {number}", own, recipe, first))
    return found


def test_each_adapter_ends_where_it_would_alone(tiny_base: Path, examples: list[Encoded]) -> None:
    wanted = jobs(tiny_base, examples)
    for job, outcome in zip(wanted, train_mixed(peft_model(tiny_base), wanted), strict=True):
        alone = LoraRun(peft_model(tiny_base), job.examples, job.recipe, first_weights=job.first_weights).run()
        assert (outcome.name, outcome.reason) == (job.name, "finished")
        assert len(outcome.losses) == len(job.recipe.steps)
        torch.testing.assert_close(outcome.state.weights, alone.weights, atol=5e-6, rtol=1e-4)
        assert (alone.weights - job.first_weights).abs().max() > 1e-3


def test_what_diverges_touches_no_other(tiny_base: Path, examples: list[Encoded]) -> None:
    wanted = jobs(tiny_base, examples)
    poisoned = wanted[1].first_weights.clone()
    poisoned[7] = float("nan")
    mixed = train_mixed(peft_model(tiny_base), [wanted[0], replace(wanted[1], first_weights=poisoned), wanted[2]])
    sound = train_mixed(peft_model(tiny_base), wanted)
    assert [outcome.reason for outcome in mixed] == ["finished", "diverged", "finished"]
    assert mixed[1].losses == ()
    for place in (0, 2):
        torch.testing.assert_close(mixed[place].state.weights, sound[place].state.weights, atol=5e-6, rtol=1e-4)


def test_one_stops_early_and_the_others_go_on(tiny_base: Path, examples: list[Encoded]) -> None:
    wanted = jobs(tiny_base, examples)
    rising = RunRecipe(tuple(RunStep((0,), 0.5) for _ in range(9)))
    wanted[1] = replace(wanted[1], recipe=rising, early_stop=EarlyStop(examples[-2:], every=1, patience=2))
    found = train_mixed(peft_model(tiny_base), wanted)
    assert [outcome.reason for outcome in found] == ["finished", "stopped early", "finished"]
    assert len(found[1].losses) < 9


def test_jobs_that_cannot_be_mixed_are_named(tiny_base: Path, examples: list[Encoded]) -> None:
    job = jobs(tiny_base, examples)[0]
    with pytest.raises(MixedError, match=r"'adapter 0': its recipe has no step"):
        train_mixed(peft_model(tiny_base), [replace(job, recipe=RunRecipe(()))])
    with pytest.raises(MixedError, match="same rank and modules"):
        train_mixed(peft_model(tiny_base, rank=2), [job])
