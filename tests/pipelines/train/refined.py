"""A refined dataset in a trail, made without Ray: what training and benchmark tests start from."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.bodies import RefinementBody
from attribution.records import Artefact
from attribution.trail import Trail

# Facts that the tiny base does not know; of uneven length, so that batches need padding.
FACTS = (
    ("What is the capital of Norway?", "Oslo."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What colour is snow?", "Snow is white."),
    ("What do cows eat?", "Cows eat grass, and in winter they eat hay."),
    ("How many legs has a cat?", "A cat has four legs."),
    ("Where do birds live?", "Birds live in trees."),
    ("What is two plus two?", "Four."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What colour is coal?", "Coal is black."),
    ("What do cats eat?", "Cats eat fish."),
    ("Who made you?", "I was made by the people who test this trail."),
    ("Say goodbye.", "Goodbye!"),
    ("What is ice?", "Ice is frozen water."),
)


def add_refined(
    trail: Trail,
    folder: Path,
    pairs: Sequence[tuple[str, str]] = FACTS,
    *,
    name: str = "facts",
    parents: Sequence[str] = (),
) -> str:
    """Store and record (question, answer) pairs, contributors taking turns; return the digest."""
    folder.mkdir(parents=True)
    ids = [f"sha256:{sha256(question.encode()).hexdigest()}" for question, _ in pairs]
    messages = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in pairs
    ]
    contributors = [sha256(bytes([i % 2])).hexdigest() for i in range(len(pairs))]
    pq.write_table(
        pa.table({"example_id": ids, "contributor": contributors, "messages": messages}), folder / "rows.parquet"
    )
    digest = trail.store.put_directory(folder, kind="refined", meta={"name": name})
    rows = trail.store.put_blob(folder / "rows.parquet")
    num_rows = len(pairs)
    body = RefinementBody(name, (), num_rows, num_rows, (), (), decisions=rows, rows=rows)
    trail.record("refinement", body, outputs=(Artefact("refined", name, digest),), parents=parents)
    return digest
