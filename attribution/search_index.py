"""Find any record by words, names or digests in it: an SQLite view of the log, rebuilt from it when it is lost.

A record's own text is indexed, not the tables it names, and not the prompts and answers behind a batch of completions.
What was erased from the records leaves the index with the next look at the log.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attribution.bodies import RedactionBody
from attribution.lineage import Lineage, label_of
from attribution.log_view import LogView
from attribution.records import to_plain
from attribution.trail import Entry, Trail

SCHEMA = """
CREATE TABLE IF NOT EXISTS record (
    log_index INTEGER PRIMARY KEY, leaf TEXT NOT NULL, kind TEXT NOT NULL, time_us INTEGER NOT NULL, label TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS record_by_kind ON record (kind, log_index);
CREATE VIRTUAL TABLE IF NOT EXISTS content USING fts5 (text, tokenize = 'trigram');
"""
NAMING_KINDS = ("contributor", "key_rotation")
TRIGRAM = 3  # shorter words are looked for in labels alone


@dataclass(frozen=True)
class Hit:
    """A record that a search found."""

    log_index: int
    leaf: str
    kind: str
    time_us: int
    label: str


class SearchIndex:
    """HOME/views/search.sqlite; every call takes in what the log has gained."""

    def __init__(self, trail: Trail, lineage: Lineage) -> None:
        self._trail = trail
        self._lineage = lineage
        tables = ("record", "content")
        self._view = LogView(trail, "search.sqlite", schema=SCHEMA, tables=tables, take_in=self._take_in)

    def find(self, words: str, *, kind: str = "", before: int | None = None, limit: int = 50) -> list[Hit]:
        """Return the newest records before log index `before` that hold every word, newest first."""
        conditions, values = _conditions(words.split(), kind)
        if before is not None:
            conditions, values = [*conditions, "log_index < ?"], [*values, before]
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        query = f"SELECT log_index, leaf, kind, time_us, label FROM record {where} ORDER BY log_index DESC LIMIT ?"
        with self._view.open() as database:
            return [Hit(*row) for row in database.execute(query, (*values, limit))]

    def counts(self, words: str) -> dict[str, int]:
        """Return how many records of each kind hold every word, most first."""
        conditions, values = _conditions(words.split(), "")
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        with self._view.open() as database:
            rows = database.execute(
                f"SELECT kind, count(*) FROM record {where} GROUP BY kind ORDER BY 2 DESC, 1", values
            )
            return {str(kind): int(count) for kind, count in rows}

    @property
    def exists(self) -> bool:
        """Whether anybody searched yet."""
        return self._view.path.is_file()

    def check(self) -> list[str]:
        """Return in words every way in which the index is not what the log makes of it."""
        problems = self._view.differences()
        with self._view.open() as database:
            try:
                database.execute("INSERT INTO content (content) VALUES ('integrity-check')")
            except sqlite3.OperationalError:
                raise  # locked or out of disk: not damage
            except sqlite3.DatabaseError as error:
                problems.append(f"words: {error}")
        return problems

    def _take_in(self, database: sqlite3.Connection, start: int) -> None:
        names = self._lineage.contributor_names()
        erased_names = False
        for entry in self._trail.entries(start=start):
            _insert(database, entry, names)
            if entry.record is not None and isinstance(entry.record.body, RedactionBody):
                erased = self._trail.entry(entry.record.body.leaf)
                for table, column in (("record", "log_index"), ("content", "rowid")):
                    database.execute(f"DELETE FROM {table} WHERE {column} = ?", (erased.index,))
                _insert(database, erased, names)
                erased_names |= erased.leaf.kind in NAMING_KINDS and erased.index < start
        if erased_names:  # they stand in the text of other records too
            self._take_in(database, 0)


def _conditions(words: Sequence[str], kind: str) -> tuple[list[str], list[str | int]]:
    conditions: list[str] = []
    values: list[str | int] = []
    for word in words:
        if len(word) >= TRIGRAM:
            conditions.append("log_index IN (SELECT rowid FROM content WHERE content MATCH ?)")
            values.append('"' + word.replace('"', '""') + '"')
        else:
            conditions.append("instr(lower(label), lower(?)) > 0")
            values.append(word)
    if kind:
        conditions.append("kind = ?")
        values.append(kind)
    return conditions, values


def _insert(database: sqlite3.Connection, entry: Entry, names: Mapping[str, str]) -> None:
    label = label_of(entry)
    row = (entry.index, entry.leaf_hash, entry.leaf.kind, entry.leaf.time_us, label)
    database.execute("INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?)", row)
    text = f"{label} {entry.leaf.kind} {entry.leaf_hash} {_text(entry, names)}"
    database.execute("INSERT OR REPLACE INTO content (rowid, text) VALUES (?, ?)", (entry.index, text))


def _text(entry: Entry, names: Mapping[str, str]) -> str:
    if entry.record is None:
        return " ".join(subject.digest for subject in entry.leaf.subjects)
    record = entry.record
    artefacts = [f"{item.kind} {item.name} {item.digest}" for item in (*record.inputs, *record.outputs)]
    people = [f"{party.key_id} {names.get(party.key_id, '')}" for party in record.contributors]
    body = json.dumps(to_plain(record.body, record.kind), ensure_ascii=False)
    return " ".join([body, *artefacts, *people])
