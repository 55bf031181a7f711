"""What the log already knows that bears on credit: measured adapters, served completions, recorded influence."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attribution.bodies import AdapterBody, BenchmarkBody, DatasetBody, InfluenceBody, Metric, RefinementBody
from attribution.erasure import maker_of, remaining
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Trail

MICRO = 1_000_000
LOWER_IS_BETTER = frozenset({"loss"})
AUDIT_METHOD = "unrolled-adamw/"
TOO_FEW = "too few answers to tell"
NO_EFFECT = "no measurable effect"


@dataclass(frozen=True)
class Spread:
    """A number and the ends of its interval. `is_enough`: it rests on enough values to be told from zero at all."""

    value: float
    low: float
    high: float
    is_enough: bool = True

    @property
    def is_distinct(self) -> bool:
        """Whether it is told from zero."""
        return self.is_enough and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Measured:
    """A recorded benchmark; `confidence` of its intervals, None when its configuration is gone."""

    leaf_hash: str
    body: BenchmarkBody
    confidence: float | None


@dataclass(frozen=True)
class MeasuredAdapter:
    """An adapter, the names it was published under in order of version, and its benchmarks."""

    digest: str
    leaf_hash: str
    body: AdapterBody
    references: tuple[str, ...]
    benchmarks: tuple[Measured, ...]

    @property
    def label(self) -> str:
        return self.references[-1] if self.references else f"{self.body.name} ({self.digest[7:19]})"


@dataclass(frozen=True)
class Contribution:
    """One contributed dataset behind an adapter, and what is left of it after refining."""

    leaf_hash: str
    name: str
    contributor: str
    num_rows: int
    num_kept: int


@dataclass(frozen=True)
class Served:
    """What one model answered. `model` is an adapter's digest, or the base's when no adapter took part."""

    model: str
    is_base: bool
    num_completions: int
    num_prompt_tokens: int
    num_completion_tokens: int
    links: tuple[str, ...]


def measured_adapters(trail: "Trail", reference: str | None = None) -> list[MeasuredAdapter]:
    """Return all recorded adapters, or the one that a name, name@version or digest means, in order of the log."""
    names: dict[str, list[str]] = defaultdict(list)
    for published in trail.registry.list(kind="adapter"):
        names[published.digest].append(published.reference)
    benchmarks: dict[str, list[Measured]] = defaultdict(list)
    for entry in trail.entries(kind="benchmark"):
        if entry.record is not None and isinstance(entry.record.body, BenchmarkBody):
            confidence = recorded_confidence(trail, entry.record.config)
            benchmarks[entry.record.body.adapter].append(Measured(entry.leaf_hash, entry.record.body, confidence))
    found: dict[str, MeasuredAdapter] = {}
    for entry in trail.entries(kind="adapter"):
        if entry.record is None or not isinstance(entry.record.body, AdapterBody):
            continue
        digest = next(output.digest for output in entry.record.outputs if output.kind == "adapter")
        found[digest] = MeasuredAdapter(
            digest, entry.leaf_hash, entry.record.body, tuple(names[digest]), tuple(benchmarks[digest])
        )
    if reference is None:
        return list(found.values())
    digest = reference if reference in found else trail.registry.resolve(reference, kind="adapter").digest
    if digest not in found:
        raise UserError(f"adapter {reference!r}: its record was erased, so nothing is left to answer from")
    return [found[digest]]


def delta(metric: Metric) -> Spread:
    """Return adapter minus base of a recorded metric, in its own unit."""
    return Spread(metric.delta_micro / MICRO, metric.low_micro / MICRO, metric.high_micro / MICRO)


def version_change(
    trail: "Trail", older: BenchmarkBody, newer: BenchmarkBody, *, num_draws: int, seed: int, confidence: float
) -> dict[str, Spread]:
    """Return newer adapter minus older per metric over the items both were asked, paired by item id.

    Empty when the suites differ or the tables of answers are gone.
    """
    if older.suite != newer.suite or not (trail.store.has(older.details) and trail.store.has(newer.details)):
        return {}
    before, after = (_by_item(trail, body.details) for body in (older, newer))
    shared = sorted(before.keys() & after.keys())
    metrics = sorted({metric.metric for metric in older.metrics} & {metric.metric for metric in newer.metrics})
    changes = {}
    for metric in metrics:
        column = f"adapter_{metric}"
        if shared and column in before[shared[0]] and column in after[shared[0]]:
            differences = np.array([float(after[i][column]) - float(before[i][column]) for i in shared])
            changes[metric] = resampled_mean(differences, num_draws=num_draws, seed=seed, confidence=confidence)
    return changes


def recorded_confidence(trail: "Trail", config: str | None) -> float | None:
    """Return the confidence that a benchmark's stored configuration names (floats are stored as text)."""
    if not config or not trail.store.has(config):
        return None
    value = trail.get_json(config).get("confidence")
    return None if value is None else float(value)


def verdict_of(metric: str, spread: Spread) -> str:
    """Say whether a difference in a metric is an improvement, a loss, or cannot be told from nothing."""
    if not spread.is_distinct:
        return NO_EFFECT
    return "improved" if (spread.value < 0) == (metric in LOWER_IS_BETTER) else "worsened"


def contributions(trail: "Trail", adapter: MeasuredAdapter) -> tuple[str | None, list[Contribution]]:
    """Return the refinement (leaf hash) behind an adapter and its contributions in log order; (None, []) if unknown."""
    entry = maker_of(trail, adapter.body.dataset)
    if entry is None or entry.record is None or not isinstance(entry.record.body, RefinementBody):
        return None, []
    kept = _kept_rows(trail, entry.record.body)
    found = []
    for leaf_hash in entry.leaf.parents:
        parent = trail.entry(leaf_hash)
        if parent.record is None or not isinstance(parent.record.body, DatasetBody):
            continue
        body, (party, *_) = parent.record.body, parent.record.contributors
        found.append(Contribution(leaf_hash, body.name, party.key_id, body.num_rows, kept.get(leaf_hash, 0)))
    return entry.leaf_hash, sorted(found, key=lambda item: trail.entry_index(item.leaf_hash))


def dataset_of_examples(trail: "Trail", adapter: MeasuredAdapter) -> dict[str, str]:
    """Return example id -> leaf hash of the contribution it came with; empty when the rows are gone."""
    entry = maker_of(trail, adapter.body.dataset)
    if entry is None or entry.record is None or not isinstance(entry.record.body, RefinementBody):
        return {}
    return {row["example_id"]: row["dataset"] for row in _rows(trail, entry.record.body)}


def is_audit(method: str) -> bool:
    """Whether an influence record's scores are exact derivatives of the recorded run, not a ranking's."""
    return method.startswith(AUDIT_METHOD)


def recorded_scores(trail: "Trail", adapter: str, *, audited: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (leaf hash, example id -> score in nats) of each recorded influence on an adapter's answers.

    Of one method only, for their sizes cannot be compared: the explain tier's predicted gains or, `audited`, the exact
    derivatives.
    """
    for entry in trail.entries(kind="influence"):
        if entry.record is None or not isinstance(entry.record.body, InfluenceBody):
            continue
        table = entry.record.body.table
        is_wanted = is_audit(entry.record.body.method) == audited
        if is_wanted and any(source.digest == adapter for source in entry.record.inputs) and trail.store.has(table):
            rows = trail.get_table(table).to_pylist()
            yield entry.leaf_hash, {row["example_id"]: row["score_micro"] / MICRO for row in rows}


def served(trail: "Trail") -> list[Served]:
    """Return what each adapter and base answered, most completion tokens first."""
    from attribution.receipts import completion_rows

    counts: dict[tuple[str, bool], tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    links: dict[tuple[str, bool], dict[str, None]] = defaultdict(dict)
    for entry in trail.entries(kind="completions"):
        for row in completion_rows(trail, entry):
            receipt = row.receipt
            key = (receipt["adapter"] or receipt["base"], receipt["adapter"] is None)
            completions, asked, answered = counts[key]
            counts[key] = (completions + 1, asked + receipt["prompt_tokens"], answered + receipt["completion_tokens"])
            links[key][entry.leaf_hash] = None
    found = [
        Served(model, is_base, *figures, links=tuple(links[model, is_base]))
        for (model, is_base), figures in counts.items()
    ]
    return sorted(found, key=lambda item: (-item.num_completion_tokens, item.model))


def resampled_mean(values: NDArray[np.float64], *, num_draws: int, seed: int, confidence: float) -> Spread:
    """Return the mean of values [n] and its Bayesian bootstrap interval (Dirichlet weights; Rubin 1981).

    The interval lies among the values, so n values that happen to agree in sign would look like an effect: by the
    sign-flip test, whose smallest chance is 2^(1 - n), fewer than 5 say nothing at 90 %.
    """
    draws = np.random.default_rng(seed).dirichlet(np.ones(len(values)), num_draws) @ values
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Spread(float(values.mean()), float(low), float(high), is_enough=2.0 ** (1 - len(values)) <= 1 - confidence)


def dataset_scores(
    scores: Sequence[Mapping[str, float]], datasets: Mapping[str, str], names: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Return per dataset the summed score of its rows in each answer: float64 [answers]."""
    sums = {name: np.zeros(len(scores)) for name in names}
    for index, by_example in enumerate(scores):
        for example_id, score in by_example.items():
            name = datasets.get(example_id)
            if name in sums:
                sums[name][index] += score
    return sums


def _by_item(trail: "Trail", details: str) -> dict[str, dict[str, float]]:
    return {row["id"]: row for row in trail.get_table(details).to_pylist()}


def _kept_rows(trail: "Trail", body: RefinementBody) -> dict[str, int]:
    kept: dict[str, int] = defaultdict(int)
    for row in _rows(trail, body):
        kept[row["dataset"]] += 1
    return kept


def _rows(trail: "Trail", body: RefinementBody) -> list[dict[str, str]]:
    rows = remaining(trail, body.rows)
    if not trail.store.has(rows):
        return []
    return trail.get_table(rows).select(["example_id", "dataset"]).to_pylist()
