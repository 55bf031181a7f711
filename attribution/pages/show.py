"""A record's lineage for people: which record a name means, the graph around it, and that graph as a page."""

from typing import Any

from attribution.lineage import Lineage
from attribution.lineage_graph import LineageGraph
from attribution.lineage_layout import LineageError
from attribution.lineage_queries import LineageQueries
from attribution.pages.lineage import lineage_html, page_graph
from attribution.pages.proofs import page_proofs
from attribution.trail import Entry, Trail

# What came of a record belongs on its page: how it was measured and named, and, of the many answers, the newest.
CONSEQUENCES = frozenset({"dataset", "refinement", "adapter", "benchmark", "publication", "approval", "settlement"})
NEWEST_OF = {"completions": 3, "influence": 3}


def find_entry(trail: Trail, reference: str) -> Entry:
    """Return the record that a name, `name@version`, digest, key id or the start of a leaf hash means.

    Raises:
        LineageError: none (with the nearest there is), or several.
    """
    found = LineageQueries.of(trail).resolve(reference)
    if found.is_part or len(found.above) != 1:
        raise LineageError(f"{reference!r}: {found.title}, which is no single record; `trailmark lineage ancestors`")
    return trail.entry(found.above[0])


class LineagePages:
    """Draws pages of one trail; keeps the nodes it has read, for records never change (but see `forget`)."""

    def __init__(self, trail: Trail, lineage: Lineage | None = None) -> None:
        self._trail = trail
        self._lineage = lineage or Lineage(trail)
        self._nodes: dict[str, dict[str, Any]] = {}
        operator = {trail.keys.get("operator").key_id: "operator of this trail"} if trail.keys.has("operator") else {}
        self._names: dict[str, str] = operator

    def page(self, leaf_hash: str) -> str:
        """Return the self-contained page of a record's lineage."""
        graph = page_graph(self.neighbourhood(leaf_hash), focus=leaf_hash)
        focus = next(node for node in graph["nodes"] if node["id"] == leaf_hash)
        title = f"Lineage of {focus['kind'].replace('_', ' ')} {focus['label']}"
        names = {**self._names, **self._lineage.contributor_names()}
        return lineage_html(graph, page_proofs(self._trail, graph["nodes"]), focus=leaf_hash, title=title, names=names)

    def neighbourhood(self, leaf_hash: str) -> dict[str, Any]:
        """Return the graph of a record, its ancestors and what came of it; of answers, which may be many, the newest.

        Which records those are is asked of the index; only they are then opened.
        """
        hashes, parents = self._lineage.ask(lambda graph: _shown(graph, leaf_hash))
        edges = [
            {"from": hashes[up], "to": leaf}
            for number, leaf in hashes.items()
            for up in parents[number]
            if up in hashes
        ]
        return {"nodes": [self._node(leaf) for leaf in hashes.values()], "edges": edges}

    def forget(self, leaf_hash: str) -> None:
        """Read a record anew next time: it was erased."""
        self._nodes.pop(leaf_hash, None)

    def _node(self, leaf_hash: str) -> dict[str, Any]:
        if leaf_hash not in self._nodes:
            self._nodes[leaf_hash] = self._lineage.graph(leaf_hash, depth=0)["nodes"][0]
        return self._nodes[leaf_hash]


def _shown(graph: LineageGraph, leaf_hash: str) -> tuple[dict[int, str], dict[int, list[int]]]:
    """Leaf hashes of what is on a record's page, in log order, and the parents of each, by number."""
    number = graph.number(leaf_hash)
    if number is None:
        raise LineageError(f"leaf {leaf_hash}: not in the log")
    shown = set(graph.up([number]))
    for kind, ids in graph.down([number]).items():
        if kind in CONSEQUENCES:
            shown.update(ids.tolist())
        elif kind in NEWEST_OF:
            shown.update(ids[-NEWEST_OF[kind] :].tolist())
    ordered = sorted(shown)
    return dict(zip(ordered, graph.leaf_hashes(ordered), strict=True)), graph.parents(ordered)
