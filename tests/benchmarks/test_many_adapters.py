"""The programs on many adapters at toy sizes: that they judge, count and time what they say."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from benchmarks import adapter_cliff, many_adapters_cpu, soak, soak_oracle
from benchmarks.adapter_traffic import draw, write_adapters
from benchmarks.gpu_check import save_model
from kernels import reference as oracle
from serve_apps.engine.config import AdapterRef, EngineConfig, SamplingParams
from serve_apps.engine.engine import Engine

NUM_ADAPTERS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[AdapterRef]]:
    """The soak's model and a few adapters of its kinds."""
    folder = tmp_path_factory.mktemp("world")
    save_model(LlamaConfig(**soak.CONFIG), folder / "base", dtype=torch.float32)
    refs = write_adapters(
        folder / "adapters", LlamaConfig(**soak.CONFIG), NUM_ADAPTERS, ranks=(8, 5), modules=soak.MODULES[1], scale=0.4
    )
    return folder / "base", refs


def engine(base: Path, **settings: int | bool) -> Engine:
    limits = {"num_threads": 1, "max_num_seqs": 4, "max_model_len": 96, "kv_block_size": 4, **settings}
    return Engine(EngineConfig(str(base), **limits))  # type: ignore[arg-type]


def test_a_soak_finds_every_token_and_a_wrong_reference(world: tuple[Path, list[AdapterRef]]) -> None:
    """Greedy and drawn, two contents under one name, stop strings; then each kind of error that it must find."""
    base, refs = world
    prompts = soak.make_prompts()[:3]
    built = engine(base, num_kv_blocks=40, max_step_tokens=12, adapter_cache_bytes=40_000)
    known = soak_oracle.references(base, [Path(ref.path) for ref in refs], prompts, built.tokenizer)
    assert len(known) == (NUM_ADAPTERS + 1) * 3 * 3 and len({item.token_ids for item in known.values()}) > 24
    driver = soak.Soak(built, refs, prompts, known, num_requests=240, seed=1, num_names=2)
    driver.num_requests = 120
    driver.run()
    while not driver.tally.events["names given to other weights"]:
        driver.disturb()
    driver.num_requests = 240
    tally = driver.run()
    assert not tally.mismatches and tally.num_tokens > 500
    for event in ("requests drawn from a seed", "pairs of choices", "ends at a stop string or token"):
        assert tally.events[event] > 5, event
    for wrong in (
        {"token_ids": (0,) * soak_oracle.MAX_TOKENS},
        {"texts": tuple(f"{count} other words" for count in range(soak_oracle.MAX_TOKENS + 1))},
    ):
        lies = {key: replace(item, **wrong) for key, item in known.items()}
        tally = soak.Soak(built, refs, prompts, lies, num_requests=20, seed=1).run()
        assert len(tally.mismatches) > 10


def test_a_near_border_excuses_its_own_tokens_and_no_other() -> None:
    tally = soak.Tally()
    reference = soak_oracle.Reference(
        (5, 6, 7), (frozenset(), frozenset({9}), frozenset()), ("", "five", "five six", "five six seven")
    )
    running = soak.Running((-1, 0, -1), SamplingParams(max_tokens=3), None)

    def judge(name: str, token_ids: list[int], text: str, reason: str = "length", **limits: Any) -> None:
        sampling = replace(running.sampling, **limits)
        tally.judge(name, replace(running, sampling=sampling, token_ids=token_ids, text=text), reference, reason)

    judge("near", [5, 9, 9], "")
    judge("whole", [5, 6, 7], "five six seven")
    judge("stopped", [5, 6], "fiv", "stop", stop=("e six", "seven"))
    judge("stop token", [5, 6], "five", "stop", stop_token_ids=(6,))
    judge("aborted", [5], "five", "abort")
    assert tally.num_ties == 1 and tally.num_tokens == 9 and not tally.mismatches
    judge("not the near one", [5, 8, 9], "")
    judge("behind the near one", [5, 6, 9], "")
    judge("too short", [5, 6], "five six")
    judge("never stopped", [5, 6, 7], "five six seven", stop=("six",))
    judge("other text", [5, 6, 7], "five six")
    names = ["not the near one", "behind the near one", "too short", "never stopped", "other text"]
    assert [line.split(":")[0] for line in tally.mismatches] == names


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    knobs=st.sampled_from(soak_oracle.KNOBS),
    is_tied=st.booleans(),
    point=st.floats(0, 1 - 1e-9),
)
def test_every_token_that_shaken_logits_give_is_held_possible(
    seed: int, knobs: dict[str, Any], is_tied: bool, point: float
) -> None:
    """The rule for borders against what it speaks of: logits shaken by half a tie each, drawn by the plain oracle.

    Besides tokens too rare to be told from their neighbours it holds three at most: one drawn, one on each side.
    """
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal(60) * 3
    logits = np.round(logits, 1) if is_tied else logits
    sampling = SamplingParams(**{**knobs, "repetition_penalty": 1.0})
    held = soak_oracle.possible(logits, sampling, point)
    cuts = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    for _ in range(8):
        shaken = logits + generator.uniform(-soak_oracle.TIE / 2, soak_oracle.TIE / 2, logits.shape)
        assert oracle.sample(torch.from_numpy(shaken), point=point, **cuts)[0] in held
    shares = oracle.top_k_top_p(logits, **cuts) if sampling.temperature else [0.0] * 60
    if not is_tied:
        assert sum(shares[token] > 1e-3 for token in held) <= 3


def test_tiered_traffic_is_timed_and_counted(
    world: tuple[Path, list[AdapterRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_adapters_cpu, "NUM_IN", 6)
    monkeypatch.setattr(many_adapters_cpu, "NUM_OUT", 3)
    base, refs = world
    built = engine(base, adapter_cache_bytes=40_000)
    run = many_adapters_cpu.measure(built, refs, [0, 1, 2], [0, 1, 2, 0, 1])
    assert len(run.first_token_s) == 5 and 0 < max(run.first_token_s) <= run.seconds
    assert run.counts["adapter_hits"] + run.counts["adapter_loads"] == 5
    assert run.counts["adapter_evictions"] > 0
    assert all(seconds > 0 for seconds in many_adapters_cpu.load_times(built, refs, [0, 1]))


def test_turns_change_their_order_and_the_median_pair_is_judged() -> None:
    """A machine that grows slower with every turn, and one pair that something disturbed."""
    order: list[str] = []

    def measured(name: str, seconds: float) -> Callable[[list[int]], many_adapters_cpu.Run]:
        def measure(asked: list[int]) -> many_adapters_cpu.Run:
            order.append(f"{name}{asked[0]}")
            is_disturbed = order[-1] == "tiers1"
            counts = {f"adapter_{each}": 1.0 for each in ("hits", "loads", "reads", "evictions")}
            return many_adapters_cpu.Run(seconds * (1 + asked[0]) * (10 if is_disturbed else 1), [1.0], counts)

        return measure

    tiered, resident = many_adapters_cpu.take_turns((measured("tiers", 1.0), measured("whole", 0.95)), [[0], [1], [2]])
    assert order == ["whole0", "tiers0", "tiers1", "whole1", "whole2", "tiers2"]
    found = {figure.name: figure for figure in many_adapters_cpu.figures(tiered, resident, (1.0, 1.0), 1)}
    judged = found["200 of 2,000 / all resident, median of pairs"]
    assert judged.value == pytest.approx(0.95) and judged.is_good
    assert found["200 of 2,000 / all resident, least pair"].value == pytest.approx(0.095)


def test_the_cliff_serves_everybody(world: tuple[Path, list[AdapterRef]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_cliff, "NUM_OUT", 3)
    base, refs = world
    built = engine(base, adapter_cache_bytes=40_000)
    latency = adapter_cliff.measure(built, refs, gap_s=0.001, count=12)
    assert len(latency.first_token_s) == 12 and 0 < latency.miss_rate <= 1 and latency.median > 0
    found = {8: latency, 16: latency, 64: latency}
    figures = adapter_cliff.figures(found, gap_s=0.001, load_s=0.001, adapter_bytes=1)
    assert [figure.is_good for figure in figures if figure.name.endswith("in loads")] == [True]


def test_popularity_laws() -> None:
    assert set(draw("one", 9, 50, seed=0)) == {0}
    assert draw("distinct", 4, 6, seed=0) == [0, 1, 2, 3, 0, 1]
    zipf = Counter(draw("zipf", 100, 20_000, seed=0)).most_common()
    # Shares 1/H, 1/2H, ... with H the hundredth harmonic number, 5.187.
    assert zipf[0][1] / 20_000 == pytest.approx(1 / 5.187, rel=0.05)
    assert zipf[1][1] / zipf[0][1] == pytest.approx(0.5, rel=0.1)
    assert max(Counter(draw("uniform", 10, 10_000, seed=0)).values()) < 1200
