"""Why a row was kept or dropped: the row, and every decision each refinement took about it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attribution.bodies import RefinementBody
from attribution.erasure import remaining
from configs.errors import UserError
from pipelines.refine.read import Contribution, contributions, load_decisions
from pipelines.refine.table import DECISIONS_FILE

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

PREFIX = "sha256:"
MIN_DIGITS = 8


class ExampleError(UserError):
    """An example id that means no row, or more than one."""


@dataclass(frozen=True)
class Example:
    """A row as it was contributed."""

    example_id: str
    contribution: Contribution
    line_number: int
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Ruling:
    """What one refinement decided about an example: rows of table.DECISIONS in the order of the rules."""

    entry: "Entry"
    name: str
    digest: str
    decisions: tuple[Mapping[str, Any], ...]


def find_example(trail: "Trail", example_id: str) -> Example:
    """Return the contributed row of an example id, or of at least 8 hex digits of one.

    Raises:
        ExampleError: too few digits, no such row, or several.
    """
    digits = example_id.lower().removeprefix(PREFIX)
    if len(digits) < MIN_DIGITS:
        raise ExampleError(f"example {example_id!r}: give at least {MIN_DIGITS} hex digits of its id")
    found = [example for contribution in _all(trail) for example in _rows_of(trail, contribution, PREFIX + digits)]
    if not found:
        raise ExampleError(
            f"example {example_id!r}: no contributed row has it; `trailmark dataset show NAME` lists ids"
        )
    if len(found) > 1:
        raise ExampleError(f"example {example_id!r}: {len(found)} rows begin so; give more digits")
    return found[0]


def rulings(trail: "Trail", example_id: str) -> list[Ruling]:
    """Return what each refinement decided about `example_id` (in full), newest first."""
    found: list[Ruling] = []
    for entry in trail.entries(kind="refinement"):
        if entry.record is None:
            continue
        assert isinstance(entry.record.body, RefinementBody)
        digest = remaining(trail, entry.record.outputs[0].digest)
        if not trail.store.has(digest):
            continue
        decisions = _decisions_about(trail, digest, example_id)
        if decisions:
            found.append(Ruling(entry, entry.record.body.name, digest, tuple(decisions)))
    return found[::-1]


def _decisions_about(trail: "Trail", digest: str, example_id: str) -> list[dict[str, Any]]:
    # Row groups whose ids cannot include this one are skipped; the file is hashed only when it has something to say.
    path = trail.store.get_directory(digest, verify=False) / DECISIONS_FILE
    wanted = pc.field("example_id") == example_id
    if not pq.read_table(path, columns=["example_id"], filters=wanted).num_rows:
        return []
    return load_decisions(trail, digest).filter(wanted).to_pylist()


def _all(trail: "Trail") -> list[Contribution]:
    try:
        return contributions(trail)
    except UserError as error:
        raise ExampleError(f"no example can be looked up: {error}") from error


def _rows_of(trail: "Trail", contribution: Contribution, prefix: str) -> Iterator[Example]:
    rows: pa.Table = pq.read_table(trail.store.path_of(contribution.rows))
    matching = rows.filter(pc.starts_with(rows.column("contribution_id"), prefix))
    for row in matching.to_pylist():
        yield Example(row["contribution_id"], contribution, row["line_number"], tuple(row["messages"]))
