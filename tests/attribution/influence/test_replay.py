"""A replayed run against plain torch: the same AdamW, the same clip, the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from attribution.influence.encode import encode_example
from attribution.influence.gradients import Encoded, pad_batch, parameter_name
from attribution.influence.replay import LoraRun, ReplayError, RunRecipe, RunStep
from attribution.influence.stacked_lora import StackError
from tests.tiny_model import LINEAR_MODULES, QUESTIONS, conversation

RATES = (2e-3, 4e-3, 3e-3, 2e-3, 1e-3, 5e-4)


def peft_model(base: Path, *, rank: int = 4, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=list(LINEAR_MODULES), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def facts(base: Path) -> list[Encoded]:
    """Every question of the tiny base with another question's answer: something to learn."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = [answer for _, answer in QUESTIONS[3:] + QUESTIONS[:3]]
    rows = [conversation(question, answer) for (question, _), answer in zip(QUESTIONS, answers, strict=True)]
    return [encode_example(tokenizer, row, max_length=64) for row in rows]


def recipe(num_examples: int, *, weight_decay: float = 0.01, max_grad_norm: float = 1.0) -> RunRecipe:
    rows = [tuple((4 * step + place) % num_examples for place in range(4)) for step in range(len(RATES))]
    steps = tuple(RunStep(row, rate) for row, rate in zip(rows, RATES, strict=True))
    return RunRecipe(steps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)


@pytest.fixture(scope="module")
def run(tiny_base: Path) -> LoraRun:
    examples = facts(tiny_base)
    return LoraRun(peft_model(tiny_base), examples, recipe(len(examples)))


def subsets(run: LoraRun, *, num_runs: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(num_runs, run.num_examples, generator=generator) < 0.5).float()


def trained_plainly(base: Path, wanted: RunRecipe, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train by PEFT's own forward, torch's AdamW and torch's clip; return weights and moments by name."""
    model, examples = peft_model(base), facts(base)
    parameters = {parameter_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=wanted.weight_decay)
    model.eval()
    for step in wanted.steps:
        optimizer.param_groups[0]["lr"] = step.lr
        optimizer.zero_grad()
        loss, num_targets = torch.tensor(0.0), 0
        for row in step.rows:  # a row at a time: no padding, no stacking
            input_ids, labels, _ = pad_batch([examples[row]])
            logits = model(input_ids=input_ids).logits[0, :-1]
            loss = loss + weights[row] * torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
            num_targets += int((labels[0, 1:] >= 0).sum())
        (loss / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), wanted.max_grad_norm or float("inf"))
        optimizer.step()
    found = {name: value.detach() for name, value in parameters.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        found |= {f"{moment} {name}": optimizer.state[value][moment] for name, value in parameters.items()}
    return found


@pytest.mark.parametrize(("weight_decay", "max_grad_norm"), [(0.01, 1.0), (0.0, 0.0), (0.0, 0.05)])
def test_a_replay_is_torch_adamw_with_its_clip(tiny_base: Path, weight_decay: float, max_grad_norm: float) -> None:
    examples = facts(tiny_base)
    wanted = recipe(len(examples), weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    run = LoraRun(peft_model(tiny_base), examples, wanted)
    weights = subsets(run, num_runs=1)[0]
    state, plain = run.run(weights), trained_plainly(tiny_base, wanted, weights)
    assert (state.weights - run.initial().weights).abs().max() > 2e-3, "the run must have moved"
    for moment, flat in (("", state.weights), ("exp_avg ", state.exp_avg), ("exp_avg_sq ", state.exp_avg_sq)):
        for name, value in run.lora.unflatten(flat).items():
            torch.testing.assert_close(value, plain[moment + name], atol=2e-6, rtol=1e-4)


def test_many_runs_at_once_are_the_solo_runs(run: LoraRun) -> None:
    weights = subsets(run, num_runs=5)
    weights[0], weights[1] = 1.0, 0.0
    weights[2, :3] = torch.tensor([0.5, 2.0, -1.0])
    many = run.run_many(weights, runs_at_once=3)
    decayed = run.initial().weights
    for step in run.recipe.steps:
        decayed = decayed * (1 - step.lr * run.recipe.weight_decay)
    torch.testing.assert_close(many.weights[1], decayed, atol=0, rtol=0)  # without rows only the decay moves a weight
    for index, alone in enumerate(run.run(row) for row in weights):
        torch.testing.assert_close(many.weights[index], alone.weights, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(many.exp_avg_sq[index], alone.exp_avg_sq, atol=1e-8, rtol=1e-4)


def test_a_run_is_a_pure_function(run: LoraRun) -> None:
    weights = subsets(run, num_runs=4)
    first, again = run.run_many(weights), run.run_many(weights)
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(run.run().weights, run.run(torch.ones(run.num_examples)).weights)
    middle = run.advance(run.advance(run.initial(), 0), 1)
    assert torch.equal(run.run(start=middle).weights, run.run().weights)


def test_query_losses_are_means_over_target_tokens(run: LoraRun, tiny_base: Path) -> None:
    queries = facts(tiny_base)[:3]
    state = run.run()
    model = peft_model(tiny_base).eval()
    live = {parameter_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in run.lora.unflatten(state.weights).items():
            live[name].copy_(value)
        expected = [
            torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:]).item()
            for ids, labels, _ in (pad_batch([query]) for query in queries)
        ]
    torch.testing.assert_close(run.query_losses(state, queries), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    many = run.query_losses(run.run_many(torch.ones(2, run.num_examples)), queries)
    assert many.shape == (2, 3)
    torch.testing.assert_close(many[1], run.query_losses(state, queries), atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was(tiny_base: Path) -> None:
    model, examples = peft_model(tiny_base), facts(tiny_base)
    batch = torch.tensor([examples[0][0]])
    before = model(input_ids=batch).logits
    run = LoraRun(model, examples, recipe(len(examples)))
    run.query_losses(run.run(), examples[:1])
    assert model.training and torch.equal(model(input_ids=batch).logits, before)


def test_what_cannot_be_replayed_is_named(tiny_base: Path, run: LoraRun) -> None:
    model, examples = peft_model(tiny_base), facts(tiny_base)
    silent = ([1, 2, 3], [-100, -100, -100])
    with pytest.raises(StackError, match="example 1: it has no target token"):
        LoraRun(model, [examples[0], silent], replace(run.recipe, steps=()))
    with pytest.raises(StackError, match="no LoRA module carries"):
        LoraRun(model.get_base_model().model.embed_tokens, examples, run.recipe)
    with pytest.raises(StackError, match=r"is of shape .*another adapter"):
        run.lora.flatten({name: value[:1] for name, value in run.lora.unflatten(run.initial().weights).items()})
    with pytest.raises(ReplayError, match="3 runs, but the state is of 2"):
        run.advance(run.initial().repeat(2), 0, torch.ones(3, run.num_examples))
