"""The columns of contributed and refined rows, and a Parquet writer whose bytes depend on the values alone."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))

CONTRIBUTED = pa.schema(
    [
        pa.field("contribution_id", pa.string()),
        pa.field("content_id", pa.string()),
        pa.field("line_number", pa.int64()),
        pa.field("messages", MESSAGES),
    ]
)

REFINED = pa.schema(
    [
        pa.field("example_id", pa.string()),
        pa.field("content_id", pa.string()),
        pa.field("original_content_id", pa.string()),
        pa.field("contributor", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("leaf_index", pa.int64()),
        pa.field("line_number", pa.int64()),
        pa.field("messages", MESSAGES),
    ]
)

DECISIONS = pa.schema(
    [
        pa.field("example_id", pa.string()),
        pa.field("rule", pa.string()),
        pa.field("rule_digest", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("keep", pa.bool_()),
        pa.field("reason", pa.string()),
        pa.field("see_also", pa.string()),
    ]
)

ROWS_FILE = "rows.parquet"
DECISIONS_FILE = "decisions.parquet"
SUMMARY_FILE = "summary.json"

ROW_GROUP_ROWS = 8192
"""Rows per row group: fixed, so that the file does not show in which blocks the rows arrived."""


class TableWriter:
    """Writes tables to one Parquet file in row groups of ROW_GROUP_ROWS, however the rows were cut on arrival.

    Two files with the same rows are equal byte for byte (one pyarrow version; its name stands in the file's footer).
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", version="2.6", write_statistics=True)
        self._pending: list[pa.Table] = []
        self._num_pending = 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush(self._num_pending)
        self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Append rows whose columns are those of the schema."""
        self._pending.append(table.cast(self._schema))
        self._num_pending += table.num_rows
        if self._num_pending >= ROW_GROUP_ROWS:
            self._flush(self._num_pending - self._num_pending % ROW_GROUP_ROWS)

    def _flush(self, num_rows: int) -> None:
        if not self._num_pending:
            return
        waiting = pa.concat_tables(self._pending)
        for start in range(0, num_rows, ROW_GROUP_ROWS):
            group = waiting.slice(start, min(ROW_GROUP_ROWS, num_rows - start))
            # A compact copy: offsets left by slicing would otherwise move page boundaries.
            self._writer.write_table(pa.Table.from_pylist(group.to_pylist(), schema=self._schema))
        self._pending = [waiting.slice(num_rows)]
        self._num_pending = waiting.num_rows - num_rows


def write_table(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write `tables` one after another to `path`; return how many rows that was."""
    num_rows = 0
    with TableWriter(path, schema) as writer:
        for table in tables:
            writer.write(table)
            num_rows += table.num_rows
    return num_rows
