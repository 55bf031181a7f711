"""Where a record comes from and what came of it: the graph whose edges are the leaves' `parents`.

Here the graph is of records, by leaf hash; `attribution.lineage_queries` asks it by the names that people hold. Both
read one index, which comes from public headers and stays whole when records are erased.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from attribution.lineage_facts import label_of_body
from attribution.lineage_graph import Ids, LineageGraph
from attribution.lineage_index import LineageIndex
from attribution.log.facts import utc
from attribution.log.verify import RECORD_BUNDLE_TYPE
from attribution.records import to_plain

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

Result = TypeVar("Result")


class Lineage:
    """The graph of a trail's records; every call catches up with the log."""

    def __init__(self, trail: "Trail") -> None:
        self._trail = trail
        self._index = LineageIndex(trail.home, trail.log.key)

    def ancestors(self, leaf_hash: str) -> list["Entry"]:
        """Return every record that `leaf_hash` was made from, directly or not, in log order."""
        start = self._number(leaf_hash)
        return self._entries(self.ask(lambda graph: graph.up([start]).keys() - {start}))

    def descendants(self, leaf_hash: str) -> list["Entry"]:
        """Return every record made from `leaf_hash`, directly or not, in log order."""
        start = self._number(leaf_hash)
        return self._entries(self.ask(lambda graph: _all(graph.down([start]))))

    def path(self, ancestor: str, descendant: str) -> list["Entry"]:
        """Return a shortest chain of records from `ancestor` to `descendant`, both included; empty if there is none."""
        first, last = self._number(ancestor), self._number(descendant)
        return [self._trail.entry(number) for number in self.ask(lambda graph: graph.path([first], [last]))]

    def graph(self, leaf_hash: str, depth: int | None = None) -> dict[str, list[dict[str, Any]]]:
        """Return the ancestors and descendants of a record, and itself, as JSON.

        {"nodes": [{"id", "kind", "label", "time_us", "contributors", "facts"}], "edges": [{"from", "to"}]}: an id is a
        leaf hash, an edge runs from parent to child, `contributors` are key ids, `facts` the record's body. `depth`
        limits the number of steps either way.
        """
        start = self._number(leaf_hash)

        def reached(graph: LineageGraph) -> set[int]:
            below = _all(graph.down([start])) if depth is None else set(graph.down_steps([start], depth=depth))
            return below | set(graph.up([start], depth=depth))

        entries = self._entries(self.ask(reached))
        nodes = [_node(entry) for entry in entries]
        shown = {node["id"] for node in nodes}
        edges = [
            {"from": parent, "to": entry.leaf_hash}
            for entry in entries
            for parent in entry.leaf.parents
            if parent in shown
        ]
        return {"nodes": nodes, "edges": edges}

    def closure(self, leaf_hashes: Iterable[str]) -> list[str]:
        """Return the given leaf hashes and all their ancestors, each once, in log order."""
        starts = [self._number(leaf_hash) for leaf_hash in leaf_hashes]
        return self.ask(lambda graph: graph.leaf_hashes(graph.up(starts)))

    def contributor_names(self) -> dict[str, str]:
        """Return the name of each contributor by key id."""
        return self.ask(lambda graph: graph.contributor_names())

    def ask(self, question: Callable[[LineageGraph], Result]) -> Result:
        """Return what `question` finds in the graph as it is now."""
        return self._index.ask(lambda database: question(LineageGraph(self._index, database)))

    def _number(self, leaf_hash: str) -> int:
        """The log index of a leaf hash. TrailError when it is not in the log."""
        return self._trail.entry_index(leaf_hash)

    def _entries(self, numbers: Iterable[int]) -> list["Entry"]:
        return [self._trail.entry(number) for number in sorted(numbers)]


def record_bundle(trail: "Trail", leaf_hash: str) -> dict[str, Any]:
    """Return a record's offline proof with those of its ancestors: a contributor's key is proven by its record."""
    from attribution.notices import prove_with_notices

    ancestors = [leaf for leaf in Lineage(trail).closure([leaf_hash]) if leaf != leaf_hash]
    (record, *lineage), notices = prove_with_notices(trail, [leaf_hash, *ancestors])
    return {"type": RECORD_BUNDLE_TYPE, "record": record, "lineage": lineage, **notices}


def _all(found: Mapping[str, Ids]) -> set[int]:
    return {number for ids in found.values() for number in ids.tolist()}


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
        body = entry.record.body
        return label_of_body(entry.leaf.kind, lambda name: getattr(body, name, None))
    if entry.erasure is None:
        return f"{entry.leaf.kind} (erased)"
    return f"{entry.leaf.kind} (erased on {utc(entry.erasure.time_us)[:10]} because: {entry.erasure.reason})"
