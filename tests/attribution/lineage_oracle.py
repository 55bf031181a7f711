"""The graph of parents in plain dictionaries, read leaf by leaf: the oracle of the lineage index."""

from collections.abc import Iterable, Mapping, Sequence

from attribution.trail import Trail

Neighbours = Mapping[str, Sequence[str]]


class PlainGraph:
    """Every parent and child of every leaf hash, as the log has them now."""

    def __init__(self, trail: Trail) -> None:
        self.kinds: dict[str, str] = {}
        self.parents: dict[str, tuple[str, ...]] = {}
        self.children: dict[str, list[str]] = {}
        for _, leaf_hash, leaf in trail.leaves():
            self.kinds[leaf_hash] = leaf.kind
            self.parents[leaf_hash] = leaf.parents
            self.children[leaf_hash] = []
            for parent in leaf.parents:
                self.children[parent].append(leaf_hash)

    def ancestors(self, starts: Iterable[str]) -> set[str]:
        """Every leaf hash above the starts; a start only if it is above another one."""
        return set().union(*(reach(start, self.parents).keys() - {start} for start in starts))

    def descendants(self, starts: Iterable[str]) -> set[str]:
        """Every leaf hash below the starts; a start only if it is below another one."""
        return set().union(*(reach(start, self.children).keys() - {start} for start in starts))

    def distance(self, ancestor: str, descendant: str) -> int | None:
        """Steps of a shortest chain, None without one."""
        came_from = reach(ancestor, self.children)
        if descendant not in came_from:
            return None
        steps, at = 0, came_from[descendant]
        while at is not None:
            steps, at = steps + 1, came_from[at]
        return steps


def reach(start: str, neighbours: Neighbours, depth: int | None = None) -> dict[str, str | None]:
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
