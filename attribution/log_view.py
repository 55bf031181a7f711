"""An SQLite file that follows the log: it takes in what the log has gained, and is made again when it is lost."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attribution.trail import Trail

CURSOR = (
    "CREATE TABLE IF NOT EXISTS cursor (one INTEGER PRIMARY KEY CHECK (one = 1), next_index INTEGER, last_leaf TEXT);"
)
BUSY_TIMEOUT_S = 30.0

TakeIn = Callable[[sqlite3.Connection, int], None]


class LogView:
    """HOME/views/NAME, which many processes may open: each that finds it behind the log brings it up to date.

    `take_in(database, start)` writes what the entries from log index `start` on mean, in one transaction with the
    cursor. The cursor names the last leaf taken in, so a file of another log is emptied (`tables`) and read anew.
    """

    def __init__(self, trail: "Trail", name: str, *, schema: str, tables: Sequence[str], take_in: TakeIn) -> None:
        self._trail, self._schema, self._tables, self._take_in = trail, schema, tables, take_in
        self.path = trail.home / "views" / name

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection whose view is as new as the log; a damaged file is thrown away and made again."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            database = self._open()
        except sqlite3.OperationalError:
            raise  # locked or out of disk: not damage
        except sqlite3.DatabaseError:
            self.remove()
            database = self._open()
        with closing(database):
            yield database

    def differences(self) -> list[str]:
        """Return in words every way in which the file differs from one made from the log this moment."""
        while True:
            with self.open() as database, closing(sqlite3.connect("")) as fresh:
                database.execute("BEGIN")  # what another process takes in meanwhile is not seen
                size = self._next_index(database)
                fresh.executescript(self._schema)
                self._take_in(fresh, 0)
                if size != self._trail.log.size:
                    continue  # the log has grown in between
                return [text for table in self._tables if (text := _difference(database, fresh, table))]

    def remove(self) -> None:
        """Delete the file; the next `open` reads the whole log."""
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(self._schema + CURSOR)
            self._trail.refresh()
            if self._next_index(database) != self._trail.log.size:
                self._catch_up(database)
        except BaseException:
            database.close()
            raise
        return database

    def _catch_up(self, database: sqlite3.Connection) -> None:
        database.execute("BEGIN IMMEDIATE")
        try:
            start = self._next_index(database)  # again: another process may have been faster
            if start == 0:
                for table in (*self._tables, "cursor"):
                    database.execute(f"DELETE FROM {table}")
            self._take_in(database, start)
            size = self._trail.log.size
            cursor = (size, self._trail.log.leaf_hash(size - 1))
            database.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?, ?)", cursor)
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise

    def _next_index(self, database: sqlite3.Connection) -> int:
        """The first log index not taken in yet; 0 when the file is new or belongs to another log."""
        row = database.execute("SELECT next_index, last_leaf FROM cursor").fetchone()
        log = self._trail.log
        is_ours = row is not None and 0 < row[0] <= log.size and log.leaf_hash(row[0] - 1) == row[1]
        return int(row[0]) if is_ours else 0


def _difference(database: sqlite3.Connection, fresh: sqlite3.Connection, table: str) -> str:
    """How many rows of a table stand in one of two files alone, "" for none. Rows are compared by their SHA-256."""
    here, there = (Counter(_digests(one, table)) for one in (database, fresh))
    missing, strange = (there - here).total(), (here - there).total()
    return f"table {table}: {missing} rows missing, {strange} not of the log" if missing or strange else ""


def _digests(database: sqlite3.Connection, table: str) -> Iterator[bytes]:
    for row in database.execute(f"SELECT rowid, * FROM {table}"):
        yield sha256(repr(row).encode("utf-8", "surrogatepass")).digest()
