"""From annotated blocks to the refined dataset: settle the duplicates, then write rows and decisions in one order.

Blocks lie in a scratch folder as pairs of Parquet files, numbered in order of registration, so the result does not show
which worker made which block, nor when.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.refine import dedup
from pipelines.refine.annotate import KEY, Annotated
from pipelines.refine.table import DECISIONS, DECISIONS_FILE, REFINED, ROWS_FILE, write_table


@dataclass(frozen=True)
class Tally:
    """What a refinement counted. dropped: rows by the first (rule, reason) against each; kept: by key id."""

    dropped: Counter[tuple[str, str]]
    kept: Counter[str]


@dataclass(frozen=True)
class Outcome:
    """What the duplicates rule says of one block's candidates: bool [n], and the keeper's example id or '' [n]."""

    keep: npt.NDArray[np.bool_]
    see_also: npt.NDArray[np.object_]


def save_block(scratch: Path, index: int, annotated: Annotated) -> None:
    """Write one block to the scratch folder; whole or not at all, so that a task run twice does no harm."""
    for kind, table in (("candidates", annotated.candidates), ("decisions", annotated.decisions)):
        path = _block_path(scratch, kind, index)
        temporary = path.with_suffix(".part")
        pq.write_table(table, temporary)
        temporary.replace(path)


def merge(scratch: Path, num_blocks: int, *, folder: Path) -> Tally:
    """Write rows.parquet and decisions.parquet to `folder` from the blocks in `scratch`; return the counts.

    One block of texts is in memory at a time; ids and keys of all candidates are (some 200 bytes a row).
    """
    outcomes = settle_duplicates(scratch, num_blocks)
    tally = Tally(Counter(), Counter())
    write_table(folder / ROWS_FILE, REFINED, _kept_rows(scratch, outcomes, tally.kept))
    write_table(folder / DECISIONS_FILE, DECISIONS, _final_decisions(scratch, outcomes, tally.dropped))
    return tally


def settle_duplicates(scratch: Path, num_blocks: int) -> list[Outcome]:
    """Apply the duplicates rule to the candidates of all blocks."""
    columns = ["example_id", "leaf_index", "line_number", KEY]
    paths = [_block_path(scratch, "candidates", index) for index in range(num_blocks)]
    tables = [pq.read_table(path, columns=columns) for path in paths]
    if not tables:
        return []
    everything = pa.concat_tables(tables)
    keeper = dedup.keepers(
        dedup.Registered(
            b"".join(everything.column(KEY).to_pylist()),
            everything.column("leaf_index").to_numpy(),
            everything.column("line_number").to_numpy(),
        )
    )
    example_ids = np.array(everything.column("example_id").to_pylist(), dtype=object)
    keep = keeper == np.arange(len(keeper))
    see_also = np.where(keep, "", example_ids[keeper]) if len(keeper) else example_ids
    ends = np.cumsum([table.num_rows for table in tables])[:-1]
    return [Outcome(*pair) for pair in zip(np.split(keep, ends), np.split(see_also, ends), strict=True)]


def settled_decisions(decisions: pa.Table, outcome: Outcome) -> pa.Table:
    """Return a block's decisions with those of the duplicates rule, which stand in the candidates' order, filled in."""
    rows: list[dict[str, Any]] = decisions.to_pylist()
    settled = iter(zip(outcome.keep.tolist(), outcome.see_also.tolist(), strict=True))
    for row in rows:
        if row["rule"] == dedup.NAME:
            keep, see_also = next(settled)
            reason = "" if keep else dedup.DUPLICATE_REASON
            row.update(keep=keep, see_also=see_also, reason=reason, score=float(not keep))
    return pa.Table.from_pylist(rows, schema=DECISIONS)


def _kept_rows(scratch: Path, outcomes: Sequence[Outcome], kept: Counter[str]) -> Iterator[pa.Table]:
    for index, outcome in enumerate(outcomes):
        candidates = pq.read_table(_block_path(scratch, "candidates", index))
        rows = candidates.filter(pa.array(outcome.keep)).select(REFINED.names)
        kept.update(rows.column("contributor").to_pylist())
        yield rows


def _final_decisions(
    scratch: Path, outcomes: Sequence[Outcome], dropped: Counter[tuple[str, str]]
) -> Iterator[pa.Table]:
    for index, outcome in enumerate(outcomes):
        decisions = settled_decisions(pq.read_table(_block_path(scratch, "decisions", index)), outcome)
        dropped.update(_first_drops(decisions))
        yield decisions


def _first_drops(decisions: pa.Table) -> Iterator[tuple[str, str]]:
    """Yield (rule, reason) of the first drop of each row. A row's decisions begin anew with the first rule.

    Not with a new example id: equal lines of one file have one id.
    """
    rows: list[dict[str, Any]] = decisions.select(["rule", "reason", "keep"]).to_pylist()
    is_counted = False
    for row in rows:
        if row["rule"] == rows[0]["rule"]:
            is_counted = False
        if not row["keep"] and not is_counted:
            is_counted = True
            yield row["rule"], row["reason"]


def _block_path(scratch: Path, kind: str, index: int) -> Path:
    return scratch / f"{kind}-{index:08d}.parquet"
