"""Rows in the lineage index: which dataset a row came with and which refinements kept it.

A row's id is found among 32-byte digests; it has a number, and what a refinement kept is a bit per number, 4096 to a
block: 100,000 rows side by side cost a refinement 13 kB. Tables are read when a row is first asked for.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from attribution.lineage_facts import ROW_REDACTION, body_of
from attribution.lineage_index import size_of
from attribution.lineage_layout import LineageError
from attribution.lineage_names import MAX_CANDIDATES, ROW, Reference, digit_range

if TYPE_CHECKING:
    from attribution.lineage_graph import LineageGraph
    from attribution.private_records import PrivateRecords
    from attribution.store import Store

BLOCK_ROWS = 4096
PREFIX = "sha256:"
CONTRIBUTED_ID, KEPT_ID, DATASET = "contribution_id", "example_id", "dataset"
NEW_TABLES = """
SELECT id, leaf, commitment, name FROM record JOIN kind ON code = kind
WHERE id >= ? AND name IN ('dataset', 'refinement') AND label IS NOT NULL ORDER BY id
"""
ROW_REDACTIONS = f"SELECT id, leaf, commitment FROM record JOIN kind ON code = kind WHERE name = '{ROW_REDACTION}'"


def take_rows(database: sqlite3.Connection, private: "PrivateRecords", store: "Store") -> None:
    """Take in the rows of every dataset and refinement that is new; the caller holds a transaction."""
    start, next_row = database.execute("SELECT size, next_row FROM row_state").fetchone() or (0, 0)
    size = size_of(database)
    if start == size:
        return
    intake, follows = _RowIntake(database, next_row), _follows(database, private)
    for number, leaf, commitment, kind in database.execute(NEW_TABLES, (start,)).fetchall():
        data = private.read(number, leaf.hex())
        table = None if data is None else _table(store, _left_of(body_of(data, commitment.hex())["rows"], follows))
        if table is not None and kind == "dataset" and CONTRIBUTED_ID in table.column_names:
            intake.take_dataset(number, table)
        elif table is not None and kind == "refinement" and KEPT_ID in table.column_names:
            intake.take_refinement(number, table)
    database.execute("INSERT OR REPLACE INTO row_state VALUES (1, ?, ?)", (size, intake.next_row))


def _follows(database: sqlite3.Connection, private: "PrivateRecords") -> dict[str, str]:
    """Which table took the place of which, when rows were erased."""
    found: dict[str, str] = {}
    for number, leaf, commitment in database.execute(ROW_REDACTIONS).fetchall():
        data = private.read(number, leaf.hex())
        rewritten = () if data is None else body_of(data, commitment.hex())["rewritten"]
        found.update({rewrite["before"]: rewrite["after"] for rewrite in rewritten})
    return found


def _left_of(digest: str, follows: Mapping[str, str]) -> str:
    while digest in follows:
        digest = follows[digest]
    return digest


def resolve_row(graph: "LineageGraph", digits: str, text: str) -> Reference | None:
    """Return the row whose id begins with `digits`, below it the refinements that kept it; None when there is none.

    LineageError when several do.
    """
    query = "SELECT digest, number, dataset FROM row WHERE digest BETWEEN ? AND ? LIMIT ?"
    rows = graph.database.execute(query, (*digit_range(digits), MAX_CANDIDATES)).fetchall()
    if len(rows) > 1:
        ids = ", ".join(row[0].hex()[:16] for row in rows)
        raise LineageError(f"{text!r}: several rows begin so: {ids}; give more digits")
    if not rows:
        return None
    ((found, number, dataset),) = rows
    (node,) = graph.nodes([dataset])
    title = f"row {PREFIX}{found.hex()[:16]} of {node.label or 'an erased dataset'}"
    return Reference(text, ROW, title, (dataset,), tuple(_keepers(graph.database, number)), is_part=True)


def _keepers(database: sqlite3.Connection, number: int) -> Iterator[int]:
    """The refinements that kept a row, in log order."""
    byte, bit = divmod(number % BLOCK_ROWS, 8)
    query = "SELECT refinement, substr(bits, ?, 1) FROM kept WHERE block = ? ORDER BY refinement"
    for refinement, bits in database.execute(query, (byte + 1, number // BLOCK_ROWS)):
        if bits[0] >> 7 - bit & 1:
            yield refinement


def _table(store: "Store", digest: str) -> pa.Table | None:
    """The ids in a table of rows, None when it was erased or is no table. StoreError when it was altered."""
    if not store.has(digest):
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(store.get_blob(digest)))
    except pa.ArrowInvalid:
        return None  # rows in a form that is not ours
    wanted = {CONTRIBUTED_ID, KEPT_ID, DATASET} & set(file.schema_arrow.names)
    return file.read(columns=sorted(wanted))


class _RowIntake:
    """Gives rows their numbers, and notes which of them a refinement kept."""

    def __init__(self, database: sqlite3.Connection, next_row: int) -> None:
        self.next_row = next_row
        self._database = database

    def take_dataset(self, number: int, table: pa.Table) -> None:
        """Number the rows of a contribution, side by side."""
        digests = _digests(table, CONTRIBUTED_ID)
        self._number(digests, [number] * len(digests))

    def take_refinement(self, number: int, table: pa.Table) -> None:
        """Note which rows were kept; one whose dataset was erased is known from here on."""
        digests = _digests(table, KEPT_ID)
        found = self._numbers_of(digests)
        missing = [position for position, row in enumerate(found) if row is None]
        if missing:
            datasets = self._datasets(table, missing, otherwise=number)
            self._number([digests[position] for position in missing], datasets)
            found = self._numbers_of(digests)
        self._keep(number, np.unique(np.array(found, np.int64)))

    def _keep(self, refinement: int, rows: NDArray[np.int64]) -> None:
        blocks = []
        for block in np.unique(rows // BLOCK_ROWS).tolist():
            flags = np.zeros(BLOCK_ROWS, np.bool_)
            flags[rows[rows // BLOCK_ROWS == block] % BLOCK_ROWS] = True
            blocks.append((block, refinement, np.packbits(flags).tobytes()))
        self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", blocks)

    def _number(self, digests: Sequence[bytes], datasets: Sequence[int]) -> None:
        pairs = zip(digests, datasets, strict=True)
        rows = [(digest, self.next_row + offset, dataset) for offset, (digest, dataset) in enumerate(pairs)]
        self._database.executemany("INSERT OR IGNORE INTO row VALUES (?, ?, ?)", rows)
        self.next_row += len(rows)

    def _numbers_of(self, digests: Sequence[bytes]) -> list[int | None]:
        """The numbers of rows, by one join: a look-up each would take twice as long."""
        self._database.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (place INTEGER PRIMARY KEY, digest BLOB)")
        self._database.execute("DELETE FROM wanted")
        self._database.executemany("INSERT INTO wanted VALUES (?, ?)", enumerate(digests))
        query = "SELECT number FROM wanted LEFT JOIN row USING (digest) ORDER BY place"
        return [number for (number,) in self._database.execute(query)]

    def _datasets(self, table: pa.Table, positions: Sequence[int], *, otherwise: int) -> list[int]:
        """The records of the datasets that rows came with; `otherwise` where the table does not say."""
        if DATASET not in table.column_names:
            return [otherwise] * len(positions)
        leaves = table.column(DATASET).take(pa.array(positions)).to_pylist()
        query = "SELECT id FROM record WHERE leaf = ?"
        ids = {leaf: self._database.execute(query, (bytes.fromhex(leaf),)).fetchone() for leaf in set(leaves)}
        return [otherwise if ids[leaf] is None else ids[leaf][0] for leaf in leaves]


def _digests(table: pa.Table, column: str) -> list[bytes]:
    """The digests in a column of ids; none when they are of another form, which no user could give."""
    texts = table.column(column).to_pylist()
    if not all(text.startswith(PREFIX) for text in texts):
        return []
    return [bytes.fromhex(text.removeprefix(PREFIX)) for text in texts]
