"""A record's lineage for people: which record a name means, the graph around it, and that graph as a page."""

import re
from typing import Any

from attribution.lineage import Lineage
from attribution.pages.lineage import lineage_html, page_graph
from attribution.pages.proofs import page_proofs
from attribution.trail import Entry, Trail
from configs.errors import UserError

LEAF_PREFIX = re.compile(r"[0-9a-f]{8,64}")
# What came of a record belongs on its page: how it was measured and named, and, of the many answers, the newest.
CONSEQUENCES = frozenset({"dataset", "refinement", "adapter", "benchmark", "publication", "approval"})
NEWEST_OF = {"completions": 3, "influence": 3}


class LineageError(UserError):
    """A name, digest or leaf hash that stands for no record, or for several."""


def find_entry(trail: Trail, reference: str) -> Entry:
    """Return the record that `name@version`, a published or recorded name, a digest, or the start of a leaf hash means.

    Raises:
        LineageError: none, or several leaves that begin so.
    """
    if reference.startswith("sha256:"):
        found = trail.find(reference)
        if found is None:
            raise LineageError(f"digest {reference}: no record made it; `trailmark log show` lists the records")
        return found
    if LEAF_PREFIX.fullmatch(reference):
        matches = [leaf_hash for _, leaf_hash, _ in trail.leaves() if leaf_hash.startswith(reference)]
        if len(matches) > 1:
            raise LineageError(f"leaf {reference}: {len(matches)} records begin so; give more of its digits")
        if matches:
            return trail.entry(matches[0])
    return _named(trail, reference)


def _named(trail: Trail, reference: str) -> Entry:
    name, _, version = reference.partition("@")
    published = [item for item in trail.registry.list() if item.name == name]
    if version or published:
        resolved = trail.registry.resolve(reference)
        return trail.find(resolved.digest) or trail.entry(resolved.leaf_hash)
    newest = None
    for entry in trail.entries():
        if entry.record is not None and getattr(entry.record.body, "name", None) == reference:
            newest = entry
    if newest is None:
        raise LineageError(
            f"name {reference!r}: no record has it; "
            "give NAME, NAME@VERSION, a digest or a leaf hash (`trailmark log show`)"
        )
    return newest


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

        Which records those are is read from the leaves' headers alone; only they are then opened.
        """
        headers = {leaf: header for _, leaf, header in self._trail.leaves()}
        shown = {leaf_hash}
        queue = [leaf_hash]
        while queue:
            parents = [parent for parent in headers[queue.pop()].parents if parent not in shown]
            shown.update(parents)
            queue.extend(parents)
        reached = {leaf_hash}
        newest: dict[str, list[str]] = {kind: [] for kind in NEWEST_OF}
        for leaf, header in headers.items():  # in log order: parents come first
            if reached.isdisjoint(header.parents):
                continue
            reached.add(leaf)
            if header.kind in CONSEQUENCES:
                shown.add(leaf)
            elif header.kind in NEWEST_OF:
                newest[header.kind].append(leaf)
        shown.update(leaf for kind, number in NEWEST_OF.items() for leaf in newest[kind][-number:])
        nodes = [self._node(leaf) for leaf in headers if leaf in shown]
        edges = [
            {"from": up, "to": leaf} for leaf in headers if leaf in shown for up in headers[leaf].parents if up in shown
        ]
        return {"nodes": nodes, "edges": edges}

    def forget(self, leaf_hash: str) -> None:
        """Read a record anew next time: it was erased."""
        self._nodes.pop(leaf_hash, None)

    def _node(self, leaf_hash: str) -> dict[str, Any]:
        if leaf_hash not in self._nodes:
            self._nodes[leaf_hash] = self._lineage.graph(leaf_hash, depth=0)["nodes"][0]
        return self._nodes[leaf_hash]
