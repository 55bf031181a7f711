"""Token -> adapter work list of one step.

A step's tokens are laid out so that equal adapters are neighbours; a segment is one half-open run of rows. Rows of the
base model belong to no segment, so they cost no LoRA work at all.

    rows      0   1   2   3   4   5   6
    adapter  -1  -1   0   0   0   2   2        ->  Segment(0, 2, 5), Segment(2, 5, 7)
"""

from collections.abc import Sequence
from dataclasses import dataclass

BASE_ROW = -1


@dataclass(frozen=True)
class Segment:
    """Rows [start, end) of a step's tokens belong to adapter `adapter_row` (an index into the step's adapters)."""

    adapter_row: int
    start: int
    end: int


def build_segments(runs: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """Merge runs (adapter_row or BASE_ROW, number of rows), in layout order, into segments; empty runs vanish.

    Raises ValueError when an adapter's rows are not neighbours: the layout must be sorted by adapter.
    """
    segments: list[Segment] = []
    start = 0
    for adapter_row, num_rows in runs:
        end = start + num_rows
        if adapter_row != BASE_ROW and num_rows:
            if segments and segments[-1].adapter_row == adapter_row and segments[-1].end == start:
                segments[-1] = Segment(adapter_row, segments[-1].start, end)
            else:
                segments.append(Segment(adapter_row, start, end))
        start = end
    if len({segment.adapter_row for segment in segments}) != len(segments):
        raise ValueError(f"adapter rows are not neighbours in the layout: {list(runs)}")
    return tuple(segments)
