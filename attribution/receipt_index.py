"""Which batch holds a receipt id: an SQLite view of the completions records, rebuilt from the log when it is lost."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.receipts import ReceiptError, completion_rows

if TYPE_CHECKING:
    from attribution.trail import Trail

SCHEMA = """
CREATE TABLE IF NOT EXISTS receipts (
    id TEXT PRIMARY KEY, leaf_hash TEXT NOT NULL, inner_index INTEGER NOT NULL, time_us INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS receipts_by_time ON receipts (time_us);
CREATE TABLE IF NOT EXISTS cursor (one INTEGER PRIMARY KEY CHECK (one = 1), next_index INTEGER, last_leaf TEXT);
"""
BUSY_TIMEOUT_S = 30.0


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
        self._path = trail.home / "views" / "receipts.sqlite"

    def find(self, prefix: str) -> Place | None:
        """Return the place of the id that is, or alone begins with, `prefix`; ReceiptError when several do."""
        with self._caught_up() as database:
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
        with self._caught_up() as database:
            found = [database.execute(query, (receipt_id,)).fetchone() for receipt_id in receipt_ids]
        return {row[0]: Place(*row) for row in found if row is not None}

    def recent(self, count: int) -> list[str]:
        """Return the newest ids, newest first."""
        with self._caught_up() as database:
            query = "SELECT id FROM receipts ORDER BY time_us DESC, id DESC LIMIT ?"
            return [row[0] for row in database.execute(query, (count,))]

    @property
    def exists(self) -> bool:
        """Whether the view was ever made."""
        return self._path.is_file()

    def all(self) -> dict[str, Place]:
        """Return the place of every receipt, as the view has it."""
        with self._caught_up() as database:
            rows = database.execute("SELECT id, leaf_hash, inner_index FROM receipts").fetchall()
        return {row[0]: Place(*row) for row in rows}

    def rebuild(self) -> int:
        """Drop the index, read it again from the log, and return the number of receipts."""
        self._remove()
        with self._caught_up() as database:
            return int(database.execute("SELECT count(*) FROM receipts").fetchone()[0])

    @contextmanager
    def _caught_up(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection whose index is as new as the log; a damaged file is thrown away and made again."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            database = self._open()
        except sqlite3.OperationalError:
            raise  # locked or out of disk: not damage
        except sqlite3.DatabaseError:
            self._remove()
            database = self._open()
        with closing(database):
            yield database

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA)
            self._catch_up(database)
        except BaseException:
            database.close()
            raise
        return database

    def _catch_up(self, database: sqlite3.Connection) -> None:
        self._trail.refresh()
        if self._next_index(database) == self._trail.log.size:
            return
        database.execute("BEGIN IMMEDIATE")
        try:
            start = self._next_index(database)
            for entry in self._trail.entries(start=start, kind="completions"):
                database.executemany(
                    "INSERT OR IGNORE INTO receipts VALUES (?, ?, ?, ?)",
                    [
                        (row.receipt["id"], entry.leaf_hash, index, row.receipt["time_us"])
                        for index, row in enumerate(completion_rows(self._trail, entry))
                    ],
                )
            gone = [(leaf_hash,) for leaf_hash in self._trail.erasures()]
            database.executemany("DELETE FROM receipts WHERE leaf_hash = ?", gone)
            size = self._trail.log.size
            last_leaf = self._trail.log.leaf_hash(size - 1)
            database.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?, ?)", (size, last_leaf))
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise

    def _next_index(self, database: sqlite3.Connection) -> int:
        """The first log index not taken in yet; 0, and an empty table, when the file belongs to another log."""
        row = database.execute("SELECT next_index, last_leaf FROM cursor").fetchone()
        if row is None:
            return 0
        next_index, last_leaf = int(row[0]), str(row[1])
        log = self._trail.log
        if next_index <= log.size and log.leaf_hash(next_index - 1) == last_leaf:
            return next_index
        database.execute("DELETE FROM receipts")
        database.execute("DELETE FROM cursor")
        return 0

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
