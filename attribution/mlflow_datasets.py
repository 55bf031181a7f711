"""Data in MLflow: a run for each contribution, and the rows of each refined dataset with who gave which.

MLflow keeps row-level provenance in one place, the records of an evaluation dataset (tags and source of each), and its
tab Datasets shows nothing else. Of a large dataset the first rows are shown; the tag `trailmark.rows` says how many.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from attribution.bodies import DatasetBody, RefinementBody
from attribution.erasure import remaining
from attribution.mlflow_context import ViewContext, metrics_at
from attribution.mlflow_notes import escape
from attribution.trail import Entry

if TYPE_CHECKING:
    import pyarrow
    from mlflow.entities import EvaluationDataset

MAX_ROWS = 2000  # MLflow looks each row up by itself: 2000 take a few seconds
ROWS_PER_CALL = 250  # a request may hold 1 MB
MAX_TEXT_CHARS = 4000
TAG_ROWS, TAG_ROWS_DIGEST = "trailmark.rows", "trailmark.rows_digest"
ROW_COLUMNS = ("example_id", "contributor", "licence", "dataset", "line_number", "messages")


def write_dataset(context: ViewContext, entry: Entry) -> None:
    """A run that stands for one contribution: who gave it, under which licence, and its page."""
    assert entry.record is not None and isinstance(entry.record.body, DatasetBody)
    record, body = entry.record, entry.record.body
    made = record.outputs[0]
    who = context.signer_name(entry)
    rejected = f", {body.num_rejected} rejected" if body.num_rejected else ""
    summary = f"**{escape(who)}** contributed {body.num_rows} rows{rejected} under {escape(body.licence)}."
    text = context.note(summary, entry, [], digest=made.digest)
    run_id = context.run(entry, name=f"contribute {body.name}", start_us=record.time_us, digest=made.digest, note=text)
    context.server.log_params(run_id, {"contributor": who, "licence": body.licence, "file": body.source_file_name})
    values = {"rows": body.num_rows, "rows.rejected": body.num_rejected}
    context.server.log_metrics(run_id, metrics_at(values, record.time_us))
    context.server.log_inputs(run_id, [context.dataset(made, context="contributed")], [])
    context.finish_run(entry, run_id)


def write_rows(context: ViewContext, entry: Entry) -> None:
    """The evaluation dataset that lists a refined dataset's rows; written whole, so doing it again changes nothing."""
    assert entry.record is not None and isinstance(entry.record.body, RefinementBody)
    known = context.cursor.get(entry.leaf_hash, "dataset")
    if known is None:
        found = context.server.find_rows(entry.leaf_hash)
        known = None if found is None else str(found.dataset_id)
    rows = shown_rows(context, entry)
    tags = row_tags(context, entry, rows)
    if known is None:
        name = f"{entry.record.body.name} (log entry {entry.index})"
        made = context.server.client.create_dataset(name, [context.server.experiment_id], tags)
        known = str(made.dataset_id)
    for start in range(0, len(rows), ROWS_PER_CALL):
        context.server.traces.store.upsert_dataset_records(known, rows[start : start + ROWS_PER_CALL])
    context.cursor.put(entry.leaf_hash, "dataset", known)


def row_tags(context: ViewContext, entry: Entry, rows: "list[dict[str, Any]]") -> dict[str, str]:
    """Return the tags of a refined dataset's rows in MLflow."""
    assert entry.record is not None and isinstance(entry.record.body, RefinementBody)
    body = entry.record.body
    return {
        **context.tags(entry, digest=entry.record.outputs[0].digest),
        TAG_ROWS: f"{len(rows)} of {body.num_kept}",
        TAG_ROWS_DIGEST: rows_digest(rows),
    }


def shown_rows(context: ViewContext, entry: Entry) -> list[dict[str, Any]]:
    """Return the first rows left of a refined dataset as MLflow's records; none when they were erased or are no such
    table.

    MLflow takes two records with equal inputs for one, so the example's id is one of the inputs.
    """
    assert entry.record is not None and isinstance(entry.record.body, RefinementBody)
    rows = remaining(context.trail, entry.record.body.rows)
    if not context.trail.store.has(rows):
        return []
    table = _rows_table(context, rows)
    if table is None:
        return []
    names = context.lineage.contributor_names()
    trail = context.trail
    erased = {leaf for leaf in set(table.column("dataset").to_pylist()) if trail.entry(leaf).record is None}
    return [
        _record(row, names.get(row["contributor"], row["contributor"][:12]))
        for row in table.select(ROW_COLUMNS).slice(0, MAX_ROWS).to_pylist()
        if row["dataset"] not in erased
    ]


def _rows_table(context: ViewContext, digest: str) -> "pyarrow.Table | None":
    import pyarrow

    try:
        table = context.trail.get_table(digest)
    except pyarrow.ArrowInvalid:
        return None
    return table if set(ROW_COLUMNS) <= set(table.column_names) else None


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of records in any order, over what this view writes of each."""
    texts = sorted(
        json.dumps({key: row.get(key) for key in ("inputs", "expectations", "tags")}, sort_keys=True) for row in rows
    )
    return sha256("\n".join(texts).encode()).hexdigest()


def stored_digest(context: ViewContext, dataset: "EvaluationDataset") -> str:
    """Return the digest of the records that MLflow holds."""
    records, _ = context.server.traces.store._load_dataset_records(dataset.dataset_id)
    return rows_digest(
        {
            "inputs": record.inputs,
            "expectations": record.expectations,
            "tags": {key: value for key, value in (record.tags or {}).items() if not key.startswith("mlflow.")},
        }
        for record in records
    )


def _record(row: Mapping[str, Any], contributor: str) -> dict[str, Any]:
    messages = [{"role": turn["role"], "content": turn["content"][:MAX_TEXT_CHARS]} for turn in row["messages"]]
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return {
        "inputs": {"messages": messages[:-1] if answered else messages, "example_id": row["example_id"]},
        "expectations": {"expected_response": messages[-1]["content"]} if answered else {},
        "tags": {
            "contributor": contributor,
            "contributor_key": row["contributor"],
            "licence": row["licence"],
            "contribution": row["dataset"],
            "line": str(row["line_number"]),
        },
        "source": {
            "source_type": "DOCUMENT",
            "source_data": {"doc_uri": f"trailmark:{row['dataset']}#line={row['line_number']}"},
        },
    }
