"""New leaves on their way into the lineage index: edges from their headers, names and digests from what they say."""

import json
import sqlite3
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from attribution.lineage_facts import facts_of
from attribution.lineage_layout import BLOCK_BITS, BLOCK_CODES, BLOCK_IDS, HEADER_ONLY, MAX_KINDS, LineageError
from attribution.log.stream import Piece
from attribution.private_records import PrivateRecords
from attribution.records import RecordError


class Intake:
    """One transaction's worth of new leaves on their way into the tables."""

    def __init__(self, database: sqlite3.Connection, private: PrivateRecords) -> None:
        self._database, self._private = database, private
        self._codes = {name: code for code, name in database.execute("SELECT code, name FROM kind")}
        self._known: dict[bytes, int] = {}
        self._parents: dict[int, tuple[int, ...]] = {}
        self._children: defaultdict[int, array[int]] = defaultdict(lambda: array("I"))
        self._with_children: set[int] = set()
        self._records: list[tuple[int, bytes, int, int, bytes, bytes, str | None]] = []
        self._inner: list[tuple[int, int]] = []
        self._unknown: list[tuple[int, bytes]] = []
        self._names: list[tuple[str, int, str, int]] = []
        self._digests: list[tuple[bytes, str, int]] = []
        self._erased: list[bytes] = []
        self._erases_rows = False

    def take(self, piece: Piece) -> None:
        """Write the leaves of a piece and what their records say."""
        for number, (data, leaf_hash) in enumerate(zip(piece.leaves, piece.hashes, strict=True), start=piece.first):
            self._take(number, leaf_hash, json.loads(data))
        write = self._database.executemany
        write("INSERT INTO record VALUES (?, ?, ?, ?, ?, ?, ?)", self._records)
        write("INSERT OR IGNORE INTO inner_child VALUES (?, ?)", self._inner)
        write("INSERT OR IGNORE INTO unknown_parent VALUES (?, ?)", self._unknown)
        write("INSERT OR IGNORE INTO name VALUES (?, ?, ?, ?)", self._names)
        write("INSERT OR IGNORE INTO digest VALUES (?, ?, ?)", self._digests)
        self._append_kinds(piece.first, bytes(record[2] for record in self._records))
        for parent in sorted(self._children):
            self._append_children(parent, self._children[parent])
        for leaf_hash in self._erased:
            self._forget(leaf_hash)
        if self._erased or self._erases_rows:
            self._forget_rows()

    def _take(self, number: int, leaf_hash: bytes, leaf: dict[str, Any]) -> None:
        kind, commitment = leaf["kind"], leaf["commitment"]
        code = self._codes.get(kind)
        code = self._new_kind(kind) if code is None else code
        parents = self._numbers(number, leaf["parents"])
        for parent in parents:
            self._children[parent].append(number)
            if parent not in self._with_children:
                self._first_child(parent)
        self._known[leaf_hash] = number
        self._parents[number] = parents
        text = None if kind in HEADER_ONLY else self._take_facts(number, leaf_hash.hex(), kind, commitment)
        packed = array("I", parents).tobytes()
        self._records.append((number, leaf_hash, code, leaf["time_us"], packed, bytes.fromhex(commitment), text))

    def _numbers(self, number: int, hashes: Sequence[str]) -> tuple[int, ...]:
        found = []
        for text in hashes:
            leaf_hash = bytes.fromhex(text)
            parent = self._known.get(leaf_hash)
            if parent is None:
                parent = self._look_up(leaf_hash)
            if parent is None:
                self._unknown.append((number, leaf_hash))
            else:
                found.append(parent)
        return tuple(dict.fromkeys(found))

    def _look_up(self, leaf_hash: bytes) -> int | None:
        row = self._database.execute("SELECT id FROM record WHERE leaf = ?", (leaf_hash,)).fetchone()
        if row is None:
            return None
        self._known[leaf_hash] = row[0]
        return int(row[0])

    def _first_child(self, parent: int) -> None:
        """A record that has a child for the first time: the edges that lead to it become inner ones."""
        self._with_children.add(parent)
        grandparents = self._parents.get(parent)
        if grandparents is None:
            if next(_blocks(self._database, parent), None) is not None:
                return
            blob = self._database.execute("SELECT parents FROM record WHERE id = ?", (parent,)).fetchone()[0]
            grandparents = tuple(array("I", blob))
        self._inner += [(grandparent, parent) for grandparent in grandparents]

    def _take_facts(self, number: int, leaf_hash: str, kind: str, commitment: str) -> str | None:
        """Take in what a record says, unless it was erased, and return its label."""
        private = self._private.read(number, leaf_hash)
        if private is None:
            return None
        try:
            facts = facts_of(private, kind, commitment)
        except RecordError as error:
            raise LineageError(f"record {leaf_hash}: altered on disk: {error}; restore it from a copy") from error
        self._names += [(name, version, role, number) for name, version, role in facts.names]
        self._digests += [(bytes.fromhex(digest), role, number) for digest, role in facts.digests]
        if facts.erases is not None:
            self._erased.append(bytes.fromhex(facts.erases))
        self._erases_rows = self._erases_rows or facts.erases_rows
        return facts.label

    def _append_kinds(self, first: int, codes: bytes) -> None:
        """Fill the last block of kinds, then write new ones."""
        block, num_filled = divmod(first, BLOCK_CODES)
        if num_filled:
            query = "SELECT codes FROM kinds WHERE block = ?"
            codes = self._database.execute(query, (block,)).fetchone()[0] + codes
        blocks = [
            (block + number, codes[start : start + BLOCK_CODES])
            for number, start in enumerate(range(0, len(codes), BLOCK_CODES))
        ]
        self._database.executemany("INSERT OR REPLACE INTO kinds VALUES (?, ?)", blocks)

    def _append_children(self, parent: int, children: "array[int]") -> None:
        """Fill the last block of a parent's children, then write new ones."""
        low = parent << BLOCK_BITS
        query = "SELECT key, ids FROM child WHERE key BETWEEN ? AND ? ORDER BY key DESC LIMIT 1"
        row = self._database.execute(query, (low, low + (1 << BLOCK_BITS) - 1)).fetchone()
        at, ids = (low, children) if row is None else (row[0], array("I", row[1]) + children)
        blocks = [
            (at + number, ids[start : start + BLOCK_IDS].tobytes())
            for number, start in enumerate(range(0, len(ids), BLOCK_IDS))
        ]
        self._database.executemany("INSERT OR REPLACE INTO child VALUES (?, ?)", blocks)

    def _new_kind(self, kind: str) -> int:
        code = self._codes[kind] = len(self._codes)
        assert code < MAX_KINDS, "a kind is a byte"
        self._database.execute("INSERT INTO kind VALUES (?, ?)", (code, kind))
        return code

    def _forget(self, leaf_hash: bytes) -> None:
        """An erased record keeps its place in the graph and nothing of what it said."""
        number = self._known.get(leaf_hash)
        number = self._look_up(leaf_hash) if number is None else number
        if number is None:
            return
        self._database.execute("UPDATE record SET label = NULL WHERE id = ?", (number,))
        for table in ("name", "digest"):
            self._database.execute(f"DELETE FROM {table} WHERE id = ?", (number,))

    def _forget_rows(self) -> None:
        """They are read again from the tables that are left, when next asked for."""
        for table in ("row_state", "row", "kept"):
            self._database.execute(f"DELETE FROM {table}")


def _blocks(database: sqlite3.Connection, parent: int) -> Iterator[bytes]:
    query = "SELECT ids FROM child WHERE key BETWEEN ? AND ?"
    for row in database.execute(query, (parent << BLOCK_BITS, (parent + 1 << BLOCK_BITS) - 1)):
        yield row[0]
