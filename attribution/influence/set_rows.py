"""Which training rows the answers of a query set rest on: the explain tier's exact best over all of them at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.erasure import remaining
from attribution.evidence import resampled_mean
from attribution.influence.answer import ExamplePart
from attribution.influence.audit import Asked
from attribution.influence.bm25 import WordMatches
from attribution.influence.question import OpenStores, set_question
from attribution.influence.rows import ShardsElsewhere
from attribution.influence.scores import TINY
from attribution.influence.store import Trace
from attribution.influence.topk import top_of_set
from attribution.influence.who import NO_TRACE, OTHER_WEIGHTS, ExplainError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from attribution.answers import Resampling
    from attribution.influence.gradient_store import GradientStore
    from attribution.influence.query import AdapterModels
    from attribution.influence.scores import Normalise
    from attribution.influence.topk import Hit
    from attribution.trail import Trail

CAVEAT = "scores rank rows; they are no shares of a gain, and how firm one is is told over the queries only"


@dataclass(frozen=True)
class SetRows:
    """The rows of the highest mean score over a query set, of `num_rows` that the store holds.

    Intervals are over the queries, None for one query.
    """

    question: str
    adapter: str
    adapter_name: str
    trace: str
    num_queries: int
    num_rows: int
    method: str
    unit: str
    confidence: float
    seed: int
    rows: tuple[ExamplePart, ...]
    caveat: str = CAVEAT

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def rows_behind(
    trail: "Trail",
    asked: Asked,
    *,
    num_rows: int,
    resampling: "Resampling",
    normalise: "Normalise" = "cosine",
    models: "AdapterModels | None" = None,
) -> SetRows:
    """Return the `num_rows` training rows of the highest mean score over a query set's answers.

    Raises:
        ExplainError: the adapter has no trace, or its weights are not those of its trace.
        GradientStoreError: its trace has no gradient store, or an altered one.
        ShardsElsewhere: shards of it lie on other machines.
    """
    from attribution.influence.query import AdapterModels

    models = models or AdapterModels()
    digest = remaining(trail, str(trail.store.manifest(asked.adapter).meta.get("trace") or ""))
    if not digest or not trail.store.has(digest):
        raise ExplainError(f"adapter {asked.adapter_name}: {NO_TRACE}")
    store, trace = OpenStores(trail).get(digest), Trace(trail.store.get_directory(digest, verify=False))
    if elsewhere := [shard.name for shard in store.shards if not shard.is_here]:
        raise ShardsElsewhere.of(digest, elsewhere)
    base, adapter = (models.folder(trail.store, one) for one in (asked.base, asked.adapter))
    if not models.is_own(trace, adapter):
        raise ExplainError(f"adapter {asked.adapter_name}: {OTHER_WEIGHTS}")
    queries = asked.question.queries
    question = set_question(trace, store, queries, models=models, base=base, adapter=adapter, normalise=normalise)
    hits, scores = top_of_set(store, question, k=num_rows)
    if normalise == "cosine":  # without a unit, since lengths are plain gradients'; made readable
        scores = scores / max(_mean_exposure(store), TINY)
    return SetRows(
        asked.question.name,
        asked.adapter,
        asked.adapter_name,
        digest,
        len(queries),
        len(store.ids()),
        f"gradient-store/v1: exact over all rows, {store.preconditioner}, normalise={normalise}",
        "score" if normalise == "cosine" else "nats",
        resampling.confidence,
        resampling.seed,
        _parts(trail, trace, hits, scores, text=_text(base, queries), resampling=resampling),
    )


def _parts(
    trail: "Trail",
    trace: Trace,
    hits: "Sequence[Hit]",
    scores: "NDArray[np.float64]",
    *,
    text: str,
    resampling: "Resampling",
) -> tuple[ExamplePart, ...]:
    """Return the rows hit, with each one's scores by query [k, q] and what word search for `text` says of it."""
    from attribution.lineage import Lineage

    words = WordMatches.of(trace.examples, text)
    places = words.places({hit.example_id for hit in hits})
    by_id, names = {one.example_id: one for one in trace.examples}, dict(Lineage(trail).contributor_names())
    rows = []
    for hit, of_queries in zip(hits, scores, strict=True):
        example, spread = by_id[hit.example_id], resampled_mean(of_queries, **asdict(resampling))
        low, high = (spread.low, spread.high) if len(of_queries) > 1 else (None, None)
        name, (words_score, place) = names.get(example.contributor, example.contributor[:12]), places[hit.example_id]
        rows.append(
            ExamplePart(
                hit.example_id,
                example.contributor,
                name,
                spread.value,
                low,
                high,
                example.text,
                bm25=words_score,
                bm25_rank=place,
            )
        )
    return tuple(rows)


def _mean_exposure(store: "GradientStore") -> float:
    return float(np.concatenate([shard.weights[shard.live].sum(axis=1) for shard in store.shards]).mean())


def _text(base: Any, queries: "Sequence[Any]") -> str:
    """Return what the queries say, for the word search beside the scores."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in queries)
