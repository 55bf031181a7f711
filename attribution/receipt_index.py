"""Which batch holds a receipt id: an SQLite view of the completions records, rebuilt from the log when it is lost."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.log_view import LogView
from attribution.receipts import ReceiptError, completion_rows

if TYPE_CHECKING:
    from attribution.trail import Trail

SCHEMA = """
CREATE TABLE IF NOT EXISTS receipts (
    id TEXT PRIMARY KEY, leaf_hash TEXT NOT NULL, inner_index INTEGER NOT NULL, time_us INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS receipts_by_time ON receipts (time_us);
"""


@dataclass(frozen=True)
class Place:
    """Where a receipt lies."""

    receipt_id: str
    leaf_hash: str
    inner_index: int


class ReceiptIndex:
    """HOME/views/receipts.sqlite; every call takes in what the log has gained."""

    def __init__(self, trail: "Trail") -> None:
        self._trail = trail
        self._view = LogView(trail, "receipts.sqlite", schema=SCHEMA, tables=("receipts",), take_in=self._take_in)

    def find(self, prefix: str) -> Place | None:
        """Return the place of the id that is, or alone begins with, `prefix`; ReceiptError when several do."""
        with self._view.open() as database:
            rows = database.execute(
                "SELECT id, leaf_hash, inner_index FROM receipts WHERE id >= ? AND id < ? ORDER BY id LIMIT 3",
                (prefix, prefix + "\U0010ffff"),
            ).fetchall()
        places = [Place(*row) for row in rows]
        exact = [place for place in places if place.receipt_id == prefix]
        if exact or len(places) <= 1:
            return next(iter(exact or places), None)
        ids = ", ".join(place.receipt_id for place in places)
        raise ReceiptError(f"receipt {prefix!r}: several ids begin so ({ids}, ...); give more of it")

    def places(self, receipt_ids: Sequence[str]) -> dict[str, Place]:
        """Return the places of those of the whole ids that the log has."""
        query = "SELECT id, leaf_hash, inner_index FROM receipts WHERE id = ?"
        with self._view.open() as database:
            found = [database.execute(query, (receipt_id,)).fetchone() for receipt_id in receipt_ids]
        return {row[0]: Place(*row) for row in found if row is not None}

    def recent(self, count: int) -> list[str]:
        """Return the newest ids, newest first."""
        with self._view.open() as database:
            query = "SELECT id FROM receipts ORDER BY time_us DESC, id DESC LIMIT ?"
            return [row[0] for row in database.execute(query, (count,))]

    @property
    def exists(self) -> bool:
        """Whether the view was ever made."""
        return self._view.path.is_file()

    def all(self) -> dict[str, Place]:
        """Return the place of every receipt, as the view has it."""
        with self._view.open() as database:
            rows = database.execute("SELECT id, leaf_hash, inner_index FROM receipts").fetchall()
        return {row[0]: Place(*row) for row in rows}

    def rebuild(self) -> int:
        """Drop the index, read it again from the log, and return the number of receipts."""
        self._view.remove()
        with self._view.open() as database:
            return int(database.execute("SELECT count(*) FROM receipts").fetchone()[0])

    def _take_in(self, database: sqlite3.Connection, start: int) -> None:
        for entry in self._trail.entries(start=start, kind="completions"):
            rows = enumerate(completion_rows(self._trail, entry))
            found = [(row.receipt["id"], entry.leaf_hash, index, row.receipt["time_us"]) for index, row in rows]
            database.executemany("INSERT OR IGNORE INTO receipts VALUES (?, ?, ?, ?)", found)
        gone = [(leaf_hash,) for leaf_hash in self._trail.erasures()]
        database.executemany("DELETE FROM receipts WHERE leaf_hash = ?", gone)
