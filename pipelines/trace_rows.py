"""Taking rows' numbers out of a training trace: their gradients, and their scores while training.

A row keeps its place, so that row numbers, steps and exposures of all others stay what they were: in tables its numbers
become zeros, in a gradient store, which knows rows by their ids, they are gone.
"""

from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

GRADIENTS = "gradients/*.npy"
GRADIENT_STORE = "gradients/store"
IN_RUN_SCORES = "in_run/steps.npy"


def remove_rows(folder: Path, example_ids: Set[str]) -> None:
    """Take out the rows' gradients [num_examples, dim] and in-run scores [steps, 2, batch, queries] in a trace folder.

    The folder must be a copy of its own; its files are written in place, for gradients may be larger than memory.
    """
    examples = pq.read_table(folder / "examples.parquet", columns=["row", "example_id"]).to_pylist()
    rows = [line["row"] for line in examples if line["example_id"] in example_ids]
    for file in sorted(folder.glob(GRADIENTS)):
        gradients = _writable(file)
        gradients[rows] = 0
        gradients.flush()
    if (folder / GRADIENT_STORE).is_dir():
        _remove_stored(folder / GRADIENT_STORE, example_ids)
    scores_file = folder / IN_RUN_SCORES
    if scores_file.is_file():
        scores = _writable(scores_file)
        for step in pq.read_table(folder / "steps.parquet", columns=["step", "example_ids"]).to_pylist():
            places = [place for place, row_id in enumerate(step["example_ids"]) if row_id in example_ids]
            scores[step["step"] - 1, :, places] = 0
        scores.flush()


def _remove_stored(folder: Path, example_ids: Set[str]) -> None:
    from attribution.influence.gradient_store import GradientStore

    store = GradientStore(folder, verify=False)  # whoever copied the trace verified it
    held = [example_id for example_id in store.ids() if example_id in example_ids]
    if held:
        store.delete(held, compact=True)


def _writable(file: Path) -> Any:
    file.chmod(0o644)  # the store's files are read-only
    return np.load(file, mmap_mode="r+")
