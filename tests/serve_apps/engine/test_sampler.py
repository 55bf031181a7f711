"""Choosing tokens: the distribution against the oracle, seeds that hold in any company, log-probabilities."""

import math
from collections.abc import Sequence as Rows
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from serve_apps.engine import sampler
from serve_apps.engine.config import Request, SamplingParams
from serve_apps.engine.errors import InvalidRequest
from serve_apps.engine.sampler import NotFinite, draw, pick, sample, uniform
from serve_apps.engine.sequence import Choice, Sequence
from tests.serve_apps.engine.engine_cases import Oracle, engine_for, prompts, ref, request, run, text, tokens

CLOSE = 1e-5  # a point this near a border of the distribution may fall on either side of it


def drawn_shares(logits_V: Tensor, params: SamplingParams, *, num: int = 2000) -> list[float]:
    """The share of evenly spread points that each token gets."""
    points = [(index + 0.5) / num for index in range(num)]
    token_ids = draw(logits_V.expand(num, -1), [params] * num, points)
    return (torch.bincount(token_ids, minlength=len(logits_V)) / num).tolist()


def probabilities(logits: Any, params: SamplingParams) -> list[float]:
    return reference.top_k_top_p(
        logits, top_k=params.top_k, top_p=params.top_p, temperature=params.temperature, min_p=params.min_p
    )


def plain_draw(logits: Rows[float], params: SamplingParams, point: float) -> int | None:
    """The oracle's token; None where the point, or a cut, lies on a border that rounding may shift."""
    order = list(range(len(logits)))
    if params.top_k or params.top_p < 1:
        order.sort(key=lambda token: (-float(logits[token]), token))
    chosen = set()
    for shift in (-CLOSE, 0, CLOSE):
        cuts = replace(
            params,
            top_p=params.top_p if params.top_p == 1 else params.top_p * (1 + shift),
            min_p=min(1.0, params.min_p * (1 + shift)),
        )
        shares = probabilities(logits, cuts)
        chosen |= {reference.pick(shares, order, min(max(point + near, 0.0), 1.0)) for near in (-CLOSE, 0, CLOSE)}
    return chosen.pop() if len(chosen) == 1 else None


@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1e-4, 0.7, 3.0])
def test_every_token_gets_its_share(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    logits = torch.randn(17, generator=torch.Generator().manual_seed(1)) * 3
    logits[5] = logits[9]  # a tie
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    # Points are 1/2000 apart, so a share is off by no more than one point.
    assert drawn_shares(logits, params) == pytest.approx(probabilities(logits, params), abs=1 / 2000)


KNOBS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 4),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 299, 300, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(knobs=st.lists(KNOBS, min_size=1, max_size=6), seed=st.integers(0, 999), flat=st.booleans())
def test_a_mixed_batch_draws_what_the_oracle_draws(knobs: list[SamplingParams], seed: int, flat: bool) -> None:
    """300 tokens, more than the first candidates; flat and tied logits, so that cuts fall among the others too."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(knobs), 300, generator=generator) * (0.01 if flat else 3)
    logits = (logits * 8).round() / 8 if seed % 2 else logits
    points = [uniform(seed, row) for row in range(len(knobs))]
    token_ids = draw(logits, knobs, points).tolist()
    for row, params in enumerate(knobs):
        expected = plain_draw(logits[row].tolist(), params, points[row])
        assert expected is None or token_ids[row] == expected
        assert draw(logits[row : row + 1], [params], points[row : row + 1]).tolist() == [token_ids[row]]


def test_the_fused_draw_is_the_same_draw() -> None:
    """What CUDA calls, here in the interpreter, over the same parameters and points."""
    rows = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.5, 1.5)
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (0, 1.0, 0.1), (7, 1.0, 0.0), (0, 0.7, 0.0), (300, 0.9, 0.05))
    ]
    logits = torch.randn(len(rows), 200, generator=torch.Generator().manual_seed(3)).mul(2)
    points = [uniform(row, 0) for row in range(len(rows))]
    assert sampler.draw_fused(logits, rows, points).tolist() == draw(logits, rows, points).tolist()


def test_a_cut_beyond_the_candidates_is_made_over_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties at the border among others: which of them are kept depends on all of them."""
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", (2, 4))
    logits = torch.zeros(1, 50)
    logits[0, 30] = 1.0
    for params in (SamplingParams(temperature=1.0, top_k=3), SamplingParams(temperature=1.0, top_p=0.6)):
        for point in (0.0, 0.3, 0.6, 0.9, 0.999):
            assert draw(logits, [params], [point]).tolist() == [plain_draw(logits[0].tolist(), params, point)]


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 600), point=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
def test_a_token_of_no_weight_is_never_picked(width: int, point: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, width, generator=generator) * (torch.rand(1, width, generator=generator) < 0.1)
    weights[0, seed % width] = 1.0
    for at in (point, 0.0, 1 - 2**-53):
        index, place = pick(weights, torch.tensor([[at]], dtype=torch.float64))
        assert weights[0, int(index)] > 0
        assert 0 <= float(place) <= 1


def test_the_largest_logit_is_found_first_of_equals_in_any_width() -> None:
    for width in (1, 7, 256, 300, 1024, 151_936):
        logits = torch.randn(4, width, generator=torch.Generator().manual_seed(width)).mul(2).round()
        assert sampler._likeliest(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("width", [1000, 49_152])
def test_a_large_vocabulary_is_drawn_alike_alone_and_in_company(width: int) -> None:
    """Rows weighed together and apart, with every kind of cut beside them, and against the oracle."""
    knobs = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.4, 1.2)
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (0, 1.0, 0.05), (0, 0.9, 0.0), (width, 0.9, 0.0), (20, 0.8, 0.1))
    ]
    logits = torch.randn(len(knobs), width, generator=torch.Generator().manual_seed(5)) * 4
    for seed in range(3):
        points = [uniform(seed, row) for row in range(len(knobs))]
        together = draw(logits, knobs, points).tolist()
        for row, params in enumerate(knobs):
            assert draw(logits[row : row + 1], [params], points[row : row + 1]).tolist() == [together[row]]
            if width == 1000:
                assert plain_draw(logits[row].tolist(), params, points[row]) in (None, together[row])


def test_numbers_beyond_fp32_and_int32_mean_what_they_say() -> None:
    """A temperature that fp32 rounds to 0 is as good as greedy, a top_k beyond any vocabulary keeps everything."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(2)) * 3
    best = logits.argmax(-1).tolist()
    for choose in (draw, sampler.draw_fused):
        assert choose(logits, [SamplingParams(temperature=1e-60)] * 2, [0.0, 0.999]).tolist() == best
        everything = [SamplingParams(temperature=1.0, top_k=2**40 + 1), SamplingParams(temperature=1.0, top_k=50)]
        assert len(set(choose(logits[:1].expand(2, -1).contiguous(), everything, [0.9, 0.9]).tolist())) == 1
    greedy = SamplingParams()
    assert sampler.draw_fused(logits, [greedy, SamplingParams(temperature=1e-3)], [0.7, 0.7]).tolist() == best


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    params = [SamplingParams(temperature=1.0, top_k=3)] * 4000
    token_ids = draw(logits.expand(4000, -1), params, [uniform(3, position) for position in range(4000)])
    counts = torch.bincount(token_ids, minlength=4)
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0, -torch.inf]), 0) * 4000
    assert counts[3] == 0
    # Chi-square with 2 degrees of freedom: 13.8 is exceeded once in a thousand, and the seed is fixed.
    assert float((((counts - expected)[:3]) ** 2 / expected[:3]).sum()) < 13.8


def test_the_random_numbers_are_spread_evenly_along_positions_and_along_seeds() -> None:
    for numbers in (
        [uniform(7, position) for position in range(10_000)],
        [uniform(seed, 0) for seed in range(10_000)],
        [uniform(seed, 100 - seed) for seed in range(-5000, 5000)],
    ):
        assert min(numbers) >= 0 and max(numbers) < 1
        counts = torch.bincount((torch.tensor(numbers, dtype=torch.float64) * 16).long(), minlength=16)
        # Chi-square with 15 degrees of freedom: 37.7 is exceeded once in a thousand.
        assert float(((counts - 625.0) ** 2 / 625).sum()) < 37.7
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_a_seed_gives_the_same_tokens_in_any_company(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    adapter = ref(strong_adapters["strong-r8-all"])
    engine = engine_for(tiny_base)
    asked = prompts(engine, 6)
    knobs: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.1, "frequency_penalty": 0.2}
    mine = request("mine", asked[0], adapter, seed=-7, **knobs)
    alone = run(engine, [mine])
    others = [request(f"r{i}", asked[i], None if i % 2 else adapter, temperature=2.0, top_k=5 * i) for i in range(1, 6)]
    for limits in ({"max_step_tokens": 9}, {"num_kv_blocks": 20}):  # the second pre-empts
        crowded = run(engine_for(tiny_base, **limits), [*others[:2], mine, *others[2:]])
        assert tokens(crowded["mine"]) == tokens(alone["mine"])
    other_seed = run(engine, [request("mine", asked[0], adapter, seed=8, **knobs)])
    assert tokens(other_seed["mine"]) != tokens(alone["mine"])


def test_top_k_one_is_greedy(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    outputs = run(engine, [request("greedy", prompt), request("hot", prompt, temperature=5.0, top_k=1)])
    assert tokens(outputs["hot"]) == tokens(outputs["greedy"])


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    """A sequence that has chosen `output`; 0 is the model's end token."""
    made = Sequence(
        Request("r", tuple(prompt), SamplingParams(**sampling)),
        arrival=3,
        max_new_tokens=100,
        tokenizer=_NoText(),
        eos_token_ids=frozenset({0}),
    )
    for token_id in output:
        made.append(token_id)
    return made


class _NoText:
    def decode(self, token_ids: list[int], **_: Any) -> str:
        return ""


TOKENS = st.lists(st.integers(1, 19), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            TOKENS,
            st.lists(st.integers(1, 19), max_size=12),
            st.fixed_dictionaries(
                {
                    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
                    "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
                    "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
                    "logit_bias": st.sampled_from([(), ((3, 5.0), (19, -100.0))]),
                    "min_tokens": st.sampled_from([0, 0, 4, 50]),
                    "stop_token_ids": st.sampled_from([(), (18,)]),
                    "temperature": st.sampled_from([0.0, 0.0, 0.8]),
                    "top_k": st.sampled_from([0, 4]),
                }
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_edits_of_a_mixed_batch_equal_the_oracle(rows: list[Any], seed: int) -> None:
    logits = torch.randn(len(rows), 20, generator=torch.Generator().manual_seed(seed)) * 3
    made = []
    for prompt, output, knobs in rows:
        ends = {0, *knobs["stop_token_ids"]}
        made.append(sequence(prompt, [token for token in output if token not in ends], **knobs, logprobs=2))
    choices = sample(logits.clone(), made)
    for row, (prompt, _, knobs) in enumerate(rows):
        choice, output = choices[row], made[row].token_ids[len(prompt) :]
        assert isinstance(choice, Choice)
        expected = reference.edited_logits(
            logits[row],
            prompt=prompt,
            output=output,
            repetition=knobs["repetition_penalty"],
            presence=knobs["presence_penalty"],
            frequency=knobs["frequency_penalty"],
            bias=knobs["logit_bias"],
            forbidden=[0, *knobs["stop_token_ids"]] if len(output) < knobs["min_tokens"] else (),
        )
        if knobs["temperature"]:
            wanted = plain_draw(expected, made[row].request.sampling, uniform(3, len(output)))
            assert wanted is None or choice.token_id == wanted
        else:
            assert expected[choice.token_id] >= max(expected) - 1e-5
        assert choice.logprob is not None
        own = torch.log_softmax(logits[row], -1)
        assert choice.logprob.logprob == pytest.approx(float(own[choice.token_id]), abs=1e-5)
        assert choice.logprob.top[0][1] == pytest.approx(float(own.max()), abs=1e-5)


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.randn(4, 20)
    logits[1, 3], logits[2, 0] = math.nan, math.inf
    hot: dict[str, Any] = {"temperature": 1.0, "presence_penalty": 1.0}
    made = [sequence([1], [2], **knobs) for knobs in (hot, hot, {}, {})]
    choices = sample(logits, made)
    assert [isinstance(choice, NotFinite) for choice in choices] == [False, True, True, False]


def test_greedy_rows_are_never_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("greedy rows need neither order nor distribution")

    for name in ("draw", "_ordered", "pick", "_weigh"):
        monkeypatch.setattr(sampler, name, forbidden)
    logits = torch.randn(3, 20)
    choices = sample(logits.clone(), [sequence([1], []) for _ in range(3)])
    assert [choice.token_id for choice in choices if isinstance(choice, Choice)] == logits.argmax(-1).tolist()


def test_penalties_in_the_engine_equal_the_oracle_alone(tiny_base: Path, oracle: Oracle) -> None:
    """Greedy, in company and pre-empted: each token is the best of the oracle's edited logits."""
    engine = engine_for(tiny_base, num_kv_blocks=20)
    asked = prompts(engine, 4)
    knobs = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": ((7, 2.0),)}
    outputs = run(engine, [request(f"r{i}", asked[i], **(knobs if i % 2 else {})) for i in range(4)])
    assert engine.stats()["num_preemptions"]
    for index in (1, 3):
        prompt, produced = asked[index], tokens(outputs[f"r{index}"])
        logits = oracle.logits(prompt + produced)[len(prompt) - 1 : -1]
        for step, token in enumerate(produced):
            edited = reference.edited_logits(
                logits[step],
                prompt=prompt,
                output=produced[:step],
                repetition=1.4,
                presence=0.5,
                frequency=0.3,
                bias=((7, 2.0),),
            )
            assert edited[token] > max(edited) - 1e-3, step


def test_repetition_penalty_is_transformers_own() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(5))
    met = [3, 3, 7, 19]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([met]), logits.clone())
    ours = reference.edited_logits(logits[0], prompt=met[:2], output=met[2:], repetition=1.7)
    assert ours == pytest.approx(theirs[0].tolist(), abs=1e-6)


def test_logprobs_are_the_models_own(tiny_base: Path, oracle: Oracle) -> None:
    """Of the chosen token and the best ones, whatever the temperature and the penalties."""
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    knobs: dict[str, Any] = {"temperature": 2.0, "repetition_penalty": 1.2, "logit_bias": ((5, 3.0),)}
    outputs = run(engine, [request("r", prompt, logprobs=3, max_tokens=5, **knobs), request("none", prompt)])
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


def test_nothing_ends_an_answer_before_min_tokens(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 9)[8]
    free = run(engine, [request("r", prompt, ignore_eos=False, max_tokens=30)])["r"]
    assert text(free) == "Bees make honey." and free[-1].finish_reason == "stop"
    num = free[-1].num_output_tokens
    ends = (engine.tokenizer.eos_token_id, *engine.spec.eos_token_ids)
    later = run(engine, [request("r", prompt, ignore_eos=False, max_tokens=60, min_tokens=num + 6)])["r"]
    assert later[-1].num_output_tokens >= num + 6
    assert tokens(later)[: num - 1] == tokens(free)[:-1]
    assert not set(tokens(later)[: num + 6]) & set(ends)
    stopped = run(engine, [request("r", prompt, stop=("ke ho",), min_tokens=num + 2, max_tokens=num + 2)])["r"]
    assert text(stopped).startswith("Bees make honey.") and stopped[-1].finish_reason == "length"


def test_a_stop_token_ends_a_request_even_where_the_models_own_is_ignored(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 9)[8]
    free = tokens(run(engine, [request("r", prompt, max_tokens=12)])["r"])
    last = free[4]
    cut = run(engine, [request("r", prompt, max_tokens=12, stop_token_ids=(last,))])["r"]
    assert tokens(cut) == free[: free.index(last) + 1]
    assert cut[-1].finish_reason == "stop"
    assert text(cut) == engine.tokenizer.decode(free[: free.index(last)])


def test_ids_outside_the_vocabulary_are_refused_by_name(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    for name, value in (("logit_bias", ((512, 1.0),)), ("stop_token_ids", (999,))):
        with pytest.raises(InvalidRequest, match=rf"{name}.*outside 0\.\.{engine.spec.vocab_size - 1}"):
            engine.add(request("r", prompts(engine, 1)[0], **{name: value}))
    assert not engine.has_unfinished


def test_the_slow_oracle_agrees_with_itself() -> None:
    """`pick` takes each token for exactly its share of the points."""
    shares = [0.5, 0.0, 0.25, 0.25]
    picked = [reference.pick(shares, [2, 0, 1, 3], index / 8) for index in range(8)]
    assert picked == [2, 2, 0, 0, 0, 0, 3, 3]
    assert reference.pick(shares, [0, 1, 2, 3], 1.0) == 0
