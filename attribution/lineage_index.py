"""The lineage of a home as an SQLite file, HOME/views/lineage.sqlite: a view of the log, made anew when it is lost.

Edges, kinds and times come from the leaves' public headers, so they stay when records are erased; names and digests
come from the private halves and go with them. Every read first takes in what the log has gained. The file remembers the
right edge of the tree it has read (see `LeafStream`), so catching up costs the new leaves alone and shows that old and
new ones lead to the signed checkpoint. A file that does not, is damaged or has another layout is made anew.
"""

import json
import logging
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from attribution.lineage_intake import Intake
from attribution.lineage_layout import LAYOUT, SCHEMA, TABLES, LineageError
from attribution.log.note import Checkpoint, NoteKey
from attribution.log.sequencer import LogError, file_lock
from attribution.log.stream import LeafStream, Mark
from attribution.private_records import PrivateRecords
from attribution.store import Store
from attribution.trust_file import TrustFile

logger = logging.getLogger(__name__)

CHUNK_LEAVES = 65_536  # taken in by one transaction; about 150 MB at its height
BUSY_TIMEOUT_S = 60.0
NOT_DAMAGE = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
    )
)
Result = TypeVar("Result")


class LineageIndex:
    """The lineage of one home; free of state but for the file, so any number of processes and threads may use it."""

    def __init__(self, home: Path, key: NoteKey, *, path: Path | None = None) -> None:
        self.home = home
        self.key = key
        self.path = path or home / "views" / "lineage.sqlite"
        self.private = PrivateRecords(home / "records")
        self._stream = LeafStream(home / "log", TrustFile(home).known_keys)

    @classmethod
    def open(cls, home: Path) -> "LineageIndex":
        """Return the index of a home without opening its trail, which would read the whole log."""
        try:
            trust = json.loads((home / "trust.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise LineageError(
                f"home {home}: holds no trail; set TRAILMARK_HOME, or contribute rows to start one"
            ) from error
        return cls(home, NoteKey.parse(trust["log"]))

    def ask(self, question: Callable[[sqlite3.Connection], Result], *, with_rows: bool = False) -> Result:
        """Return what `question` finds in one state of the index, as new as the log; a damaged file is made anew first.

        `with_rows`: take in the tables of rows too, which only looking up a row needs.

        Raises:
            LogError: the log does not lead to its signed checkpoint.
            LineageError: a private record was altered on disk, or the file cannot be written.
        """

        def answer(database: sqlite3.Connection) -> Result:
            self._catch_up(database)
            if with_rows:
                from attribution.lineage_rows import take_rows

                with _transaction(database):
                    take_rows(database, self.private, Store(self.home / "store"))
            database.execute("BEGIN")
            return question(database)

        return self._with_sound_file(answer)

    def rebuild(self) -> int:
        """Forget the index, read it again from the log, and return the number of records."""
        self._with_sound_file(self._start_over)
        return self.ask(size_of)

    def check(self) -> list[str]:
        """Return how the index differs from one made from the log this moment, and what is odd in the log itself."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            fresh = LineageIndex(self.home, self.key, path=Path(folder) / "fresh.sqlite")
            size = fresh.ask(size_of)

            def problems(database: sqlite3.Connection) -> list[str]:
                database.execute("ROLLBACK")  # no file can be attached inside a transaction
                database.execute("ATTACH ? AS fresh", (str(fresh.path),))
                if size_of(database) != size:
                    return [f"the log grew from {size} records while it was read; try again"]
                return [*_differences(database), *_orphans(database)]

            return self.ask(problems)

    def _with_sound_file(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        inode = self._inode()
        try:
            return self._with_connection(work)
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in NOT_DAMAGE:
                raise LineageError(f"index {self.path}: {error}; see to its folder, then try again") from error
            self._remove(inode, error)
        try:
            return self._with_connection(work)
        except sqlite3.Error as error:
            raise LineageError(f"index {self.path}: {error}, twice in a row; is its disk failing?") from error

    def _with_connection(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with closing(self._connect()) as database:
            return work(database)

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")  # a crash may lose the newest; the log has it
            database.execute("PRAGMA secure_delete=ON")  # names of erased records leave no bytes behind
            database.execute("PRAGMA cache_size=-131072")
            database.execute("PRAGMA mmap_size=1073741824")
            if layout_of(database) != LAYOUT:
                self._start_over(database, only_if=lambda: layout_of(database) != LAYOUT)
        except BaseException:
            database.close()
            raise
        return database

    def _start_over(self, database: sqlite3.Connection, *, only_if: Callable[[], bool] = lambda: True) -> None:
        """Empty the file and lay it out, unless another process did so meanwhile. Others may have it open."""
        with _transaction(database):
            if not only_if():
                return
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                database.execute(f'DROP TABLE "{name}"')
            for statement in SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version={LAYOUT}")

    def _catch_up(self, database: sqlite3.Connection) -> None:
        was_stale = False
        while True:
            state = self._state(database)
            checkpoint = self._stream.checkpoint()  # read after the state, so it is no older unless it was rolled back
            try:
                if self._is_level(state, checkpoint):
                    return
                with _transaction(database):
                    if self._state(database) == state:  # else another process went ahead
                        self._take_piece(database, state[1], checkpoint)
            except _Stale as reason:
                if was_stale and isinstance(reason.__cause__, LogError):
                    raise reason.__cause__ from None  # made anew, and still: it is the log that is wrong
                was_stale = True
                logger.warning("index %s: %s; it is made anew from the log", self.path, reason)
                self._start_over(database, only_if=partial(self._is_still, database, state))

    def _is_level(self, state: "tuple[str, Mark]", checkpoint: Checkpoint) -> bool:
        """Whether the index is as new as the log. _Stale when it is no view of this log."""
        origin, mark = state
        if mark.size and origin != checkpoint.origin:
            raise _Stale(f"it belongs to log {origin}")
        if mark.size > checkpoint.size:
            raise _Stale(f"the log was rolled back from {mark.size} to {checkpoint.size} leaves")
        if mark.size == checkpoint.size and mark.root() != checkpoint.root:
            raise _Stale("it was made from a history of this log that is gone")
        return mark.size == checkpoint.size

    def _take_piece(self, database: sqlite3.Connection, mark: Mark, checkpoint: Checkpoint) -> None:
        try:
            piece = next(self._stream.pieces(mark, checkpoint, num_leaves=CHUNK_LEAVES))
        except LogError as error:
            if not mark.size:
                raise
            raise _Stale("the log does not lead from it to the signed checkpoint") from error
        Intake(database, self.private).take(piece)
        database.execute(
            "INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?)",
            (self.key.name, piece.mark.size, piece.mark.offset, piece.mark.packed_peaks()),
        )

    def _state(self, database: sqlite3.Connection) -> "tuple[str, Mark]":
        row = database.execute("SELECT origin, size, offset, peaks FROM state").fetchone()
        return ("", Mark()) if row is None else (row[0], Mark.unpack(row[1], row[2], row[3]))

    def _is_still(self, database: sqlite3.Connection, state: "tuple[str, Mark]") -> bool:
        return self._state(database) == state

    def _inode(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return None

    def _remove(self, inode: int | None, reason: Exception) -> None:
        """Delete the damaged file, unless another process put a new one in its place."""
        with file_lock(self.path.with_suffix(".lock")):
            if self._inode() != inode:
                return
            logger.warning("index %s: %s; it is made anew from the log", self.path, reason)
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


class _Stale(Exception):
    """The file is not a view of this log in this layout."""


def layout_of(database: sqlite3.Connection) -> int:
    """Return the layout a file says it has, 0 for a new one."""
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def size_of(database: sqlite3.Connection) -> int:
    """Return the number of records in the index."""
    row = database.execute("SELECT size FROM state").fetchone()
    return 0 if row is None else int(row[0])


def _differences(database: sqlite3.Connection) -> Iterator[str]:
    for table in TABLES:
        for here, there, what in (("main", "fresh", "not in the log"), ("fresh", "main", "missing")):
            query = f"SELECT count(*) FROM (SELECT * FROM {here}.{table} EXCEPT SELECT * FROM {there}.{table})"
            number = database.execute(query).fetchone()[0]
            if number:
                yield f"table {table}: {number} rows {what}"


def _orphans(database: sqlite3.Connection) -> Iterator[str]:
    for number, leaf_hash in database.execute("SELECT id, leaf FROM unknown_parent ORDER BY id LIMIT 10"):
        yield f"log entry {number}: its parent {leaf_hash.hex()} is not in the log"


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
