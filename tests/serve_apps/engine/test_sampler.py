"""Choosing tokens: the distribution against the oracle, seeds that hold in any company, log-probabilities."""

from pathlib import Path

import pytest
import torch

from kernels import reference
from serve_apps.engine.config import SamplingParams
from serve_apps.engine.sampler import distribution, draw
from tests.serve_apps.engine.engine_cases import Oracle, engine_for, prompts, ref, request, run, text, tokens


@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
@pytest.mark.parametrize("temperature", [1e-4, 0.7, 3.0])
def test_distribution(top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(17, generator=torch.Generator().manual_seed(1)) * 3
    logits[5] = logits[9]  # a tie
    probabilities, token_ids = distribution(logits, SamplingParams(top_k=top_k, top_p=top_p, temperature=temperature))
    actual = torch.zeros(17, dtype=torch.float64)
    ids = torch.arange(17) if token_ids is None else token_ids[: len(probabilities)]
    actual[ids] = probabilities / probabilities.sum()
    expected = reference.top_k_top_p(logits, top_k=top_k, top_p=top_p, temperature=temperature)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    params = SamplingParams(temperature=1.0, top_k=3)
    generator = torch.Generator().manual_seed(3)
    counts = torch.bincount(torch.tensor([draw(logits, params, generator) for _ in range(4000)]), minlength=4)
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0, -torch.inf]), 0) * 4000
    assert counts[3] == 0
    # Chi-square with 2 degrees of freedom: 13.8 is exceeded once in a thousand, and the seed is fixed.
    assert float((((counts - expected)[:3]) ** 2 / expected[:3]).sum()) < 13.8


def test_a_seed_gives_the_same_tokens_in_any_company(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    adapter = ref(strong_adapters["strong-r8-all"])
    engine = engine_for(tiny_base)
    asked = prompts(engine, 6)
    mine = request("mine", asked[0], adapter, temperature=1.5, seed=-7, top_p=0.95)
    alone = run(engine, [mine])
    others = [request(f"r{i}", asked[i], None if i % 2 else adapter, temperature=2.0) for i in range(1, 6)]
    crowded = run(engine_for(tiny_base, max_step_tokens=9), [*others[:2], mine, *others[2:]])
    assert tokens(crowded["mine"]) == tokens(alone["mine"])
    other_seed = run(engine, [request("mine", asked[0], adapter, temperature=1.5, seed=8, top_p=0.95)])
    assert tokens(other_seed["mine"]) != tokens(alone["mine"])


def test_top_k_one_is_greedy(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    outputs = run(engine, [request("greedy", prompt), request("hot", prompt, temperature=5.0, top_k=1)])
    assert tokens(outputs["hot"]) == tokens(outputs["greedy"])


def test_logprobs_are_the_models_own(tiny_base: Path, oracle: Oracle) -> None:
    """Of the chosen token and the best ones, whatever the temperature."""
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    outputs = run(engine, [request("r", prompt, temperature=2.0, logprobs=3, max_tokens=5), request("none", prompt)])
    produced = tokens(outputs["r"])
    expected = oracle.logits(prompt + produced)[len(prompt) - 1 : -1].log_softmax(-1)
    for step, output in enumerate(outputs["r"]):
        assert output.logprobs is not None
        (entry,) = output.logprobs
        assert entry.token_id == produced[step]
        assert abs(entry.logprob - float(expected[step, entry.token_id])) < 1e-4
        assert [logprob for _, logprob in entry.top] == pytest.approx(expected[step].topk(3).values.tolist(), abs=1e-4)
    assert outputs["none"][0].logprobs is None


def test_stop_string_ends_a_request(tiny_base: Path) -> None:
    """`What do bees make?` is answered `Bees make honey.`; the stop string lies across tokens."""
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 9)[8]
    last = run(engine, [request("r", prompt, stop=("ke ho",), max_tokens=30)])["r"]
    assert text(last) == "Bees ma"
    assert last[-1].finish_reason == "stop"
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"]
