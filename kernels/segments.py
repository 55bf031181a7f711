"""Token -> adapter work list of one step.

A step's tokens are laid out so that equal adapters are neighbours; a segment is one half-open run of rows. Rows of the
base model belong to no segment, so they cost no LoRA work at all.

    rows      0   1   2   3   4   5   6
    adapter  -1  -1   0   0   0   2   2        ->  segments (0, 2, 5), (2, 5, 7)
"""

from collections.abc import Sequence

import torch

from kernels.devices import to_device
from kernels.lora import LoraStep

BASE_ROW = -1


def build_step(runs: Sequence[tuple[int, int]], *, device: torch.device) -> LoraStep:
    """Merge runs (adapter_row or BASE_ROW, number of rows), in layout order, into segments; empty runs vanish.

    Raises ValueError when an adapter's rows are not neighbours: the layout must be sorted by adapter.
    """
    segments: list[tuple[int, int, int]] = []
    start = 0
    for adapter_row, num_rows in runs:
        end = start + num_rows
        if adapter_row != BASE_ROW and num_rows:
            if segments and segments[-1][0] == adapter_row and segments[-1][2] == start:
                segments[-1] = (adapter_row, segments[-1][1], end)
            else:
                segments.append((adapter_row, start, end))
        start = end
    if len({adapter_row for adapter_row, _, _ in segments}) != len(segments):
        raise ValueError(f"adapter rows are not neighbours in the layout: {list(runs)}")
    rows = torch.tensor([adapter_row for adapter_row, _ in runs], dtype=torch.int32)
    counts = torch.tensor([num_rows for _, num_rows in runs], dtype=torch.int64)
    return LoraStep(
        adapter_rows=to_device(rows.repeat_interleave(counts), device),
        segments=torch.tensor(segments, dtype=torch.int32).view(-1, 3),
    )
