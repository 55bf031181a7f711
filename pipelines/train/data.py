"""Refined rows to token ids, and the order in which training sees them: a pure function of rows and settings."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.influence.encode import EncodeError, encode_example, num_targets
from configs.schema import TrainSettings

WINDOW_BATCHES = 2
"""Batches whose rows are sorted by length together. 2 pads 5 % of the tokens away; a wider window makes batches of one
wording each, which learnt the demo's facts worse (8 and 9 of 10 held-out answers against 10)."""

EXAMPLES_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("example_id", pa.string()),
        ("contributor", pa.string()),
        ("num_target_tokens", pa.int32()),
        ("text", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Example:
    """One training row. `row` is its place in every table of the trace; labels are -100 but on the answer."""

    row: int
    example_id: str
    contributor: str
    text: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_target_tokens(self) -> int:
        """Tokens that carry loss."""
        return num_targets(self.labels)

    @property
    def encoded(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.input_ids, self.labels


@dataclass(frozen=True)
class EncodedRows:
    """The rows training will see, and (example id, reason) of those it cannot use."""

    examples: tuple[Example, ...]
    skipped: tuple[tuple[str, str], ...]


def encode_rows(rows: pa.Table, tokenizer: Any, *, max_length: int) -> EncodedRows:
    """Tokenise the rows.parquet of a refined dataset, in its order."""
    examples: list[Example] = []
    skipped: list[tuple[str, str]] = []
    for record in rows.select(["example_id", "contributor", "messages"]).to_pylist():
        try:
            input_ids, labels = encode_example(tokenizer, record["messages"], max_length=max_length)
        except EncodeError as error:
            skipped.append((record["example_id"], str(error)))
            continue
        examples.append(
            Example(
                row=len(examples),
                example_id=record["example_id"],
                contributor=record["contributor"],
                text=conversation_text(record["messages"]),
                input_ids=tuple(input_ids),
                labels=tuple(labels),
            )
        )
    return EncodedRows(tuple(examples), tuple(skipped))


def conversation_text(messages: Sequence[dict[str, str]]) -> str:
    """Return the row as people read it: one `role: content` line per turn."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write what `read_examples` reads; workers of every attempt read the same file."""
    columns = {name: [getattr(example, name) for example in examples] for name in EXAMPLES_SCHEMA.names}
    pq.write_table(pa.table(columns, schema=EXAMPLES_SCHEMA), path)


def read_examples(path: Path) -> tuple[Example, ...]:
    """Return the examples of `write_examples`, by row."""
    return tuple(
        Example(
            row=record["row"],
            example_id=record["example_id"],
            contributor=record["contributor"],
            text=record["text"],
            input_ids=tuple(record["input_ids"]),
            labels=tuple(record["labels"]),
        )
        for record in pq.read_table(path).to_pylist()
    )


@dataclass(frozen=True)
class Step:
    """One optimizer step: which rows the global batch holds, longest first. `number` counts from 1."""

    number: int
    rows: tuple[int, ...]


def plan_steps(examples: Sequence[Example], settings: TrainSettings) -> tuple[Step, ...]:
    """Return every step of the run: each row once per epoch, rows of like length together, order drawn from the seed.

    `max_steps` decides the length when set (starting further epochs if it must), else `epochs` does.
    """
    if not examples:
        return ()
    num_per_epoch = math.ceil(len(examples) / settings.batch_size)
    num_steps = settings.max_steps if settings.max_steps is not None else settings.epochs * num_per_epoch
    batches: list[tuple[int, ...]] = []
    for epoch in range(math.ceil(num_steps / num_per_epoch)):
        batches += _epoch_batches(examples, batch_size=settings.batch_size, key=f"{settings.seed}:{epoch}")
    return tuple(Step(number, rows) for number, rows in enumerate(batches[:num_steps], start=1))


def shard(step: Step, *, rank: int, world_size: int) -> tuple[int, ...]:
    """Return one worker's rows of a step; dealt in turn, so that every worker gets long and short ones."""
    return step.rows[rank::world_size]


def checkpoint_steps(num_steps: int, num_checkpoints: int) -> tuple[int, ...]:
    """Return the step numbers after which weights and moments are kept: evenly spread, the last one final."""
    return tuple(sorted({max(1, round(num_steps * (i + 1) / num_checkpoints)) for i in range(num_checkpoints)}))


def state_steps(num_steps: int, *, num_checkpoints: int, num_states: int | None) -> tuple[int, ...]:
    """Return the step numbers after which the whole state is kept, `checkpoint_steps` among them.

    About `num_states` of them, sqrt(num_steps) by default: a reverse sweep then holds as many states of one segment as
    there are segments, the least for both together.
    """
    wanted = num_states or math.isqrt(num_steps)
    found: list[int] = []
    start = 0
    for end in checkpoint_steps(num_steps, num_checkpoints):
        num_segments = max(1, round(wanted * (end - start) / num_steps))
        found += [start + step for step in checkpoint_steps(end - start, num_segments)]
        start = end
    return tuple(found)


def learning_rate(step: int, *, num_steps: int, settings: TrainSettings) -> float:
    """Return the rate of step 1..num_steps: linear warm-up, then the schedule down to zero just after the last step."""
    num_warmup = round(settings.warmup_ratio * num_steps)
    if step <= num_warmup:
        return settings.learning_rate * step / num_warmup
    done = (step - 1 - num_warmup) / max(1, num_steps - num_warmup)
    if settings.lr_schedule == "constant":
        return settings.learning_rate
    if settings.lr_schedule == "linear":
        return settings.learning_rate * (1 - done)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class BatchSize:
    """Tokens of a global batch, over all workers."""

    num_tokens: int
    num_target_tokens: int
    num_padded_tokens: int

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / self.num_padded_tokens


def batch_size(examples: Sequence[Example], step: Step, *, world_size: int) -> BatchSize:
    """Count a step's tokens as its workers will run them, each padding to its own longest row."""
    lengths = [
        [examples[row].num_tokens for row in shard(step, rank=r, world_size=world_size)] for r in range(world_size)
    ]
    return BatchSize(
        num_tokens=sum(sum(part) for part in lengths),
        num_target_tokens=sum(examples[row].num_target_tokens for row in step.rows),
        num_padded_tokens=sum(max(part) * len(part) for part in lengths if part),
    )


def _epoch_batches(examples: Sequence[Example], *, batch_size: int, key: str) -> list[tuple[int, ...]]:
    """Shuffle, sort by length within windows, cut into batches, shuffle the batches."""
    order = sorted(range(len(examples)), key=lambda row: _draw(key, examples[row].example_id))
    window = batch_size * WINDOW_BATCHES
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda row: -examples[row].num_tokens)
        batches += [tuple(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return sorted(batches, key=lambda rows: _draw(key, *(examples[row].example_id for row in rows)))


def _draw(key: str, *parts: str) -> bytes:
    """A random sort key that any machine and library version draws alike."""
    return hashlib.sha256("\n".join([key, *parts]).encode()).digest()
