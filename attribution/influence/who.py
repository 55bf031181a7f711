"""Who made this answer: the adapter or the base, which contributors, which rows, and how firm that is.

Explains one receipted completion. What it promises is a ranking with its stability under reweighting, no causal claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from attribution.erasure import remaining
from attribution.influence.answer import (
    Attribution,
    BaselineExample,
    BaselineRank,
    ContributorPart,
    ExamplePart,
    Gain,
)
from attribution.influence.bm25 import Ranked, WordMatches, random_ranking
from attribution.influence.rows import ShardsElsewhere, StoreRows, TraceRows, rows_of, shards_elsewhere
from attribution.influence.scores import (
    Normalise,
    Share,
    bootstrap,
    bootstrap_mean,
    in_micros,
    interval,
    score_parts,
    split_shares,
    sum_by_contributor,
)
from attribution.influence.store import Trace
from attribution.store import StoreError
from configs.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from attribution.influence.query import AdapterModels, Completion
    from attribution.influence.residual import Residual
    from attribution.influence.store import TraceExample
    from attribution.influence.topk import Hit
    from attribution.records import Artefact
    from attribution.trail import Trail

LABEL = "stability"
NO_TRACE = "the adapter has no training trace, so its rows cannot be scored; its lineage still says who is behind it"
OTHER_WEIGHTS = (
    "the adapter's weights are not those its training trace ends with (merged, averaged or edited since), so its rows "
    "cannot be scored; the gain over the base is measured, BM25 names likely rows, its lineage who is behind it"
)
RANKED = (
    "the adapter's gradient store lies on several machines: its rows are ranked over all of it, contributors' shares "
    "need every shard on one"
)
MICRO = 1_000_000
MAX_TEXT_CHARS = 600
NUM_TOP_CONTRIBUTORS = 20
"""Contributors named in an influence record; the table behind it holds every example's score."""


class ExplainError(UserError):
    """The receipt cannot be explained: unknown, erased or empty."""


@dataclass(frozen=True)
class ExplainSettings:
    """How a completion is explained; the fields of `AttributionSettings` that concern it."""

    num_bootstrap: int = 500
    top_examples: int = 5
    confidence: float = 0.9
    num_token_groups: int = 8
    normalise: Normalise = "cosine"
    base_threshold_nats: float = 0.05
    seed: int = 0

    @classmethod
    def of(cls, section: Any) -> "ExplainSettings":
        """Return the settings held by a section of the configuration."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Subject:
    """The receipted completion and where its parts lie. `text`: what was asked and answered, as words are searched."""

    receipt: dict[str, Any]
    leaf_hash: str
    completion: "Completion"
    text: str


@dataclass(frozen=True)
class _Scored:
    """Everything the gradients said: parts [checkpoint, token group, example]."""

    rows: TraceRows | StoreRows
    parts: "NDArray[np.float64]"

    @property
    def trace(self) -> Trace:
        return self.rows.trace


def explain(
    trail: "Trail",
    receipt_id: str,
    settings: ExplainSettings | None = None,
    *,
    models: "AdapterModels | None" = None,
    record: bool = False,
    num_examples: int | None = None,
) -> Attribution:
    """Return who made the completion of `receipt_id` (or a unique prefix of it).

    `models` keeps the base in memory between calls. With `record` an `influence` record is appended, once per answer.
    `num_examples`: rows listed, of the scores and of BM25; `settings.top_examples` by default.
    Raises ExplainError for an unknown, erased or empty completion; TraceError for a broken trace, ShardsElsewhere for
    one of which only a part is on this machine.
    """
    settings = settings or ExplainSettings()
    subject = subject_of(trail, receipt_id)
    if subject.receipt["adapter"] is None:
        return _answer(subject, settings, base_did_it=True, reason="the request was for the base model")
    models = models or _new_models()
    gain = _gain(trail, subject, settings, models)
    trace = _trace_of(trail, subject.receipt["adapter"], models)
    if trace is None:
        return _answer(subject, settings, base_did_it=gain.is_of_base, reason=NO_TRACE, gain=gain)
    names = _contributor_names(trail)
    num_examples = num_examples or settings.top_examples
    words = WordMatches.of(trace.examples, subject.text)
    beside: dict[str, Any] = {
        "gain": gain,
        "baselines": _baselines(words, subject, settings, names),
        "bm25_examples": bm25_examples(words, names, num_examples),
    }
    if gain.is_of_base:
        return _answer(subject, settings, base_did_it=True, reason=_base_reason(gain), **beside)
    if not models.is_own(trace, models.folder(trail.store, subject.receipt["adapter"])):
        return _answer(subject, settings, base_did_it=False, reason=OTHER_WEIGHTS, **beside)
    scored = _score(trail, subject, settings, models, trace)
    examples = _top_examples(scored, settings, names, words, num_examples)
    attribution = _credited(subject, settings, scored, names=names, examples=examples, **beside)
    if record:
        leaf_hash = record_influence(trail, attribution, scored.trace, scored.parts)
        attribution = replace(attribution, influence_leaf=leaf_hash)
    return attribution


def explain_ranked(
    trail: "Trail", receipt_id: str, hits: Sequence["Hit"], settings: ExplainSettings, *, models: "AdapterModels"
) -> Attribution:
    """Return what can be said of a completion whose adapter's gradient store lies on several machines, `hits` being the
    rows that score highest over all of it: no shares, no intervals.
    """
    subject = subject_of(trail, receipt_id)
    gain = _gain(trail, subject, settings, models)
    digest = remaining(trail, str(trail.store.manifest(subject.receipt["adapter"]).meta.get("trace") or ""))
    trace = Trace(trail.store.get_directory(digest, verify=False))
    names = _contributor_names(trail)
    words = WordMatches.of(trace.examples, subject.text)
    row_of = {example.example_id: example for example in trace.examples}
    scores = [(row_of[hit.example_id], hit.score, None, None) for hit in hits if hit.example_id in row_of]
    return _answer(
        subject,
        settings,
        base_did_it=gain.is_of_base,
        reason=_base_reason(gain) if gain.is_of_base else RANKED,
        gain=gain,
        examples=() if gain.is_of_base else _example_parts(scores, names, words),
        baselines=_baselines(words, subject, settings, names),
        bm25_examples=bm25_examples(words, names, len(hits)),
        method=f"gradient-store/v1: exact over all shards, normalise={settings.normalise}, no interval",
        score_unit="cosines" if settings.normalise == "cosine" else "nats",
    )


def record_influence(trail: "Trail", attribution: Attribution, trace: Trace, parts: "NDArray[np.float64]") -> str:
    """Append an `influence` record with every example's score, unless it is there already; return its leaf hash."""
    import pyarrow as pa

    from attribution.bodies import InfluenceBody
    from attribution.bodies import Share as RecordedShare
    from attribution.records import Artefact

    columns = {
        "example_id": [example.example_id for example in trace.examples],
        "contributor": [example.contributor for example in trace.examples],
        "score_micro": [round(float(score) * MICRO) for score in parts.sum(axis=(0, 1))],
    }
    table = trail.put_table(pa.table(columns))
    top = tuple(
        RecordedShare(part.key_id, int(part.share * MICRO), int(part.low * MICRO), round(part.high * MICRO))
        for part in attribution.contributors[:NUM_TOP_CONTRIBUTORS]
    )
    body = InfluenceBody(attribution.receipt_id, attribution.receipt_leaf, attribution.method, table, top)
    for entry in trail.entries(kind="influence"):
        if entry.record is not None and entry.record.body == body:
            return entry.leaf_hash
    assert attribution.adapter is not None, "only an adapter's completion has scores"
    adapter = Artefact("adapter", attribution.adapter_name or "adapter", attribution.adapter)
    return _append_influence(trail, body, adapter, attribution)


def _append_influence(trail: "Trail", body: Any, adapter: "Artefact", attribution: Attribution) -> str:
    from attribution.records import Artefact

    made_by = trail.find(adapter.digest)
    entry = trail.record(
        "influence",
        body,
        inputs=(adapter,),
        outputs=(Artefact("table", f"influence of {attribution.receipt_id}", body.table),),
        parents=[attribution.receipt_leaf, *([made_by.leaf_hash] if made_by else [])],
        seed=attribution.seed,
    )
    return entry.leaf_hash


def subject_of(trail: "Trail", receipt_id: str) -> Subject:
    """Return what a receipt (or a unique prefix of its id) is about. Raises ExplainError."""
    from attribution.influence.query import Completion
    from attribution.receipts import find_receipt, receipt_content

    stored = find_receipt(trail, receipt_id)
    if stored is None:
        raise ExplainError(f"receipt {receipt_id!r}: not in this home's log; `trailmark log show` lists what is")
    receipt = stored.row.receipt
    content = receipt_content(trail, receipt["id"])
    output_ids = tuple(content["output_token_ids"])
    if not output_ids:
        raise ExplainError(f"receipt {receipt['id']}: the completion has no token, so nothing made it")
    completion = Completion(tuple(content["prompt_token_ids"]), output_ids)
    return Subject(receipt, stored.leaf_hash, completion, searched_text(content))


def searched_text(content: dict[str, Any]) -> str:
    """Return what was asked (the prompt, or the last user turn of the messages) and answered."""
    turns = [message["content"] for message in content.get("messages", ()) if message["role"] == "user"]
    return f"{content.get('prompt') or (turns[-1] if turns else '')}\n{content['output_text']}"


def _new_models() -> "AdapterModels":
    from attribution.influence.query import AdapterModels

    return AdapterModels()


def _gain(trail: "Trail", subject: Subject, settings: ExplainSettings, models: "AdapterModels") -> Gain:
    base, adapter = (models.folder(trail.store, subject.receipt[key]) for key in ("base", "adapter"))
    gains = models.gains(subject.completion, base=base, adapter=adapter)
    spread = bootstrap_mean(gains, num_draws=settings.num_bootstrap, seed=settings.seed, confidence=settings.confidence)
    return Gain(float(gains.mean()), spread.low, spread.high, len(gains), settings.base_threshold_nats)


def _base_reason(gain: Gain) -> str:
    if gain.high < 0:
        return "the adapter made it less likely than the base does"
    if gain.low <= 0:
        return "the adapter's gain over the base cannot be told from zero"
    return f"the adapter's gain over the base is below {gain.threshold:g} nats per token"


def _trace_of(trail: "Trail", adapter: str, models: "AdapterModels") -> Trace | None:
    digest = remaining(trail, str(trail.store.manifest(adapter).meta.get("trace") or ""))
    if not digest or not trail.store.has(digest):
        return None
    try:
        return Trace(models.folder(trail.store, digest))
    except StoreError:
        files = [file.path for file in trail.store.manifest(digest).files]
        missing = shards_elsewhere(trail.store.path_of(digest), files)
        if missing:
            raise ShardsElsewhere.of(digest, missing) from None
        raise


def _score(
    trail: "Trail", subject: Subject, settings: ExplainSettings, models: "AdapterModels", trace: Trace
) -> _Scored:
    base, adapter = (models.folder(trail.store, subject.receipt[key]) for key in ("base", "adapter"))
    rows = rows_of(trace, verify=False)  # the store verified the trace's folder when it was opened
    query = models.features(subject.completion, rows, base=base, adapter=adapter, num_groups=settings.num_token_groups)
    if residual := _residual(rows, settings):
        # What many rows share would be earned by all who wrote some, and drown who supplied the fact.
        query = residual.take_from(query)
    return _Scored(rows, score_parts(query, rows, normalise=settings.normalise))


def _residual(rows: TraceRows | StoreRows, settings: ExplainSettings) -> "Residual | None":
    """Return what a completion's gradients are cleared of: older stores, and nats, are answered as ever."""
    is_cleared = settings.normalise == "cosine" and isinstance(rows, StoreRows) and rows.store.is_summed
    return rows.store.residual if is_cleared and isinstance(rows, StoreRows) else None


def _credited(
    subject: Subject,
    settings: ExplainSettings,
    scored: _Scored,
    *,
    names: dict[str, str],
    **beside: Any,
) -> Attribution:
    contributors = [example.contributor for example in scored.trace.examples]
    key_ids, summed = sum_by_contributor(scored.parts, contributors)
    draws = bootstrap(summed, num_draws=settings.num_bootstrap, seed=settings.seed)
    split = split_shares(key_ids, summed.sum(axis=(0, 1)), draws, confidence=settings.confidence)
    paid, unattributed = in_micros(split)
    parts = tuple(_part(share, micro, names) for share, micro in zip(split.shares, paid, strict=True))
    reason = "shares of the predicted gain" if any(paid) else "no contributor's influence can be told from zero"
    return _answer(
        subject,
        settings,
        base_did_it=False,
        reason=reason,
        contributors=parts,
        unattributed=unattributed / MICRO,
        method=_method(scored, settings),
        gradient_passes=scored.parts.shape[0] * scored.parts.shape[1],
        **beside,
    )


def _part(share: Share, share_micro: int, names: dict[str, str]) -> ContributorPart:
    return ContributorPart(
        key_id=share.key_id,
        name=_name(names, share.key_id),
        share=share_micro / MICRO,
        low=share.share_interval.low,
        high=share.share_interval.high,
        score=share.score,
        score_low=share.score_interval.low,
        score_high=share.score_interval.high,
    )


def _top_examples(
    scored: _Scored, settings: ExplainSettings, names: dict[str, str], words: WordMatches, num_examples: int
) -> tuple[ExamplePart, ...]:
    totals = scored.parts.sum(axis=(0, 1))
    best = sorted(range(len(totals)), key=lambda row: (-totals[row], row))
    rows = [row for row in best if scored.trace.examples[row].text][:num_examples]  # one that was erased has neither
    draws = bootstrap(scored.parts[:, :, rows], num_draws=settings.num_bootstrap, seed=settings.seed)
    spreads = [interval(draws[:, column], confidence=settings.confidence) for column in range(len(rows))]
    return _example_parts(
        [
            (scored.trace.examples[row], float(totals[row]), spread.low, spread.high)
            for row, spread in zip(rows, spreads, strict=True)
        ],
        names,
        words,
    )


def _example_parts(
    scores: Sequence[tuple["TraceExample", float, float | None, float | None]],
    names: dict[str, str],
    words: WordMatches,
) -> tuple[ExamplePart, ...]:
    """Examples with (score, low, high), and what word search says of them."""
    places = words.places({example.example_id for example, *_ in scores})
    return tuple(
        ExamplePart(
            example_id=example.example_id,
            contributor=example.contributor,
            name=_name(names, example.contributor),
            score=score,
            low=low,
            high=high,
            text=example.text[:MAX_TEXT_CHARS],
            bm25=places[example.example_id][0],
            bm25_rank=places[example.example_id][1],
        )
        for example, score, low, high in scores
    )


def _baselines(
    words: WordMatches, subject: Subject, settings: ExplainSettings, names: dict[str, str]
) -> dict[str, tuple[BaselineRank, ...]]:
    rankings = {
        "bm25": words.contributors(settings.top_examples),
        "random": random_ranking(words.examples, seed=f"{settings.seed}:{subject.receipt['id']}"),
    }
    return {name: _named(ranking, names) for name, ranking in rankings.items()}


def bm25_examples(words: WordMatches, names: dict[str, str], num_examples: int) -> tuple[BaselineExample, ...]:
    """Return the rows that word search finds for what was asked and answered."""
    found = []
    for row in words.best(num_examples):
        example = words.examples[row]
        name = _name(names, example.contributor)
        found.append(BaselineExample(example.example_id, example.contributor, name, float(words.scores[row])))
    return tuple(found)


def _named(ranking: Sequence[Ranked], names: dict[str, str]) -> tuple[BaselineRank, ...]:
    return tuple(BaselineRank(ranked.key_id, _name(names, ranked.key_id), ranked.score) for ranked in ranking)


def _contributor_names(trail: "Trail") -> dict[str, str]:
    from attribution.lineage import Lineage

    return dict(Lineage(trail).contributor_names())


def _name(names: dict[str, str], key_id: str) -> str:
    return names.get(key_id, key_id[:12])


def _method(scored: _Scored, settings: ExplainSettings) -> str:
    num_checkpoints, num_groups, _ = scored.parts.shape
    return (
        f"tracin-lora/v1: {num_checkpoints} checkpoints, {scored.rows.description}, "
        f"weighted by the recorded batches, normalise={settings.normalise}"
        f"{', cleared of what many rows share' if _residual(scored.rows, settings) else ''}; "
        f"Dirichlet bootstrap x{settings.num_bootstrap} over checkpoints and {num_groups} token groups"
    )


def _answer(
    subject: Subject,
    settings: ExplainSettings,
    *,
    base_did_it: bool,
    reason: str,
    gain: Gain | None = None,
    contributors: tuple[ContributorPart, ...] = (),
    unattributed: float = 1.0,
    examples: tuple[ExamplePart, ...] = (),
    baselines: dict[str, tuple[BaselineRank, ...]] | None = None,
    bm25_examples: tuple[BaselineExample, ...] = (),
    method: str = "adapter-gain/v1: log-likelihood of the completion under adapter and base",
    gradient_passes: int = 0,
    score_unit: str = "nats",
) -> Attribution:
    receipt = subject.receipt
    return Attribution(
        receipt_id=receipt["id"],
        receipt_leaf=subject.leaf_hash,
        model=receipt["model"],
        base=receipt["base"],
        adapter=receipt["adapter"],
        adapter_name=receipt["adapter_name"],
        base_did_it=base_did_it,
        reason=reason,
        gain_nats=gain,
        contributors=contributors,
        unattributed=unattributed,
        examples=examples,
        baselines=baselines or {},
        bm25_examples=bm25_examples,
        method=method,
        label=LABEL,
        confidence=settings.confidence,
        seed=settings.seed,
        gradient_passes=gradient_passes,
        score_unit=score_unit,
    )
