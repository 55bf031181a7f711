"""Where a record comes from and what came of it: the graph whose edges are the leaves' `parents`.

The graph is read from public headers alone, so it stays whole when records are erased.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attribution.bodies import (
    AdapterLoadedBody,
    Body,
    CompletionsBody,
    ContributorBody,
    InfluenceBody,
    KeyRevocationBody,
    KeyRotationBody,
    PublicationBody,
    RedactionBody,
    RowRedactionBody,
)
from attribution.log.facts import utc
from attribution.log.verify import RECORD_BUNDLE_TYPE
from attribution.records import to_plain

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

Neighbours = Mapping[str, Sequence[str]]


class Lineage:
    """The graph of a trail's records; every call catches up with the log."""

    def __init__(self, trail: "Trail") -> None:
        self._trail = trail
        self._parents: dict[str, tuple[str, ...]] = {}
        self._children: dict[str, list[str]] = {}
        self._names: dict[str, str] = {}
        self._cursor = 0

    def ancestors(self, leaf_hash: str) -> list["Entry"]:
        """Return every record that `leaf_hash` was made from, directly or not, in log order."""
        self._catch_up()
        return self._entries(_reach(leaf_hash, self._parents).keys() - {self._known(leaf_hash)})

    def descendants(self, leaf_hash: str) -> list["Entry"]:
        """Return every record made from `leaf_hash`, directly or not, in log order."""
        self._catch_up()
        return self._entries(_reach(leaf_hash, self._children).keys() - {self._known(leaf_hash)})

    def path(self, ancestor: str, descendant: str) -> list["Entry"]:
        """Return a shortest chain of records from `ancestor` to `descendant`, both included; empty if there is none."""
        self._catch_up()
        came_from = _reach(self._known(ancestor), self._children)
        if self._known(descendant) not in came_from:
            return []
        chain: list[str] = []
        step: str | None = descendant
        while step is not None:
            chain.append(step)
            step = came_from[step]
        return [self._trail.entry(leaf) for leaf in reversed(chain)]

    def graph(self, leaf_hash: str, depth: int | None = None) -> dict[str, list[dict[str, Any]]]:
        """Return the ancestors and descendants of a record, and itself, as JSON.

        {"nodes": [{"id", "kind", "label", "time_us", "contributors", "facts"}], "edges": [{"from", "to"}]}: an id is a
        leaf hash, an edge runs from parent to child, `contributors` are key ids, `facts` the record's body. `depth`
        limits the number of steps either way.
        """
        self._catch_up()
        self._known(leaf_hash)
        reached = {**_reach(leaf_hash, self._parents, depth), **_reach(leaf_hash, self._children, depth)}
        nodes = [_node(entry) for entry in self._entries(reached)]
        edges = [
            {"from": parent, "to": node["id"]}
            for node in nodes
            for parent in self._parents[node["id"]]
            if parent in reached
        ]
        return {"nodes": nodes, "edges": edges}

    def closure(self, leaf_hashes: Iterable[str]) -> list[str]:
        """Return the given leaf hashes and all their ancestors, each once, in log order."""
        self._catch_up()
        reached = {leaf for start in leaf_hashes for leaf in _reach(self._known(start), self._parents)}
        return sorted(reached, key=lambda leaf: self._trail.entry_index(leaf))

    def contributor_names(self) -> dict[str, str]:
        """Return the name of each contributor by key id, those of rotated keys included."""
        self._catch_up()
        return dict(self._names)

    def _catch_up(self) -> None:
        for index, leaf_hash, leaf in self._trail.leaves(start=self._cursor):
            self._parents[leaf_hash] = leaf.parents
            self._children.setdefault(leaf_hash, [])
            for parent in leaf.parents:
                self._children[parent].append(leaf_hash)
            if leaf.kind in ("contributor", "key_rotation"):
                record = self._trail.entry(index).record
                if record is not None and isinstance(record.body, ContributorBody | KeyRotationBody):
                    self._names[record.body.key_id] = record.body.name
            self._cursor = index + 1

    def _known(self, leaf_hash: str) -> str:
        if leaf_hash not in self._parents:
            self._trail.entry(leaf_hash)  # raises the error that says so
        return leaf_hash

    def _entries(self, leaf_hashes: Iterable[str]) -> list["Entry"]:
        return sorted((self._trail.entry(leaf) for leaf in leaf_hashes), key=lambda entry: entry.index)


def record_bundle(trail: "Trail", leaf_hash: str) -> dict[str, Any]:
    """Return a record's offline proof with those of its ancestors: a contributor's key is proven by its record."""
    from attribution.notices import prove_with_notices

    ancestors = [leaf for leaf in Lineage(trail).closure([leaf_hash]) if leaf != leaf_hash]
    (record, *lineage), notices = prove_with_notices(trail, [leaf_hash, *ancestors])
    return {"type": RECORD_BUNDLE_TYPE, "record": record, "lineage": lineage, **notices}


def _reach(start: str, neighbours: Neighbours, depth: int | None = None) -> dict[str, str | None]:
    """Every node within `depth` steps of `start` with the node it was first reached from, breadth first."""
    came_from: dict[str, str | None] = {start: None}
    frontier, steps = [start], 0
    while frontier and (depth is None or steps < depth):
        found: list[str] = []
        for node in frontier:
            fresh = [neighbour for neighbour in neighbours[node] if neighbour not in came_from]
            came_from.update(dict.fromkeys(fresh, node))
            found.extend(dict.fromkeys(fresh))
        frontier, steps = found, steps + 1
    return came_from


def _node(entry: "Entry") -> dict[str, Any]:
    record = entry.record
    facts = _hole(entry) if record is None else to_plain(record.body, entry.leaf.kind)
    return {
        "id": entry.leaf_hash,
        "kind": entry.leaf.kind,
        "label": label_of(entry),
        "time_us": entry.leaf.time_us,
        "contributors": [] if record is None else [party.key_id for party in record.contributors],
        "facts": facts,
    }


def _hole(entry: "Entry") -> dict[str, Any]:
    """What is left to say of an erased record."""
    if entry.erasure is None:
        return {"erased": True}
    return {"erased": utc(entry.erasure.time_us), "reason": entry.erasure.reason, "redaction": entry.erasure.leaf_hash}


def label_of(entry: "Entry") -> str:
    """Return a few words that tell a record from others of its kind."""
    if entry.record is not None:
        return _label(entry.record.body)
    if entry.erasure is None:
        return f"{entry.leaf.kind} (erased)"
    return f"{entry.leaf.kind} (erased on {utc(entry.erasure.time_us)[:10]} because: {entry.erasure.reason})"


def _label(body: Body) -> str:
    match body:
        case PublicationBody():
            return f"{body.name}@{body.version}"
        case CompletionsBody():
            return f"{body.count} completion{'' if body.count == 1 else 's'}"
        case AdapterLoadedBody():
            return f"loaded by {body.replica}"
        case InfluenceBody():
            return body.receipt_id
        case KeyRotationBody():
            return f"key of {body.name} rotated"
        case KeyRevocationBody():
            return f"key of {body.name} revoked: {body.reason}"
        case RedactionBody() | RowRedactionBody():
            return f"erased: {body.reason}"
    for name in ("name", "workflow", "subject", "decision", "reason"):
        if text := getattr(body, name, ""):
            return str(text)
    return type(body).__name__.removesuffix("Body").lower()
