"""Lineage by the names that people hold: what a thing was made from, what came of it, the way between two.

Every answer counts all it found and shows a page of it, the newest first; `before` is where the next page ends.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from attribution.bodies import KINDS
from attribution.lineage_graph import EMPTY, Ids, LineageGraph, Node, count, page_of
from attribution.lineage_index import LineageIndex
from attribution.lineage_layout import LineageError, UnknownThing
from attribution.lineage_names import RECEIPT, Reference, candidates, resolve_name, row_digits
from attribution.receipts import ID_PREFIX, DamagedTable, ReceiptError, find_receipt
from attribution.store import Store

if TYPE_CHECKING:
    from attribution.trail import Trail

AFFECTED_KINDS = ("adapter", "completions")
DEFAULT_LIMIT, MAX_LIMIT = 50, 1000
MaySee = Callable[[str], bool]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """A record of a page. For an adapter its published names and how many batches of completions it took part in; for
    a batch of completions the receipts in it that the thing asked about has a part in.
    """

    index: int
    leaf_hash: str
    kind: str
    label: str | None
    time_us: int
    names: tuple[str, ...] = ()
    num_batches: int | None = None
    receipts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was found: counts of all by kind, a page of it, and where the next page ends (None: there is no more)."""

    question: str
    subject: Reference
    counts: dict[str, int]
    items: tuple[Item, ...]
    before: int | None

    @property
    def total(self) -> int:
        """Number of records found."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "question": self.question,
            "subject": _subject(self.subject),
            "total": self.total,
            "counts": self.counts,
            "items": [_plain(item) for item in self.items],
            "next_before": self.before,
        }


@dataclass(frozen=True)
class Path:
    """A shortest chain from an ancestor to a descendant, both included; empty when neither leads to the other."""

    ancestor: Reference
    descendant: Reference
    items: tuple[Item, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        items = [_plain(item) for item in self.items]
        return {"from": _subject(self.ancestor), "to": _subject(self.descendant), "items": items}


class LineageQueries:
    """Asks one home's index. `open_trail` is called when a receipt id is looked up, which takes the receipts' index."""

    def __init__(self, index: LineageIndex, *, open_trail: "Callable[[], Trail]") -> None:
        self._index, self._open_trail = index, open_trail

    @classmethod
    def of(cls, trail: "Trail") -> "LineageQueries":
        """Return the queries of a trail that is open."""
        return cls(LineageIndex(trail.home, trail.log.key), open_trail=lambda: trail)

    @cached_property
    def _trail(self) -> "Trail":
        return self._open_trail()

    def resolve(self, text: str) -> Reference:
        """Return what a text means. LineageError with the nearest there is when that is nothing, or several things."""
        if text.startswith(ID_PREFIX):
            return self._receipt(text)
        found = self.ask(lambda graph: resolve_name(graph, text)) or self._row(text)
        if found is None:
            near = self.ask(lambda graph: candidates(graph, text))
            hint = f"did you mean {', '.join(near)}?" if near else "`trailmark log show` lists the records"
            raise UnknownThing(f"{text!r}: no record, name, digest, receipt or row; {hint}")
        return found

    def ancestors(
        self,
        thing: str | Reference,
        *,
        kinds: Sequence[str] = (),
        limit: int = DEFAULT_LIMIT,
        before: int | None = None,
    ) -> Answer:
        """Return what a thing was made from, directly or not."""
        subject = self._subject(thing)

        def found(graph: LineageGraph) -> dict[str, Ids]:
            reached = graph.up(subject.above).keys()
            return graph.by_kind(reached if subject.is_part else reached - set(subject.above))

        return self._answer("ancestors", subject, found, kinds, limit, before)

    def descendants(
        self,
        thing: str | Reference,
        *,
        kinds: Sequence[str] = (),
        limit: int = DEFAULT_LIMIT,
        before: int | None = None,
    ) -> Answer:
        """Return what came of a thing, directly or not."""
        subject = self._subject(thing)
        return self._answer("descendants", subject, lambda graph: below(graph, subject), kinds, limit, before)

    def impact(
        self,
        thing: str | Reference,
        *,
        kinds: Sequence[str] = AFFECTED_KINDS,
        limit: int = DEFAULT_LIMIT,
        before: int | None = None,
        may_see: MaySee = lambda tenant: True,
    ) -> Answer:
        """Return which adapters and completions descend from a row, contributor, rule, prompt or any other thing.

        As `descendants`, with each adapter's names and, of each batch of completions, the receipts concerned of those
        tenants that `may_see` allows.
        """
        subject = self._subject(thing)
        return self._answer(
            "impact", subject, lambda graph: below(graph, subject), kinds, limit, before, may_see=may_see
        )

    def path(self, ancestor: str | Reference, descendant: str | Reference) -> Path:
        """Return a shortest chain of records from one thing to another."""
        first, last = self._subject(ancestor), self._subject(descendant)

        def chain(graph: LineageGraph) -> list[Node]:
            return graph.nodes(graph.path(first.below or first.above, last.above))

        return Path(first, last, tuple(Item(**asdict(node)) for node in self.ask(chain)))

    def _subject(self, thing: str | Reference) -> Reference:
        return self.resolve(thing) if isinstance(thing, str) else thing

    def _answer(
        self,
        question: str,
        subject: Reference,
        find: Callable[[LineageGraph], dict[str, Ids]],
        kinds: Sequence[str],
        limit: int,
        before: int | None,
        *,
        may_see: MaySee | None = None,
    ) -> Answer:
        if not 1 <= limit <= MAX_LIMIT:
            raise LineageError(f"limit {limit}: must be 1 to {MAX_LIMIT}; ask for the next page with `before`")

        def answer(graph: LineageGraph) -> Answer:
            self._check_kinds(graph, kinds)
            found = find(graph)
            page, following = page_of(found, kinds=kinds, limit=limit, before=before)
            nodes = graph.nodes(page)
            items = (
                tuple(Item(**asdict(node)) for node in nodes)
                if may_see is None
                else self._affected(graph, subject, found, nodes, may_see)
            )
            return Answer(question, subject, count(found), items, following)

        return self.ask(answer)

    def ask(self, question: Callable[[LineageGraph], Result], *, with_rows: bool = False) -> Result:
        """Return what `question` finds in the graph as it is now."""
        return self._index.ask(lambda database: question(LineageGraph(self._index, database)), with_rows=with_rows)

    def _row(self, text: str) -> Reference | None:
        digits = row_digits(text)
        if digits is None:
            return None
        from attribution.lineage_rows import resolve_row  # takes pyarrow, which takes a while

        return self.ask(lambda graph: resolve_row(graph, digits, text), with_rows=True)

    def _receipt(self, text: str) -> Reference:
        """A receipt stands on the adapter and base that answered it, not on all that its batch stands on."""
        try:
            stored = find_receipt(self._trail, text)
        except DamagedTable:
            raise
        except ReceiptError as error:  # several begin so
            raise LineageError(str(error)) from error
        if stored is None:
            raise UnknownThing(f"receipt {text!r}: not in the log, or its batch was erased; `trailmark log show`")
        receipt = stored.row.receipt

        def reference(graph: LineageGraph) -> Reference:
            batch = graph.number(stored.leaf_hash)
            assert batch is not None, "the receipts' index is never ahead of the log"
            makers = [
                graph.maker(receipt["base"]),
                receipt["adapter_record"] and graph.number(receipt["adapter_record"]),
            ]
            explained = graph.nodes(graph.children([batch]).get(batch, ()))
            return Reference(
                text=text,
                role=RECEIPT,
                title=f"receipt {receipt['id']} of {receipt['model']}",
                above=tuple(number for number in makers if number is not None),
                below=tuple(node.index for node in explained if node.label == receipt["id"]),
                is_part=True,
                tenant=receipt["tenant"],
            )

        return self.ask(reference)

    def _affected(
        self, graph: LineageGraph, subject: Reference, found: dict[str, Ids], nodes: Sequence[Node], may_see: MaySee
    ) -> tuple[Item, ...]:
        makers = {*found.get("adapter", EMPTY).tolist(), *subject.below}
        items = []
        for node in nodes:
            names: tuple[str, ...] = ()
            num_batches: int | None = None
            receipts: tuple[str, ...] = ()
            if node.kind == "adapter":
                published = graph.nodes(graph.children_of_kind(node.index, "publication"))
                names = tuple(one.label for one in published if one.label)
                num_batches = graph.num_children(node.index, "completions")
            elif node.kind == "completions":
                receipts = self._receipts(graph, node, makers, may_see)
            items.append(Item(**asdict(node), names=names, num_batches=num_batches, receipts=receipts))
        return tuple(items)

    def _receipts(self, graph: LineageGraph, batch: Node, makers: set[int], may_see: MaySee) -> tuple[str, ...]:
        """The receipts of a batch that one of `makers` (adapters and bases) answered; none when its table is gone."""
        body, store = graph.body(batch.index), Store(self._index.home / "store")
        if body is None or not store.has(body["table"]):
            return ()
        parents = graph.nodes(makers & set(graph.parents([batch.index])[batch.index]))
        adapters = {node.leaf_hash for node in parents if node.kind == "adapter"}
        bases = {node.index for node in parents if node.kind == "base_model"}
        receipts = [row["receipt"] for row in json.loads(store.get_blob(body["table"]))]
        return tuple(
            receipt["id"]
            for receipt in receipts
            if may_see(receipt["tenant"])
            and (receipt["adapter_record"] in adapters or (bases and graph.maker(receipt["base"]) in bases))
        )

    @staticmethod
    def _check_kinds(graph: LineageGraph, kinds: Sequence[str]) -> None:
        for kind in kinds:
            if kind not in KINDS and kind not in graph.kinds.values():
                near = get_close_matches(kind, KINDS, n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else f"kinds: {', '.join(KINDS)}"
                raise LineageError(f"kind {kind!r}: unknown; {hint}")


def below(graph: LineageGraph, subject: Reference) -> dict[str, Ids]:
    """Return all that descends from a thing; of a row, a rule or a receipt, what it begins at too."""
    found = graph.down(subject.below)
    if subject.is_part:
        for kind, ids in graph.by_kind(subject.below).items():
            found[kind] = np.union1d(found.get(kind, ids), ids)
    return found


def _subject(reference: Reference) -> dict[str, Any]:
    return {"text": reference.text, "role": reference.role, "title": reference.title}


def _plain(item: Item) -> dict[str, Any]:
    plain = asdict(item)
    if item.kind != "adapter":
        del plain["names"], plain["num_batches"]
    if item.kind != "completions":
        del plain["receipts"]
    return plain
