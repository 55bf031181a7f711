"""Benchmark an adapter against its base on a held-out suite: reference loss, exact match, contains; one record."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from configs.errors import UserError
from configs.schema import BenchmarkSettings
from pipelines.benchmark.compare import Comparison, compare, contains_expected, is_exact
from pipelines.benchmark.suites import Item, read_suite

if TYPE_CHECKING:
    from torch import nn

    from attribution.bodies import Metric
    from attribution.records import Artefact
    from attribution.trail import Entry, Trail

MICRO = 1_000_000
LOSS_BATCH = 8
"""Reference answers per forward pass."""


class BenchmarkError(UserError):
    """An adapter that cannot be found or measured."""


@dataclass(frozen=True)
class BenchmarkProgress:
    """`num_done` of `num_total` items of a stage (`loss` or `answers`); both base and adapter count."""

    stage: str
    num_done: int
    num_total: int


Progress = Callable[[BenchmarkProgress], None]


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter in the store, and the base it was trained on."""

    name: str
    digest: str
    path: Path
    base_name: str
    base_digest: str
    base_path: Path


@dataclass(frozen=True)
class Answers:
    """What one model made of the items, in their order. `losses`: mean nats per token of the reference answer."""

    losses: tuple[float, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkReport:
    """Metrics of a benchmark and the record that holds them; `details` is the digest of the table of answers."""

    entry: "Entry"
    adapter: str
    metrics: tuple[Comparison, ...]
    details: str


def benchmark(
    trail: "Trail",
    adapter: str,
    *,
    suite: Path,
    settings: BenchmarkSettings,
    progress: Progress | None = None,
    workflow: "Artefact | None" = None,
) -> BenchmarkReport:
    """Measure `adapter` (digest, published name[@version], or the name it was trained under) on `suite` and record it.

    `workflow`: the definition of the workflow that asks, an input of the record.

    Raises:
        SuiteError: a bad row, with its line and field.
        BenchmarkError: no such adapter, or an item that the model cannot take.
    """
    items = read_suite(suite)
    trained = resolve_adapter(trail, adapter)
    tell = progress or _ignore
    base_losses, adapter_losses = reference_losses(trained, items, settings=settings, progress=tell)
    base_texts, adapter_texts = generate(trained, items, settings=settings, progress=tell)
    base, tuned = Answers(base_losses, base_texts), Answers(adapter_losses, adapter_texts)
    metrics = compare_answers(items, base, tuned, settings=settings)
    details = trail.put_table(details_table(items, base, tuned))
    entry = _record(trail, trained, suite, metrics, details=details, settings=settings, workflow=workflow)
    return BenchmarkReport(entry, trained.digest, metrics, details)


def resolve_adapter(trail: "Trail", reference: str) -> TrainedAdapter:
    """Find an adapter by digest, by publication, or by the name it was trained under (the newest)."""
    from attribution.bodies import AdapterBody
    from attribution.registry import RegistryError

    entry = trail.find(reference) if reference.startswith("sha256:") else None
    if entry is None:
        bodies = [(e, e.record.body) for e in trail.entries(kind="adapter") if e.record is not None]
        trained = [e for e, body in bodies if isinstance(body, AdapterBody) and body.name == reference]
        try:
            entry = trail.find(trail.registry.resolve(reference, kind="adapter").digest)
        except RegistryError as error:
            if not trained:
                raise BenchmarkError(f"{error}; nor was one trained under that name (see `trailmark train`)") from error
            entry = trained[-1]
    if entry is None or entry.record is None or not isinstance(entry.record.body, AdapterBody):
        raise BenchmarkError(f"adapter {reference!r}: that record is not of an adapter, or was erased")
    digest = next(output.digest for output in entry.record.outputs if output.kind == "adapter")
    base = next(source for source in entry.record.inputs if source.kind == "base_model")
    folder, base_folder = trail.store.get_directory(digest), trail.store.get_directory(base.digest)
    return TrainedAdapter(entry.record.body.name, digest, folder, base.name, base.digest, base_folder)


def reference_losses(
    trained: TrainedAdapter, items: Sequence[Item], *, settings: BenchmarkSettings, progress: Progress
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (base, adapter) mean negative log-likelihood per token of each reference, by transformers and PEFT."""
    from transformers import AutoTokenizer

    from attribution.influence.encode import encode_example
    from pipelines.train.lora import load_base, reload_adapter

    tokenizer = AutoTokenizer.from_pretrained(trained.base_path, local_files_only=True)
    encoded = [encode_example(tokenizer, _conversation(item), max_length=None) for item in items]
    model = reload_adapter(load_base(str(trained.base_path), dtype=settings.dtype), trained.path)
    base: list[float] = []
    tuned: list[float] = []
    for start in range(0, len(encoded), LOSS_BATCH):
        batch = encoded[start : start + LOSS_BATCH]
        tuned += _mean_losses(model, batch)
        with model.disable_adapter():
            base += _mean_losses(model, batch)
        progress(BenchmarkProgress("loss", 2 * len(tuned), 2 * len(encoded)))
    return tuple(base), tuple(tuned)


def generate(
    trained: TrainedAdapter, items: Sequence[Item], *, settings: BenchmarkSettings, progress: Progress
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (base, adapter) greedy answers, by the engine that serves, base and adapter rows in one batch."""
    from attribution.influence.encode import encode_prompt
    from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
    from serve_apps.engine.engine import Engine

    engine = Engine(
        EngineConfig(
            base_path=str(trained.base_path),
            base_digest=trained.base_digest,
            dtype=settings.dtype,
            max_num_seqs=settings.batch_size,
        )
    )
    sampling = SamplingParams(max_tokens=settings.max_new_tokens)
    for index, item in enumerate(items):
        prompt = tuple(encode_prompt(engine.tokenizer, [{"role": "user", "content": item.prompt}]))
        for side, ref in (("base", None), ("adapter", AdapterRef(trained.digest, str(trained.path)))):
            try:
                engine.add(Request(f"{side}:{index}", prompt, sampling, adapter=ref))
            except UserError as error:
                raise BenchmarkError(f"suite item {item.item_id!r}: {error}") from error
    texts: dict[str, str] = {}
    num_done = 0
    for output in _outputs(engine):
        texts[output.request_id] = texts.get(output.request_id, "") + output.text
        if output.finish_reason == "error":
            item_id = items[int(output.request_id.split(":")[1])].item_id
            raise BenchmarkError(f"suite item {item_id!r}: the engine failed: {output.error}")
        num_done += output.finished
        if output.finished:
            progress(BenchmarkProgress("answers", num_done, 2 * len(items)))
    base, tuned = (tuple(texts[f"{side}:{i}"].strip() for i in range(len(items))) for side in ("base", "adapter"))
    return base, tuned


def compare_answers(
    items: Sequence[Item], base: Answers, tuned: Answers, *, settings: BenchmarkSettings
) -> tuple[Comparison, ...]:
    """Return loss (lower is better), exact_match and contains (higher is better), each with its interval."""
    scores: dict[str, tuple[Sequence[float], Sequence[float]]] = {"loss": (base.losses, tuned.losses)}
    for metric, score in (("exact_match", is_exact), ("contains", contains_expected)):
        of_base, of_adapter = (
            [float(score(text, item)) for item, text in zip(items, texts, strict=True)]
            for texts in (base.texts, tuned.texts)
        )
        scores[metric] = of_base, of_adapter
    return tuple(compare(metric, *pair, settings=settings) for metric, pair in scores.items())


def details_table(items: Sequence[Item], base: Answers, tuned: Answers) -> pa.Table:
    """Return one row per item: the question, both answers and their scores."""
    columns: dict[str, list[Any]] = {
        "id": [item.item_id for item in items],
        "prompt": [item.prompt for item in items],
        "expected": [list(item.expected) for item in items],
        "reference": [item.reference for item in items],
    }
    for side, answers in (("base", base), ("adapter", tuned)):
        columns[f"{side}_answer"] = list(answers.texts)
        columns[f"{side}_loss"] = list(answers.losses)
        pairs = list(zip(items, answers.texts, strict=True))
        columns[f"{side}_exact_match"] = [is_exact(text, item) for item, text in pairs]
        columns[f"{side}_contains"] = [contains_expected(text, item) for item, text in pairs]
    return pa.table(columns)


def _record(
    trail: "Trail",
    trained: TrainedAdapter,
    suite: Path,
    metrics: Sequence[Comparison],
    *,
    details: str,
    settings: BenchmarkSettings,
    workflow: "Artefact | None",
) -> "Entry":
    from attribution.bodies import BenchmarkBody
    from attribution.records import Artefact, Party

    suite_digest = trail.store.put_blob(suite)
    body = BenchmarkBody(
        name=suite.stem,
        suite=suite_digest,
        base=trained.base_digest,
        adapter=trained.digest,
        num_items=metrics[0].num_items,
        metrics=tuple(_in_micros(comparison) for comparison in metrics),
        details=details,
    )
    return trail.record(
        "benchmark",
        body,
        inputs=(
            Artefact("adapter", trained.name, trained.digest),
            Artefact("base_model", trained.base_name, trained.base_digest),
            Artefact("suite", suite.stem, suite_digest),
            *([workflow] if workflow else []),
        ),
        outputs=(Artefact("table", f"{suite.stem}.details", details),),
        contributors=(Party(trail.keys.get("operator").key_id, "operator"),),
        config=trail.run_config(settings),
        seed=settings.seed,
    )


def _in_micros(comparison: Comparison) -> "Metric":
    from attribution.bodies import Metric

    return Metric(
        metric=comparison.metric,
        base_micro=round(comparison.base * MICRO),
        adapter_micro=round(comparison.adapter * MICRO),
        delta_micro=round(comparison.delta * MICRO),
        low_micro=round(comparison.low * MICRO),
        high_micro=round(comparison.high * MICRO),
        num_items=comparison.num_items,
    )


def _conversation(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.reference}]


def _mean_losses(model: "nn.Module", batch: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    from attribution.influence.gradients import target_log_likelihoods

    return [-likelihoods.mean().item() for likelihoods in target_log_likelihoods(model, batch)]


def _outputs(engine: Any) -> Iterator[Any]:
    while engine.has_unfinished:
        yield from engine.step()


def _ignore(_: BenchmarkProgress) -> None:
    """For a caller that wants no progress."""
