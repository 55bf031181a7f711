"""Encoding, the order of rows, schedules: pure functions."""

import math
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.influence.encode import encode_prompt
from configs.schema import TrainSettings
from pipelines.train.data import (
    Example,
    batch_size,
    checkpoint_steps,
    encode_rows,
    learning_rate,
    plan_steps,
    read_examples,
    shard,
    state_steps,
    write_examples,
)


def examples_of(lengths: list[int]) -> tuple[Example, ...]:
    return tuple(
        Example(row, f"id{row}", "someone", "", tuple(range(n)), (-100, *range(1, n))) for row, n in enumerate(lengths)
    )


@given(
    lengths=st.lists(st.integers(2, 64), min_size=1, max_size=120),
    rows_per_batch=st.integers(1, 16),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_each_example_comes_once_per_epoch(lengths: list[int], rows_per_batch: int, epochs: int, seed: int) -> None:
    examples = examples_of(lengths)
    steps = plan_steps(examples, TrainSettings(batch_size=rows_per_batch, epochs=epochs, seed=seed))
    per_epoch = math.ceil(len(lengths) / rows_per_batch)
    assert [step.number for step in steps] == list(range(1, epochs * per_epoch + 1))
    for epoch in range(epochs):
        rows = Counter(row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step.rows)
        assert rows == Counter(range(len(lengths)))


def test_order_follows_the_seed_and_nothing_else() -> None:
    examples = examples_of([5, 9, 13, 4, 8, 22, 7] * 5)
    settings = TrainSettings(batch_size=4, epochs=2)
    assert plan_steps(examples, settings) == plan_steps(examples, settings)
    assert plan_steps(examples, settings) != plan_steps(examples, TrainSettings(batch_size=4, epochs=2, seed=1))
    first, second = plan_steps(examples, settings)[:9], plan_steps(examples, settings)[9:]
    assert [step.rows for step in first] != [step.rows for step in second]


def test_max_steps_decides_the_length_of_the_run() -> None:
    examples = examples_of([4] * 10)
    assert len(plan_steps(examples, TrainSettings(batch_size=4, epochs=9, max_steps=2))) == 2
    assert len(plan_steps(examples, TrainSettings(batch_size=4, epochs=1, max_steps=7))) == 7
    assert plan_steps((), TrainSettings()) == ()


def test_bucketing_saves_padding() -> None:
    lengths = [4 + (i * 37) % 60 for i in range(64)]
    examples = examples_of(lengths)
    sizes = [batch_size(examples, step, world_size=1) for step in plan_steps(examples, TrainSettings(batch_size=8))]
    padded = sum(size.num_padded_tokens for size in sizes)
    unsorted = sum(8 * max(lengths[i : i + 8]) for i in range(0, 64, 8))
    assert sum(lengths) <= padded < 0.8 * unsorted
    assert sum(size.num_target_tokens for size in sizes) == sum(n - 1 for n in lengths)


def test_shards_part_a_batch() -> None:
    examples = examples_of([9, 3, 7, 5, 4])
    (step,) = plan_steps(examples, TrainSettings(batch_size=8))
    shards = [shard(step, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(row for rows in shards for row in rows) == [0, 1, 2, 3, 4]
    assert shard(step, rank=6, world_size=7) == ()


def test_checkpoints_are_spread_and_end_the_run() -> None:
    assert checkpoint_steps(50, 3) == (17, 33, 50)
    assert checkpoint_steps(2, 5) == (1, 2)
    assert checkpoint_steps(1, 1) == (1,)


@given(num_steps=st.integers(1, 3000), num_checkpoints=st.integers(1, 8))
def test_states_are_about_the_root_of_the_steps_and_hold_every_checkpoint(num_steps: int, num_checkpoints: int) -> None:
    states = state_steps(num_steps, num_checkpoints=num_checkpoints, num_states=None)
    assert set(checkpoint_steps(num_steps, num_checkpoints)) <= set(states)
    assert list(states) == sorted(set(states)) and states[-1] == num_steps
    assert abs(len(states) - math.isqrt(num_steps)) <= num_checkpoints
    assert state_steps(num_steps, num_checkpoints=1, num_states=1) == (num_steps,)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    settings = TrainSettings(learning_rate=0.5, warmup_ratio=0.2, lr_schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(step, num_steps=20, settings=settings) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert all(rate > 0 for rate in rates)
    if schedule == "constant":
        assert rates[4:] == [0.5] * 16
    else:
        assert rates[4] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True)
        assert rates[-1] < 0.05
    assert learning_rate(1, num_steps=1, settings=TrainSettings(warmup_ratio=0.0)) == TrainSettings().learning_rate


def test_rows_become_examples_or_are_named(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    question = [{"role": "user", "content": "What is ice?"}]
    rows = pa.table(
        {
            "example_id": ["good", "unanswered", "long"],
            "contributor": ["a", "b", "c"],
            "messages": [
                [*question, {"role": "assistant", "content": "Water."}],
                question,
                [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "Yes."}],
            ],
        }
    )
    encoded = encode_rows(rows, tokenizer, max_length=48)
    (example,) = encoded.examples
    assert [example_id for example_id, _ in encoded.skipped] == ["unanswered", "long"]
    assert "max_length=48" in encoded.skipped[1][1]
    prompt = encode_prompt(tokenizer, question)
    assert example.input_ids[: len(prompt)] == tuple(prompt)
    assert set(example.labels[: len(prompt)]) == {-100}
    assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    assert example.text == "user: What is ice?\nassistant: Water."
    write_examples(tmp_path / "examples.parquet", encoded.examples)
    assert read_examples(tmp_path / "examples.parquet") == encoded.examples
