"""Records of work as MLflow runs and models: refinement, base model, adapter, benchmark, publication."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attribution.bodies import (
    AdapterBody,
    BaseModelBody,
    BenchmarkBody,
    PublicationBody,
    RefinementBody,
    SettlementBody,
)
from attribution.erasure import remaining
from attribution.mlflow_context import PAGE_FILE, ViewContext, metrics_at
from attribution.mlflow_datasets import write_rows
from attribution.mlflow_notes import escape
from attribution.mlflow_server import TAG_NOTE, create_once
from attribution.records import Artefact
from attribution.settlement import player_name
from attribution.store import StoreError
from attribution.trail import Entry

if TYPE_CHECKING:
    from mlflow.entities import Metric

# MLflow keeps `latest` and `v3` for itself; `models:/NAME/latest` already means the newest version.
ALIAS = "current"
MICRO = 1e6


def write_refinement(context: ViewContext, entry: Entry) -> None:
    """A run with the contributions that went in, the dataset that came out, and what each rule dropped."""
    assert entry.record is not None and isinstance(entry.record.body, RefinementBody)
    record, body = entry.record, entry.record.body
    refined = record.outputs[0]
    summary = f"Refined **{body.num_kept}** of {body.num_in} rows from {len(body.per_contributor)} contributors."
    text = context.note(summary, entry, context.credits(entry), digest=refined.digest)
    run_id = context.run(entry, name=f"refine {body.name}", start_us=record.time_us, digest=refined.digest, note=text)
    context.server.log_params(run_id, {f"rule.{rule.name}": rule.params for rule in body.rules} | {"seed": record.seed})
    values = {"rows.in": body.num_in, "rows.kept": body.num_kept, "rows.dropped": body.num_in - body.num_kept}
    for dropped in body.dropped:
        key = f"rows.dropped.{dropped.rule}"
        values[key] = values.get(key, 0) + dropped.count
    context.server.log_metrics(run_id, metrics_at(values, record.time_us))
    datasets = context.datasets(record, context="contributed")
    context.server.log_inputs(run_id, [*datasets, context.dataset(refined, context="refined")], [])
    write_rows(context, entry)
    context.finish_run(entry, run_id)


def write_base_model(context: ViewContext, entry: Entry) -> None:
    """A LoggedModel without a run."""
    assert entry.record is not None and isinstance(entry.record.body, BaseModelBody)
    body = entry.record.body
    digest = entry.record.outputs[0].digest
    summary = (
        f"Base model {body.architecture}, {body.num_parameters:,} weights, licence {body.licence}. {body.note}".strip()
    )
    params = {
        "source": body.source,
        "architecture": body.architecture,
        "licence": body.licence,
        "dtype": body.dtype,
        "num_parameters": body.num_parameters,
    }
    text = context.note(summary, entry, [], digest=digest)
    model_id = context.model(entry, name=body.name, model_type="base model", params=params, note=text, run_id=None)
    context.finish_model(entry, model_id)


def write_adapter(context: ViewContext, entry: Entry) -> None:
    """The training run, base model and refined dataset going in, and the adapter as the LoggedModel that came out."""
    assert entry.record is not None and isinstance(entry.record.body, AdapterBody)
    record, body = entry.record, entry.record.body
    digest = record.outputs[0].digest
    credits = context.credits(entry)
    summary = (
        f"LoRA adapter of rank {body.rank}, trained for {body.num_steps} steps on {body.num_examples} rows of "
        f"{sum(credit.num_kept > 0 for credit in credits)} contributors; last loss {body.final_loss_micro / MICRO:.4f}."
    )
    text = context.note(summary, entry, credits, digest=digest)
    steps = _training_metrics(context, body)
    start_us = min((metric.timestamp * 1000 for metric in steps), default=record.time_us)
    params = {
        "rank": body.rank,
        "alpha": body.alpha,
        "target_modules": ", ".join(body.target_modules),
        "num_steps": body.num_steps,
        "num_examples": body.num_examples,
        "base": body.base,
        "dataset": body.dataset,
        "seed": record.seed,
    }
    run_id = context.run(entry, name=f"train {body.name}", start_us=start_us, digest=digest, note=text)
    context.server.log_params(run_id, params)
    final = {
        "final_loss": body.final_loss_micro / MICRO,
        "reload_max_abs_diff": body.reload_max_abs_diff_micro / MICRO,
        "num_examples": body.num_examples,
    }
    base_id = context.model_of(body.base)
    model_id = context.model(entry, name=body.name, model_type="LoRA adapter", params=params, note=text, run_id=run_id)
    datasets = context.datasets(record, context="training")
    context.server.log_inputs(run_id, datasets, [base_id] if base_id else [])
    last = metrics_at(
        final, record.time_us, step=body.num_steps, model_id=model_id, dataset=datasets[0][0] if datasets else None
    )
    context.server.log_metrics(run_id, [*steps, *last])
    context.server.log_output(run_id, model_id, step=body.num_steps)
    context.finish_model(entry, model_id)
    context.finish_run(entry, run_id)
    maker = context.trail.find(body.dataset)
    refined = None if maker is None else context.cursor.get(maker.leaf_hash, "run")
    if maker is not None and refined is not None:
        context.server.client.log_text(refined, context.pages.page(maker.leaf_hash), PAGE_FILE)  # it now has an adapter


def write_benchmark(context: ViewContext, entry: Entry) -> None:
    """A run with adapter and base going in; its metrics also stand on the models' pages, next to their suite."""
    assert entry.record is not None and isinstance(entry.record.body, BenchmarkBody)
    record, body = entry.record, entry.record.body
    adapter_id, base_id = context.model_of(body.adapter), context.model_of(body.base)
    suite = next(
        (item for item in record.inputs if item.digest == body.suite), Artefact("suite", body.name, body.suite)
    )
    lines = [
        f"- {metric.metric}: {metric.base_micro / MICRO:.3f} to **{metric.adapter_micro / MICRO:.3f}**, change "
        f"{metric.delta_micro / MICRO:+.3f} ({metric.low_micro / MICRO:+.3f} to {metric.high_micro / MICRO:+.3f})"
        for metric in body.metrics
    ]
    summary = f"Base against adapter on {body.num_items} held-out items.\n\n" + "\n".join(lines)
    text = context.note(summary, entry, context.credits(entry), digest=body.adapter)
    run_id = context.run(entry, name=f"benchmark {body.name}", start_us=record.time_us, digest=body.adapter, note=text)
    context.server.log_params(
        run_id,
        {
            "num_items": body.num_items,
            "suite": body.suite,
            "adapter": body.adapter,
            "base": body.base,
            "seed": record.seed,
        },
    )
    data, tags = context.dataset(suite, context="benchmark")
    context.server.log_inputs(run_id, [(data, tags)], [model_id for model_id in (adapter_id, base_id) if model_id])
    of_base = {f"{metric.metric}.base": metric.base_micro / MICRO for metric in body.metrics}
    of_adapter: dict[str, float] = {}
    for metric in body.metrics:
        of_adapter[metric.metric] = metric.adapter_micro / MICRO
        changes = {"change": metric.delta_micro, "change_low": metric.low_micro, "change_high": metric.high_micro}
        of_adapter.update({f"{metric.metric}.{key}": micro / MICRO for key, micro in changes.items()})
    for values, model_id in ((of_base, base_id), (of_adapter, adapter_id)):
        context.server.log_metrics(run_id, metrics_at(values, record.time_us, model_id=model_id, dataset=data))
    context.finish_run(entry, run_id)
    _renew_model_page(context, body.adapter)


def write_settlement(context: ViewContext, entry: Entry) -> None:
    """A run with the adapter and the suite going in; what each player was worth stands in its description."""
    assert entry.record is not None and isinstance(entry.record.body, SettlementBody)
    record, body = entry.record, entry.record.body
    lines = [
        f"- {escape(player.name or player_name(context.trail, player.kind, player.id))} ({player.kind}): "
        f"**{player.value_micro / MICRO:+.4f}** ({player.low_micro / MICRO:+.4f} to "
        f"{player.high_micro / MICRO:+.4f}), {player.verdict}"
        for player in body.players
    ]
    summary = (
        f"{body.num_players} players measured by {body.num_coalitions} coalitions on {escape(body.suite_name)}, in "
        f"{escape(body.utility)}; intervals at {body.confidence_micro / MICRO:.0%}.\n\n" + "\n".join(lines)
    )
    text = context.note(summary, entry, context.credits(entry), digest=body.adapter)
    name = f"settle {body.adapter_name}"
    run_id = context.run(entry, name=name, start_us=record.time_us, digest=body.adapter, note=text)
    names = ("adapter", "base", "dataset", "suite", "over", "utility", "method", "num_players", "table", "plan")
    context.server.log_params(run_id, {name: getattr(body, name) for name in names} | {"seed": record.seed})
    suite = next((item for item in record.inputs if item.digest == body.suite), record.inputs[0])
    models = [model for digest in (body.adapter, body.base) if (model := context.model_of(digest))]
    context.server.log_inputs(run_id, [context.dataset(suite, context="settlement")], models)
    values = {
        "utility.without": body.empty_micro / MICRO,
        "utility.with_all": body.full_micro / MICRO,
        "coalitions": body.num_coalitions,
        "cells": body.num_cells,
    }
    context.server.log_metrics(run_id, metrics_at(values, record.time_us))
    context.finish_run(entry, run_id)
    _renew_model_page(context, body.adapter)


def write_publication(context: ViewContext, entry: Entry) -> None:
    """A registered version under the published name, alias `current`, and `release-N` for NAME@N; only models have one.

    MLflow counts versions by itself: when a name was also published for something else, its numbers are not ours.
    """
    assert entry.record is not None and isinstance(entry.record.body, PublicationBody)
    body = entry.record.body
    model_id = context.model_of(body.digest)
    if model_id is None:
        return
    client = context.server.client
    name = registered_name(body.name)
    version = context.cursor.get(entry.leaf_hash, "version") or context.server.find_version(name, entry.leaf_hash)
    text = context.note(
        f"Published as **{body.name}@{body.version}**.", entry, context.credits(entry), digest=body.digest
    )
    if version is None:
        tags = {TAG_NOTE: "Published by Trailmark; see each version."}
        create_once(lambda: client.create_registered_model(name, tags=tags))
        created = client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=client.get_logged_model(model_id).source_run_id,
            model_id=model_id,
            tags={**context.tags(entry, digest=body.digest), "trailmark.version": str(body.version)},
            description=text,
            await_creation_for=0,
        )
        version = str(created.version)
    context.cursor.put(entry.leaf_hash, "version", f"{name}/{version}")
    for alias in (f"release-{body.version}", ALIAS):
        client.set_registered_model_alias(name, alias, version.rpartition("/")[2])
    client.set_logged_model_tags(model_id, {"trailmark.published": f"{body.name}@{body.version}"})
    _renew_model_page(context, body.digest)


def registered_name(published: str) -> str:
    """Return the registered model's name: MLflow allows no '/' in one."""
    return published.replace("/", ".")


def _renew_model_page(context: ViewContext, digest: str) -> None:
    """Redraw the adapter's lineage page: it now has a benchmark or a name."""
    maker = context.trail.find(digest)
    model_id = None if maker is None else context.model_id(maker.leaf_hash)
    if maker is not None and model_id is not None:
        context.finish_model(maker, model_id)


def _training_metrics(context: ViewContext, body: AdapterBody) -> "Sequence[Metric]":
    """Loss and learning rate of each step at the time it ran, from the training trace; none when the trace is gone."""
    import pyarrow.parquet
    from mlflow.entities import Metric

    try:
        folder = context.trail.store.get_directory(remaining(context.trail, body.trace), verify=False)
    except StoreError:
        return []
    rows = pyarrow.parquet.read_table(folder / "steps.parquet", columns=["step", "lr", "loss", "time_us"]).to_pylist()
    return [
        Metric(key, row[column], row["time_us"] // 1000, row["step"])
        for row in rows
        for key, column in (("loss", "loss"), ("learning_rate", "lr"))
    ]
