"""The programs on many adapters at toy sizes: that they judge, count and time what they say."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import adapter_cliff, many_adapters_cpu, soak
from benchmarks.adapter_traffic import draw, write_adapters
from benchmarks.gpu_check import save_model
from serve_apps.engine.config import AdapterRef, EngineConfig
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
    base, refs = world
    prompts = soak.make_prompts()[:4]
    known = soak.references(base, refs, prompts)
    assert len(known) == (NUM_ADAPTERS + 1) * 4 and len({item.token_ids for item in known.values()}) > 12
    small = {"num_kv_blocks": 40, "max_step_tokens": 12, "adapter_cache_bytes": 40_000}
    tally = soak.Soak(engine(base, **small), refs, prompts, known, num_requests=150, seed=1).run()
    assert not tally.mismatches and tally.num_tokens > 500
    wrong = {key: soak.Reference((0, *item.token_ids[1:]), item.gaps) for key, item in known.items()}
    tally = soak.Soak(engine(base, **small), refs, prompts, wrong, num_requests=20, seed=1).run()
    assert len(tally.mismatches) > 10


def test_a_tie_of_the_reference_explains_a_difference_and_no_other_does() -> None:
    tally = soak.Tally()
    reference = soak.Reference((5, 6, 7), (1.0, 0.5e-4, 1.0))
    tally.judge("tie", [5, 9, 9], reference)
    tally.judge("wrong", [5, 6, 9], reference)
    tally.judge("cut short", [5, 6], reference)
    assert tally.num_ties == 1 and tally.num_tokens == 5
    assert [line.split(":")[0] for line in tally.mismatches] == ["wrong"]


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
