"""Walks over the lineage index: up, down, the shortest way between, and pages of what was found.

Records are their numbers in the log here. A walk up reads a record's parents; a walk down first finds the records that
have children of their own, of which there are few, and then reads all their children in blocks.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attribution.lineage_facts import DIGEST_PREFIX, MADE, body_of, label_of_body
from attribution.lineage_index import size_of
from attribution.lineage_layout import BLOCK_BITS, HEADER_ONLY

if TYPE_CHECKING:
    from attribution.lineage_index import LineageIndex

Ids = NDArray[np.uint32]
EMPTY: Ids = np.empty(0, np.uint32)
BY_ID = "SELECT id, leaf, kind, time_us, label FROM record WHERE id IN (SELECT value FROM json_each(?))"
INNER = f"""
WITH RECURSIVE reached (id) AS (
    SELECT value FROM json_each(?) UNION SELECT child FROM reached JOIN inner_child ON parent = id
)
SELECT ids FROM reached JOIN child ON key BETWEEN id << {BLOCK_BITS} AND (id + 1 << {BLOCK_BITS}) - 1
"""
CHILDREN = f"""
SELECT value, ids FROM json_each(?)
JOIN child ON child.key BETWEEN value << {BLOCK_BITS} AND (value + 1 << {BLOCK_BITS}) - 1
"""


@dataclass(frozen=True)
class Node:
    """A record as a list shows it. `label` is what it says of itself, None when it was erased."""

    index: int
    leaf_hash: str
    kind: str
    label: str | None
    time_us: int


class LineageGraph:
    """One state of an index; lives as long as the `ask` that made it."""

    def __init__(self, index: "LineageIndex", database: sqlite3.Connection) -> None:
        self.home = index.home
        self.database = database
        self._private = index.private
        self.kinds: dict[int, str] = dict(database.execute("SELECT code, name FROM kind").fetchall())

    @property
    def size(self) -> int:
        """Number of records."""
        return size_of(self.database)

    def number(self, leaf_hash: str) -> int | None:
        """Return the log index of a whole leaf hash, None when it is not in the log."""
        query = "SELECT id FROM record WHERE leaf = ?"
        row = self.database.execute(query, (bytes.fromhex(leaf_hash),)).fetchone()
        return None if row is None else int(row[0])

    def maker(self, digest: str) -> int | None:
        """Return the newest record that made an artefact, None when none did or it was erased."""
        query = "SELECT max(id) FROM digest WHERE digest = ? AND role = ?"
        row = self.database.execute(query, (bytes.fromhex(digest.removeprefix(DIGEST_PREFIX)), MADE)).fetchone()
        return None if row[0] is None else int(row[0])

    def up(self, starts: Iterable[int], *, depth: int | None = None) -> dict[int, int | None]:
        """Return every record within `depth` steps above `starts`, and those, each with the child it came from."""
        return self._walk(starts, self.parents, depth=depth)

    def down(self, starts: Sequence[int]) -> dict[str, Ids]:
        """Return every record below `starts` by kind, numbers rising. A start is among them only below another one."""
        blobs = [ids for (ids,) in self.database.execute(INNER, (json.dumps(list(starts)),))]
        return self._sorted(_distinct(b"".join(blobs))) if blobs else {}

    def down_steps(self, starts: Iterable[int], *, depth: int) -> dict[int, int | None]:
        """Return every record within `depth` steps below `starts`, and them, each with the parent it came from."""
        return self._walk(starts, self.children, depth=depth)

    def path(self, ancestors: Iterable[int], descendants: Iterable[int]) -> list[int]:
        """Return a shortest chain from one of the first to one of the second, both included; empty if there is none."""
        goals = set(ancestors)
        came_from = self._walk(descendants, self.parents, until=goals)
        step: int | None = next((goal for goal in sorted(goals) if goal in came_from), None)
        chain = []
        while step is not None:
            chain.append(step)
            step = came_from[step]
        return chain

    def parents(self, ids: Iterable[int]) -> dict[int, list[int]]:
        """Return the parents of each record."""
        query = "SELECT id, parents FROM record WHERE id IN (SELECT value FROM json_each(?))"
        rows = self.database.execute(query, (json.dumps(list(ids)),))
        return {number: np.frombuffer(blob, np.uint32).tolist() for number, blob in rows}

    def children(self, ids: Iterable[int]) -> dict[int, list[int]]:
        """Return the children of each record that has some, numbers rising."""
        found: dict[int, list[int]] = {}
        for parent, blob in self.database.execute(CHILDREN, (json.dumps(list(ids)),)):
            found.setdefault(parent, []).extend(np.frombuffer(blob, np.uint32).tolist())
        return {parent: sorted(children) for parent, children in found.items()}

    def children_of_kind(self, parent: int, kind: str) -> list[int]:
        """Return the children of one kind, numbers rising."""
        return self._sorted(self._children(parent)).get(kind, EMPTY).tolist()

    def num_children(self, parent: int, kind: str) -> int:
        """Return how many children of one kind a record has."""
        return len(self._sorted(self._children(parent)).get(kind, EMPTY))

    def _children(self, parent: int) -> Ids:
        query = "SELECT ids FROM child WHERE key BETWEEN ? AND ? ORDER BY key"
        blobs = self.database.execute(query, (parent << BLOCK_BITS, (parent + 1 << BLOCK_BITS) - 1))
        return np.frombuffer(b"".join(ids for (ids,) in blobs), np.uint32)

    @cached_property
    def _codes(self) -> NDArray[np.uint8]:
        """The kind of every record."""
        rows = self.database.execute("SELECT codes FROM kinds ORDER BY block")
        return np.frombuffer(b"".join(codes for (codes,) in rows), np.uint8)

    def _sorted(self, ids: Ids) -> dict[str, Ids]:
        """Records (numbers rising) sorted into kinds."""
        codes = self._codes[ids]
        return {self.kinds[code]: ids[codes == code] for code in np.unique(codes).tolist()}

    def by_kind(self, ids: Iterable[int]) -> dict[str, Ids]:
        """Return records sorted into kinds, numbers rising."""
        return self._sorted(np.unique(np.array(list(ids), np.uint32)))

    def nodes(self, ids: Iterable[int]) -> list[Node]:
        """Return records as a list shows them, in the order given."""
        wanted = [int(number) for number in ids]
        rows = {row[0]: row for row in self.database.execute(BY_ID, (json.dumps(wanted),))}
        return [self._node(*rows[number]) for number in wanted]

    def leaf_hashes(self, ids: Iterable[int]) -> list[str]:
        """Return the leaf hashes of records, in the order of their numbers."""
        query = "SELECT leaf FROM record WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id"
        return [leaf.hex() for (leaf,) in self.database.execute(query, (json.dumps(list(ids)),))]

    def contributor_names(self) -> dict[str, str]:
        """Return the name of each contributor by key id, those of rotated keys included."""
        query = "SELECT digest, name FROM digest JOIN name USING (id) WHERE digest.role = 'key' ORDER BY id"
        return {key_id.hex(): name for key_id, name in self.database.execute(query)}

    def body(self, number: int) -> dict[str, Any] | None:
        """Return the body of a record, read from its private half; None when it was erased."""
        query = "SELECT leaf, commitment FROM record WHERE id = ?"
        leaf, commitment = self.database.execute(query, (number,)).fetchone()
        private = self._private.read(number, leaf.hex())
        return None if private is None else body_of(private, commitment.hex())

    def _node(self, number: int, leaf: bytes, code: int, time_us: int, label: str | None) -> Node:
        kind = self.kinds[code]
        if kind in HEADER_ONLY and (body := self.body(number)) is not None:
            label = label_of_body(kind, body.get)
        return Node(number, leaf.hex(), kind, label, time_us)

    def _walk(
        self,
        starts: Iterable[int],
        neighbours: Callable[[Iterable[int]], Mapping[int, list[int]]],
        *,
        depth: int | None = None,
        until: set[int] | None = None,
    ) -> dict[int, int | None]:
        """Breadth first: every record within `depth` steps with the one it came from; stops at one of `until`."""
        came_from: dict[int, int | None] = dict.fromkeys(sorted(set(starts)))
        frontier, steps = list(came_from), 0
        while frontier and (depth is None or steps < depth) and not (until and until & came_from.keys()):
            near = neighbours(frontier)
            fresh = {other: number for number in frontier for other in near.get(number, ()) if other not in came_from}
            came_from.update(fresh)
            frontier, steps = list(fresh), steps + 1
        return came_from


def count(found: Mapping[str, Ids]) -> dict[str, int]:
    """Return how many records of each kind were found, the most first."""
    return dict(sorted(((kind, len(ids)) for kind, ids in found.items()), key=lambda item: (-item[1], item[0])))


def page_of(
    found: Mapping[str, Ids], *, kinds: Sequence[str] = (), limit: int, before: int | None = None
) -> tuple[list[int], int | None]:
    """Return the newest `limit` records numbered under `before`, of some kinds if given, and where the next page ends.

    The second is None when there is nothing more.
    """
    newest: list[int] = []
    for ids in (ids for kind, ids in found.items() if not kinds or kind in kinds):
        end = len(ids) if before is None else int(np.searchsorted(ids, before))
        newest += ids[max(0, end - limit - 1) : end].tolist()  # one more than a page tells whether there is another
    page = sorted(newest, reverse=True)[:limit]
    return page, page[-1] if len(newest) > limit else None


def _distinct(packed: bytes) -> Ids:
    """Packed numbers, each once and rising: marking them in a row of flags is faster than sorting them."""
    ids = np.frombuffer(packed, np.uint32)
    low = int(ids.min())
    flags = np.zeros(int(ids.max()) - low + 1, np.bool_)
    flags[ids - low] = True
    return (np.flatnonzero(flags) + low).astype(np.uint32)
