"""In-run scores against one backward pass per row and a plain sum over the steps of a plain loop."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from attribution.influence.encode import encode_example
from attribution.influence.gradients import Encoded, pad_batch, parameter_name, target_losses
from attribution.influence.in_run import InRunScorer, RowGradients, Stopwatch
from attribution.influence.run_facts import AdamConstants
from tests.tiny_model import QUESTIONS, conversation

ADAM = AdamConstants(0.9, 0.999, 1e-8)
RATE, MAX_NORM = 5e-3, 0.5


@pytest.fixture
def model(tiny_base: Path) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert isinstance(model, PeftModel)
    return model


@pytest.fixture
def rows(tiny_base: Path) -> list[Encoded]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    pairs = [(question, QUESTIONS[(i + 1) % len(QUESTIONS)][1]) for i, (question, _) in enumerate(QUESTIONS)]
    return [encode_example(tokenizer, conversation(*pair), max_length=64) for pair in pairs]


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {parameter_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def nll(model: PeftModel, row: Encoded) -> Tensor:
    """The summed loss of one row alone."""
    input_ids, labels, mask = pad_batch([row])
    return target_losses(model, input_ids, labels, mask=mask).sum()


def gradient(model: PeftModel, loss: Tensor, names: Sequence[str]) -> Tensor:
    parameters = trained(model)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [parameters[name] for name in names])])


def num_targets(row: Encoded) -> int:
    return sum(label != -100 for label in row[1][1:])


def test_row_gradients_are_those_of_each_row_alone(model: PeftModel, rows: list[Encoded]) -> None:
    gradients = RowGradients(model)
    assert gradients.sizes == {name: p.numel() for name, p in trained(model).items()}
    batch = [rows[i] for i in (0, 5, 11, 6)]  # of uneven length, so three are padded
    found: dict[str, Tensor] = {}
    input_ids, labels, mask = pad_batch(batch)
    with gradients.recording(found.__setitem__):
        target_losses(model, input_ids, labels, mask=mask).sum().backward()
    whole = torch.cat([found[name] for name in gradients.sizes], dim=1)
    alone = torch.stack([gradient(model, nll(model, row), list(gradients.sizes)) for row in batch])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    accumulated = torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None])
    torch.testing.assert_close(whole.sum(dim=0), accumulated, rtol=1e-4, atol=1e-5)
    model(input_ids=input_ids, attention_mask=mask)
    assert not any(linear._forward_hooks for linear in gradients.factors.values())


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_query_gradients_are_means_over_target_tokens(model: PeftModel, rows: list[Encoded], num_ranks: int) -> None:
    queries, groups = rows[:5], (0, 0, 1, 1, 1)
    scorer = InRunScorer(model, groups=groups, adam=ADAM)
    total = torch.zeros_like(scorer.plain)
    for rank in range(num_ranks):
        batches = [tuple(range(rank, 5, num_ranks)), (-1,)]  # the second is there for the other ranks' sake
        scorer.take_query_gradients(model, queries, batches)
        total += scorer.plain
    for group in (0, 1):
        members = [query for query, g in zip(queries, groups, strict=True) if g == group]
        loss = sum((nll(model, query) for query in members), torch.zeros(())) / sum(map(num_targets, members))
        expected = gradient(model, loss, list(scorer.gradients.sizes))
        torch.testing.assert_close(total[group], expected, rtol=1e-4, atol=1e-6)


def test_scores_sum_what_every_step_did_along_the_query(model: PeftModel, rows: list[Encoded]) -> None:
    """Five AdamW steps, refreshed at each: the product's pieces against the definition, one backward per row."""
    queries, training, names = rows[:2], rows[2:10], list(RowGradients(model).sizes)
    scorer = InRunScorer(model, groups=(0, 1), adam=ADAM)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=RATE, weight_decay=0.0)
    scores, expected = torch.zeros(2, len(training), 2), torch.zeros(2, len(training), 2)
    for number in range(1, 6):
        batch = [(number * 3 + j) % len(training) for j in range(3)]
        total = sum(num_targets(training[row]) for row in batch)
        g_queries = torch.stack([gradient(model, nll(model, q) / num_targets(q), names) for q in queries])
        g_rows = torch.stack([gradient(model, nll(model, training[row]) / total, names) for row in batch])
        scorer.take_query_gradients(model, queries, [(1, 0)])
        optimizer.zero_grad()
        with scorer.observing():
            input_ids, labels, mask = pad_batch([training[row] for row in batch])
            (target_losses(model, input_ids, labels, mask=mask).sum() / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), MAX_NORM)
        optimizer.step()
        clip = min(1.0, MAX_NORM / (norm.item() + 1e-6))
        second = torch.cat([optimizer.state[trained(model)[name]]["exp_avg_sq"].flatten() for name in names])
        scorer.precondition(second, number)
        scores[:, batch] += scorer.scores(RATE * clip)
        divided = g_queries / ((second / (1 - ADAM.beta2**number)).sqrt() + ADAM.eps)
        expected[0, batch] += RATE * clip * g_rows @ g_queries.T
        expected[1, batch] += RATE * clip * g_rows @ divided.T
    assert expected.abs().min() > 0
    torch.testing.assert_close(scores[0], expected[0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(scores[1], expected[1], rtol=1e-3, atol=1e-4)


def test_a_model_without_an_adapter_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA module carries the adapter 'default'"):
        RowGradients(AutoModelForCausalLM.from_pretrained(tiny_base))


def test_a_block_inside_a_block_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 5.0])
    monkeypatch.setattr("attribution.influence.in_run.time.perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    with watch, watch:
        pass
    assert watch.take() == 4.0
    assert watch.take() == 0.0
