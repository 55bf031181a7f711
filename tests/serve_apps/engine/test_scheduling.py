"""Chunks, pre-emption, neighbours and their failures change no token, and whatever ends gives back all it held."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_apps.engine.config import SamplingParams
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import (
    CorruptAdapter,
    EngineError,
    InvalidRequest,
    PromptTooLong,
    UnknownAdapter,
)
from tests.serve_apps.engine.engine_cases import Oracle, engine_for, prompts, ref, request, run, text, tokens
from tests.tiny_model import QUESTIONS


def test_knows_its_answers(tiny_base: Path) -> None:
    """Text, end token and finish reason of what the tiny base was taught."""
    engine = engine_for(tiny_base)
    asked = [request(f"r{i}", prompt, ignore_eos=False, max_tokens=40) for i, prompt in enumerate(prompts(engine, 12))]
    outputs = run(engine, asked)
    for index, (_, answer) in enumerate(QUESTIONS):
        assert text(outputs[f"r{index}"]) == answer
        last = outputs[f"r{index}"][-1]
        assert last.finish_reason == "stop" and last.new_token_ids == (engine.tokenizer.eos_token_id,)
        assert last.num_output_tokens == len(tokens(outputs[f"r{index}"]))
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"]


@pytest.mark.parametrize("max_step_tokens", [2, 5, 512])
def test_chunked_prefill_equals_whole(max_step_tokens: int, tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    adapter = ref(strong_adapters["strong-r8-all"])
    asked = prompts(engine_for(tiny_base), 2)
    whole = engine_for(tiny_base)
    chunked = engine_for(tiny_base, max_step_tokens=max_step_tokens, max_num_seqs=2)
    requests = [request("base", asked[0]), request("adapted", asked[1], adapter)]
    expected, actual = run(whole, requests), run(chunked, requests)
    for name in ("base", "adapted"):
        assert tokens(actual[name]) == tokens(expected[name])


def test_preemption_gives_the_same_tokens(tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle) -> None:
    """Blocks for about two of five sequences: the late ones are thrown out again and again, and lose nothing."""
    folders = [None, *strong_adapters.values()]
    roomy, tight = engine_for(tiny_base), engine_for(tiny_base, num_kv_blocks=24)
    asked = prompts(roomy, 5)
    requests = [
        request(f"r{i}", asked[i], None if folder is None else ref(folder), max_tokens=24, temperature=temperature)
        for i, (folder, temperature) in enumerate(zip(folders, (0.0, 0.8, 0.0, 1.2, 0.0), strict=True))
    ]
    expected, actual = run(roomy, requests), run(tight, requests)
    assert roomy.stats()["num_preemptions"] == 0
    assert int(str(tight.stats()["num_preemptions"])) > 0
    for name in expected:
        assert tokens(actual[name]) == tokens(expected[name])
        assert text(actual[name]) == text(expected[name])
    assert tight.stats()["kv_blocks_free"] == 24


def test_the_same_arrivals_give_the_same_run(tiny_base: Path) -> None:
    """Outputs of every step, sampling without a seed included."""

    def trace() -> list[Any]:
        engine = engine_for(tiny_base, num_kv_blocks=20, max_step_tokens=16)
        for index, prompt in enumerate(prompts(engine, 6)):
            engine.add(request(f"r{index}", prompt, temperature=float(index % 2)))
        steps = []
        while engine.has_unfinished:
            steps.append(engine.step())
        return steps

    assert trace() == trace()


def test_abort_frees_everything_at_any_moment(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    adapter = ref(strong_adapters["strong-r8-all"])
    for steps_before in range(6):
        engine = engine_for(tiny_base, max_step_tokens=8, max_num_seqs=2)
        for index, prompt in enumerate(prompts(engine, 4)):
            engine.add(request(f"r{index}", prompt, adapter))
        for _ in range(steps_before):
            engine.step()
        for index in range(4):
            last = engine.abort(f"r{index}")
            assert last is not None and last.finished and last.finish_reason == "abort"
            engine.check_integrity()
        assert engine.abort("r0") is None
        assert not engine.has_unfinished and engine.step() == []
        stats = engine.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks"] and stats["adapters_leased"] == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 4), st.integers(1, 20), st.integers(1, 12)),
            st.tuples(st.just("abort"), st.integers(0, 30)),
            st.tuples(st.just("step"), st.integers(1, 4)),
            st.tuples(st.just("unload"), st.integers(1, 4)),
        ),
        max_size=40,
    ),
    num_kv_blocks=st.integers(9, 40),
    cache_adapters=st.integers(1, 4),
)
def test_random_life(
    events: list[tuple[Any, ...]],
    num_kv_blocks: int,
    cache_adapters: int,
    tiny_base: Path,
    strong_adapters: dict[str, Path],
) -> None:
    """Adds, aborts, steps and unloads in any order: accounts hold after each, and everything ends."""
    folders = list(strong_adapters.values())
    engine = _ENGINES.setdefault(
        (num_kv_blocks, cache_adapters),
        engine_for(
            tiny_base,
            num_kv_blocks=num_kv_blocks,
            max_num_seqs=3,
            max_step_tokens=7,
            adapter_cache_bytes=cache_adapters * _largest(tiny_base, folders),
        ),
    )
    added = 0
    finished: set[str] = set()
    for event in events:
        if event[0] == "add":
            adapter = None if event[1] == 0 else ref(folders[event[1] - 1])
            engine.add(request(f"r{added}", range(3, 3 + event[2]), adapter, max_tokens=event[3]))
            added += 1
        elif event[0] == "abort":
            output = engine.abort(f"r{event[1]}")
            finished |= {output.request_id} if output else set()
        elif event[0] == "unload":
            try:
                engine.unload(ref(folders[event[1] - 1]).digest)
            except EngineError as error:
                assert "running requests" in str(error)
        else:
            for _ in range(event[1]):
                finished |= {output.request_id for output in engine.step() if output.finished}
        engine.check_integrity()
    finished |= {name for name, outputs in run(engine).items() if outputs[-1].finish_reason == "length"}
    assert finished == {f"r{index}" for index in range(added)}


_ENGINES: dict[tuple[int, int], Engine] = {}


def _largest(base: Path, folders: list[Path]) -> int:
    engine = engine_for(base)
    sizes = []
    for folder in folders:
        engine.load(ref(folder))
        sizes.append(int(str(engine.stats()["adapter_bytes"])) - sum(sizes))
    return max(sizes)


def test_a_full_adapter_cache_lets_others_run(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    """Room for one adapter: the second one's request waits, the base request behind it does not, all finish."""
    folders = [strong_adapters["strong-r8-all"], strong_adapters["strong-r2-mlp"]]
    engine = engine_for(tiny_base, adapter_cache_bytes=_largest(tiny_base, folders))
    engine.load(ref(folders[0]))
    asked = prompts(engine, 3)
    engine.add(request("first", asked[0], ref(folders[0]), max_tokens=30))
    engine.step()
    engine.add(request("waits", asked[1], ref(folders[1]), max_tokens=2))
    engine.add(request("base", asked[2], max_tokens=2))
    outputs = run(engine)
    order = [name for name, rows in sorted(outputs.items(), key=lambda item: len(item[1])) if rows[-1].finished]
    assert set(order) == {"first", "waits", "base"}
    assert engine.stats()["adapter_evictions"] == 1
    assert engine.stats()["adapters_resident"] == [ref(folders[1]).digest]


def test_a_passed_over_request_is_not_starved(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    """Traffic that never lets the only place in the cache go yields after a bounded number of admissions."""
    folders = [strong_adapters["strong-r8-all"], strong_adapters["strong-r2-mlp"]]
    engine = engine_for(tiny_base, adapter_cache_bytes=_largest(tiny_base, folders), max_num_seqs=2)
    engine.load(ref(folders[0]))
    engine.add(request("hot", [5, 6], ref(folders[0]), max_tokens=4))
    engine.step()
    engine.add(request("cold", [5, 6], ref(folders[1]), max_tokens=1))
    for index in range(400):
        engine.add(request(f"hot{index}", [5, 6], ref(folders[0]), max_tokens=3))
        if any(output.request_id == "cold" for output in engine.step()):
            break
    else:
        pytest.fail("the cold request never ran")
    run(engine)


def test_a_row_that_is_not_finite_fails_alone(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(tiny_base)
    asked = prompts(engine, 2)
    expected = run(engine, [request("sound", asked[0])])
    forward = engine._runner.model.forward
    monkeypatch.setattr(
        engine._runner.model,
        "forward",
        lambda batch, kv: forward(batch, kv).masked_fill(
            (batch.token_ids[batch.logit_rows] == 7)[:, None], float("nan")
        ),
    )
    outputs = run(engine, [request("sound", asked[0]), request("bad", [*asked[1][:-1], 7])])
    assert outputs["bad"][-1].finish_reason == "error" and "not finite" in str(outputs["bad"][-1].error)
    assert tokens(outputs["sound"]) == tokens(expected["sound"])


def test_a_step_that_raises_fails_only_the_request_at_fault(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is replayed one by one; those that do not raise alone lose nothing."""
    engine = engine_for(tiny_base)
    asked = prompts(engine, 3)
    expected = run(engine, [request("a", asked[0]), request("b", asked[1])])
    forward = engine._runner.model.forward

    def failing(batch: Any, kv: Any) -> torch.Tensor:
        if (batch.token_ids == 440).any():
            raise torch.OutOfMemoryError("no room for this one")
        return forward(batch, kv)

    monkeypatch.setattr(engine._runner.model, "forward", failing)
    outputs = run(engine, [request("a", asked[0]), request("bad", [*asked[2], 440]), request("b", asked[1])])
    assert outputs["bad"][-1].finish_reason == "error"
    assert outputs["bad"][-1].error == "OutOfMemoryError: no room for this one"
    for name in ("a", "b"):
        assert tokens(outputs[name]) == tokens(expected[name])


def test_an_adapter_that_vanishes_fails_only_its_request(
    tiny_base: Path, strong_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Evicted while it waited, and its folder is gone when its turn comes."""
    gone = tmp_path / "gone"
    gone.symlink_to(strong_adapters["strong-r2-mlp"])
    engine = engine_for(tiny_base, max_num_seqs=1)
    asked = prompts(engine, 3)
    engine.add(request("first", asked[0]))
    engine.add(request("fails", asked[1], ref(gone)))
    engine.add(request("after", asked[2]))
    engine.unload(ref(gone).digest)
    gone.unlink()
    outputs = run(engine)
    assert outputs["fails"][-1].finish_reason == "error" and "adapter_config.json" in str(outputs["fails"][-1].error)
    assert outputs["first"][-1].finish_reason == outputs["after"][-1].finish_reason == "length"


def test_add_refuses(tiny_base: Path, strong_adapters: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_for(tiny_base, max_model_len=16)
    with pytest.raises(PromptTooLong, match="16 tokens and max_model_len is 16"):
        engine.add(request("r", [5] * 16))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.add(request("r", []))
    with pytest.raises(InvalidRequest, match=r"outside 0\.\.447"):
        engine.add(request("r", [5, 448]))
    with pytest.raises(UnknownAdapter, match=r"adapter_config\.json"):
        engine.add(request("r", [5], ref(tmp_path / "nowhere")))
    broken = tmp_path / "broken"
    broken.mkdir()
    source = strong_adapters["strong-r2-mlp"]
    (broken / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes()[:-7])
    with pytest.raises(CorruptAdapter, match=r"not a whole safetensors file.* it ends inside tensor .*lora_B.weight"):
        engine.add(request("r", [5], ref(broken)))
    assert not engine.has_unfinished
    engine.add(request("r", [5]))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(request("r", [5]))
    run(engine)


def test_output_is_cut_at_max_model_len(tiny_base: Path) -> None:
    engine = engine_for(tiny_base, max_model_len=16)
    last = run(engine, [request("r", [5] * 12, max_tokens=100)])["r"][-1]
    assert last.finish_reason == "length" and last.num_output_tokens == 4


def test_a_cache_of_few_blocks_bounds_the_length(tiny_base: Path) -> None:
    """One sequence as long as the whole cache still runs to its end."""
    engine = engine_for(tiny_base, num_kv_blocks=3)
    assert engine.max_model_len == 12
    assert run(engine, [request("r", [5] * 11), request("s", [6] * 11)])["s"][-1].num_output_tokens == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int8"),
        ("max_num_seqs", 0),
        ("num_kv_blocks", 0),
        ("device", "tpu"),
        ("device", "cuda:1"),
        ("max_step_tokens", 1),
    ],
)
def test_settings_are_refused_by_name(field: str, value: Any, tiny_base: Path) -> None:
    with pytest.raises(InvalidRequest, match=field):
        engine_for(tiny_base, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("stop", ("",)),
        ("logprobs", 21),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 1e300),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((3, 1e39),)),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("min_tokens", 129),
        ("stop_token_ids", (-1,)),
    ],
)
def test_sampling_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field):
        replace(SamplingParams(), **{field: value})


def test_an_output_names_the_adapter_that_was_loaded_not_the_one_asked_for(
    tiny_base: Path, strong_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(tiny_base)
    adapter = ref(strong_adapters["strong-r2-mlp"])
    engine.load(adapter)
    engine.pool._resident[adapter.digest] = replace(engine.pool._resident[adapter.digest], digest="sha256:other")
    monkeypatch.setattr(engine.pool, "end_lease", lambda digest: None)
    engine.add(request("r", prompts(engine, 1)[0], adapter))
    (output,) = engine.step()
    assert output.new_token_ids and output.adapter_digest == "sha256:other"


def test_a_request_that_never_ran_names_no_adapter(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    engine = engine_for(tiny_base)
    engine.add(request("r", prompts(engine, 1)[0], ref(strong_adapters["strong-r2-mlp"])))
    output = engine.abort("r")
    assert output is not None and output.adapter_digest is None
