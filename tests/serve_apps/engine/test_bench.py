"""The measurement: who gets which adapter, what is counted, what the percentiles say."""

from collections import Counter
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serve_apps.engine.bench import Load, choose_adapters, measure, percentiles_ms, requests_of, write_random_adapter
from serve_apps.engine.errors import InvalidRequest
from tests.serve_apps.engine.engine_cases import engine_for


def test_adapters_follow_the_stated_law() -> None:
    assert choose_adapters(Load(3, 1, 1)) == [None] * 3
    assert choose_adapters(Load(3, 1, 1, "one", 5)) == [0] * 3
    assert choose_adapters(Load(3, 1, 1, "distinct", 5)) == [0, 1, 2]
    uniform = Counter(choose_adapters(Load(6000, 1, 1, "uniform", 3)))
    assert all(abs(uniform[index] - 2000) < 150 for index in range(3))  # 4 standard deviations
    zipf = Counter(choose_adapters(Load(6000, 1, 1, "zipf", 3)))
    for index, weight in enumerate((6 / 11, 3 / 11, 2 / 11)):
        assert abs(zipf[index] - 6000 * weight) < 160
    assert choose_adapters(Load(9, 1, 1, "zipf", 3, seed=4)) == choose_adapters(Load(9, 1, 1, "zipf", 3, seed=4))


@pytest.mark.parametrize(("law", "words"), [("fair", "uniform"), ("distinct", "2")])
def test_a_load_that_cannot_be_is_refused(law: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Load(3, 1, 1, law, 2)  # type: ignore[arg-type]


def test_percentiles_are_of_what_was_measured() -> None:
    assert percentiles_ms([]) == {}
    assert percentiles_ms([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}
    found = percentiles_ms([index / 1000 for index in range(100, 0, -1)])
    assert found == pytest.approx({"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0})


def test_every_token_is_counted_and_the_adapters_are_peft_adapters(tiny_base: Path, tmp_path: Path) -> None:
    engine = engine_for(tiny_base)
    modules = ("q_proj", "down_proj")
    refs = [
        write_random_adapter(tmp_path / str(index), engine.spec, rank=index + 1, modules=modules, seed=index)
        for index in range(3)
    ]
    load = Load(5, 7, 4, "zipf", 3)
    requests = requests_of(load, refs, vocab_size=engine.spec.vocab_size)
    measured = measure(engine, requests)
    assert measured.num_output_tokens == 20
    assert measured.num_distinct_adapters == len({request.adapter for request in requests})
    assert measured.tokens_per_s == pytest.approx(20 / measured.wall_s)
    assert 0 < measured.first_token_ms["p50"] <= measured.first_token_ms["max"] <= measured.wall_s * 1e3
    assert 0 < measured.inter_token_ms["p50"] <= measured.wall_s * 1e3
    assert measured.stats["num_output_tokens"] == 20
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), refs[2].path)
    assert model.peft_config["default"].r == 3
