"""Which examples score highest for a completion or a query set: exact, over any number of shards, merged.

Shape legend: c views asked, q queries, n examples of a shard, d numbers in a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attribution.influence.rows import shard_dots, view_corrections
from attribution.influence.scores import TINY, Normalise

if TYPE_CHECKING:
    from attribution.influence.gradient_store import GradientStore
    from attribution.influence.shard import Shard


@dataclass(frozen=True)
class Hit:
    """An example and its score; hits are listed best first, ties by example id."""

    example_id: str
    score: float


@dataclass(frozen=True)
class Asked:
    """A question to a store: float32 rows [c, q, d] of q queries at the named views.

    A query set asked as one is one query: the sum of its members' rows. Views that are not asked lend their exposure to
    the nearest one that is: asking the last checkpoint alone costs one forward and one backward.
    """

    views: tuple[str, ...]
    rows: NDArray[np.float32]
    normalise: Normalise = "cosine"

    @property
    def num_queries(self) -> int:
        return self.rows.shape[1]


def top_examples(
    store: "GradientStore",
    asked: Asked,
    *,
    k: int,
    shards: Sequence[str] | None = None,
    device: str = "cpu",
) -> tuple[tuple[Hit, ...], ...]:
    """Return the k best examples of each query among some shards, by default all that are on this machine.

    Semantics: score[q, i] = sum over views of
    - "none": correction w[c, i] <q[c], h[c, i]>, in nats (see `scores.score_parts`);
    - "cosine": w[c, i] <q[c], h[c, i]> / (|q[c]| |h[c, i]|).
    The same question gives the same answer to the last bit, however shards are divided.
    """
    found = []
    for shard in _shards(store, shards):
        found.append([_best(row, shard, k) for row in _scores(store, asked, shard, device=device)])
    return tuple(merge((part[query] for part in found), k=k) for query in range(asked.num_queries))


def top_of_set(store: "GradientStore", asked: Asked, *, k: int) -> tuple[tuple[Hit, ...], NDArray[np.float64]]:
    """Return the k examples of the highest mean score over the queries, and each query's score of them [k, q].

    Semantics of a score: see `top_examples`. All shards must be on this machine.
    """
    hits: list[list[Hit]] = []
    columns: dict[str, NDArray[np.float64]] = {}
    for shard in _shards(store, None):
        scores = _scores(store, asked, shard)
        best = _best(scores.mean(axis=0), shard, k)
        place = {shard.ids[row]: column for column, row in enumerate(shard.live)}
        columns |= {hit.example_id: scores[:, place[hit.example_id]] for hit in best}
        hits.append(best)
    merged = merge(hits, k=k)
    return merged, np.array([columns[hit.example_id] for hit in merged]).reshape(len(merged), asked.num_queries)


def _scores(store: "GradientStore", asked: Asked, shard: "Shard", *, device: str = "cpu") -> NDArray[np.float64]:
    """Return [q, n] of a shard's live examples; see `top_examples`."""
    corrections = view_corrections(store)
    scores = np.zeros((asked.num_queries, shard.num_live))
    weights = exposure(store, shard, asked.views)
    for index, view in enumerate(asked.views):
        dots, lengths = shard_dots(shard, view, asked.rows[index], device=device)
        if asked.normalise == "none":
            scores += dots * (weights[:, index] * corrections[store.views.index(view)])
        else:
            asked_lengths = np.linalg.norm(asked.rows[index].astype(np.float64), axis=1)[:, None]
            cosines = dots / np.maximum(asked_lengths * lengths, TINY)
            scores += cosines * weights[:, index]
    return scores


def merge(parts: Iterable[Sequence[Hit]], *, k: int) -> tuple[Hit, ...]:
    """Return the k best of several lists of hits."""
    return tuple(sorted((hit for part in parts for hit in part), key=_order)[:k])


def exposure(store: "GradientStore", shard: "Shard", views: Sequence[str]) -> NDArray[np.float64]:
    """Return float64 [n, c]: what the asked views stand for, each taking over those that it is nearest to."""
    asked = np.asarray([int(view) for view in views])
    weights = np.zeros((shard.num_live, len(views)))
    for column, view in enumerate(store.views):
        weights[:, np.abs(asked - int(view)).argmin()] += shard.weights[shard.live, column]
    return weights


def _shards(store: "GradientStore", names: Sequence[str] | None) -> list["Shard"]:
    wanted = None if names is None else set(names)
    return [
        shard for shard in store.shards if shard.is_here and shard.num_live and (wanted is None or shard.name in wanted)
    ]


def _best(scores: NDArray[np.float64], shard: "Shard", k: int) -> list[Hit]:
    if len(scores) > k:
        # All that tie with the k-th stay in, so that the order by id decides, not the partition.
        kth = np.partition(scores, len(scores) - k)[len(scores) - k]
        columns = np.flatnonzero(scores >= kth)
    else:
        columns = np.arange(len(scores))
    live = shard.live
    return sorted((Hit(shard.ids[live[column]], float(scores[column])) for column in columns), key=_order)[:k]


def _order(hit: Hit) -> tuple[float, str]:
    return (-hit.score, hit.example_id)
