"""How far a MLflow server has been filled, and which MLflow id stands for which record: HOME/views/mlflow.sqlite.

The log is the outbox, so this file may be deleted at any time: the next sync starts over and finds by their tags the
entities that are already there.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

CURSOR_FILE = Path("views") / "mlflow.sqlite"
_EXPERIMENT = ("", "experiment")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS view (
    one INTEGER PRIMARY KEY CHECK (one = 1), server TEXT NOT NULL, next_index INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS entity (leaf TEXT, role TEXT, mlflow_id TEXT NOT NULL, PRIMARY KEY (leaf, role));
CREATE TABLE IF NOT EXISTS aside (log_index INTEGER PRIMARY KEY, error TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Aside:
    """A record that the server refused, with its answer; it is tried again when the view is next opened."""

    log_index: int
    error: str


class Cursor:
    """The state of one view; every call commits before it returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(_SCHEMA)

    def bind(self, server: str) -> None:
        """Belong to the server of this identity; a view of another server (or an emptied one) starts from nothing."""
        row = self._database.execute("SELECT server FROM view").fetchone()
        if row is not None and row[0] == server:
            return
        with self._database:
            self._database.execute("BEGIN")
            for table in ("view", "entity", "aside"):
                self._database.execute(f"DELETE FROM {table}")
            self._database.execute("INSERT INTO view VALUES (1, ?, 0)", (server,))

    @property
    def next_index(self) -> int:
        """The first log index that is not in MLflow yet."""
        row = self._database.execute("SELECT next_index FROM view").fetchone()
        return 0 if row is None else int(row[0])

    def advance(self, next_index: int) -> None:
        """Everything before `next_index` is in MLflow, or set aside."""
        self._database.execute("UPDATE view SET next_index = ?", (next_index,))

    def get(self, leaf: str, role: str) -> str | None:
        """Return the MLflow id that plays `role` (run, model, version) for the record, or None."""
        row = self._database.execute(
            "SELECT mlflow_id FROM entity WHERE leaf = ? AND role = ?", (leaf, role)
        ).fetchone()
        return None if row is None else str(row[0])

    def put(self, leaf: str, role: str, mlflow_id: str) -> None:
        """Remember the MLflow id."""
        self._database.execute("INSERT OR REPLACE INTO entity VALUES (?, ?, ?)", (leaf, role, mlflow_id))

    @property
    def experiment(self) -> str | None:
        """The id of the experiment that shows the log, None before the first sync."""
        return self.get(*_EXPERIMENT)

    @experiment.setter
    def experiment(self, experiment_id: str) -> None:
        self.put(*_EXPERIMENT, experiment_id)

    def forget(self, leaf: str) -> None:
        """Drop what is remembered of a record."""
        self._database.execute("DELETE FROM entity WHERE leaf = ?", (leaf,))

    def set_aside(self, log_index: int, error: str) -> None:
        """Note a record that the server refused."""
        self._database.execute("INSERT OR REPLACE INTO aside VALUES (?, ?)", (log_index, error))

    def take_back(self, log_index: int) -> None:
        """The record is in MLflow after all."""
        self._database.execute("DELETE FROM aside WHERE log_index = ?", (log_index,))

    def asides(self) -> list[Aside]:
        """Return the refused records in log order."""
        rows = self._database.execute("SELECT log_index, error FROM aside ORDER BY log_index").fetchall()
        return [Aside(int(index), str(error)) for index, error in rows]

    def close(self) -> None:
        """Close the file."""
        self._database.close()
