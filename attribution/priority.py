"""Who registered a row first: near-duplicates form clusters, and a cluster earns once, for its earliest registration.

Rows are taken in order of registration (the contribution's place in the log, then the line). A row that is like an
earlier first row joins its cluster, any other begins one: so no chain of small changes links unlike rows, and the
result does not depend on the order in which rows are given.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import ceil
from typing import Literal

from attribution.lookalikes import numbers, skeleton

SHINGLE = 5
"""Letters in a run: short enough that one changed word leaves most runs alone, long enough to be rare."""

Method = Literal["skeleton", "lexical", "semantic"]


@dataclass(frozen=True)
class RegisteredRow:
    """A row as registered: (role, content) of each message; leaf_index and line_number say when."""

    row_id: str
    contributor: str
    leaf_index: int
    line_number: int
    messages: tuple[tuple[str, str], ...]

    @property
    def order(self) -> tuple[int, int, str]:
        """Earlier rows come first."""
        return (self.leaf_index, self.line_number, self.row_id)

    @cached_property
    def skeletons(self) -> tuple[str, str]:
        """Skeleton of the whole row and of what the assistant says."""
        answer = "".join(skeleton(content) for role, content in self.messages if role == "assistant")
        return "".join(skeleton(content) for _, content in self.messages), answer

    @cached_property
    def key(self) -> bytes:
        """Equal for rows that read the same: roles and skeletons."""
        hasher = sha256()
        for role, content in self.messages:
            for part in (role, skeleton(content)):
                hasher.update(len(part.encode()).to_bytes(8, "big") + part.encode())
        return hasher.digest()


@dataclass(frozen=True)
class NearDuplicates:
    """How alike rows must be to earn once.

    skeleton: the same but for case, white space, punctuation, accents and look-alike letters.
    lexical: also a Jaccard similarity of letter runs of at least `lexical`, of whole row and of answer, with the same
        numbers: rows with some letters changed. A row that answers the same question otherwise is not one of them.
    semantic: also a cosine of at least `semantic` between TF-IDF vectors of letter runs: paraphrases that keep the rare
        words. It also takes different things said of one subject for one, so it is no default (docs/log.md).
    """

    method: Method = "lexical"
    lexical: float = 0.9
    semantic: float = 0.6


@dataclass(frozen=True)
class Cluster:
    """Rows that say the same, earliest registered first; `owner` registered that one."""

    owner: str
    row_ids: tuple[str, ...]


@dataclass(frozen=True)
class Priority:
    """first: row id -> id of the earliest row like it (its own, when it is that); owner: row id -> who earns by it."""

    first: dict[str, str]
    owner: dict[str, str]

    def clusters(self) -> tuple[Cluster, ...]:
        """Return the clusters of two rows or more, by first row id; rows in order of registration."""
        members: dict[str, list[str]] = defaultdict(list)
        for row_id, first in self.first.items():
            members[first].append(row_id)
        return tuple(
            Cluster(self.owner[first], tuple(members[first])) for first in sorted(members) if len(members[first]) > 1
        )


def prioritise(rows: Sequence[RegisteredRow], near: NearDuplicates = NearDuplicates()) -> Priority:
    """Return who earns by each row. Row ids are distinct."""
    ordered = sorted(rows, key=lambda row: row.order)
    earlier = _earlier_alike(ordered, near)
    first: list[int] = []
    for index, candidates in enumerate(earlier):
        leaders = [other for other in candidates if first[other] == other]
        first.append(min(leaders, default=index))
    ids = {row.row_id: ordered[first[index]].row_id for index, row in enumerate(ordered)}
    owners = {row.row_id: ordered[first[index]].contributor for index, row in enumerate(ordered)}
    return Priority(ids, owners)


def _earlier_alike(ordered: Sequence[RegisteredRow], near: NearDuplicates) -> list[set[int]]:
    """For each row the earlier rows that are like it."""
    alike: list[set[int]] = [set() for _ in ordered]
    by_key: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(ordered):
        alike[index].update(by_key[row.key][:1])  # the first of them: the others are in its cluster
        by_key[row.key].append(index)
    distinct = [places[0] for places in by_key.values()]
    if near.method != "skeleton":
        for later, one in _lexical_pairs([ordered[index] for index in distinct], near.lexical):
            alike[distinct[later]].add(distinct[one])
    if near.method == "semantic":
        from attribution.priority_semantic import semantic_pairs

        texts = [" ".join(content for _, content in ordered[index].messages) for index in distinct]
        for later, one in semantic_pairs(texts, near.semantic):
            alike[distinct[later]].add(distinct[one])
    for places in by_key.values():
        for index in places[1:]:
            alike[index] |= alike[places[0]]  # like whatever the first of its key is like
    return alike


def _lexical_pairs(rows: Sequence[RegisteredRow], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield (later, earlier) for rows with the same numbers and a Jaccard similarity of at least `threshold`.

    Exact: two sets can only be that similar when their prefixes, rarest runs first, share one.
    Source: Chaudhuri, Ganti, Kaushik (ICDE 2006), A primitive operator for similarity joins in data cleaning.
    """
    sets = [_shingles(row.skeletons[0]) for row in rows]
    counts: dict[str, int] = defaultdict(int)
    for shingles in sets:
        for shingle in shingles:
            counts[shingle] += 1
    index: dict[str, list[int]] = defaultdict(list)
    for later, shingles in enumerate(sets):
        rarest = sorted(shingles, key=lambda shingle: (counts[shingle], shingle))
        prefix = rarest[: len(rarest) - ceil(threshold * len(rarest)) + 1]
        candidates = {earlier for shingle in prefix for earlier in index[shingle]}
        for earlier in sorted(candidates):
            if _jaccard(sets[later], sets[earlier]) >= threshold and _same_answer(
                rows[later], rows[earlier], threshold
            ):
                yield later, earlier
        for shingle in prefix:
            index[shingle].append(later)


def _same_answer(row: RegisteredRow, other: RegisteredRow, threshold: float) -> bool:
    """Whether the answers are as similar as the rows, and no number differs."""
    answers = _jaccard(_shingles(row.skeletons[1]), _shingles(other.skeletons[1]))
    return answers >= threshold and _numbers(row) == _numbers(other)


def _numbers(row: RegisteredRow) -> tuple[str, ...]:
    return numbers(" ".join(content for _, content in row.messages))


def _shingles(text: str) -> frozenset[str]:
    """The runs of SHINGLE letters; a shorter text is one run."""
    return frozenset(text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1)))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
