"""What was erased from the records leaves the view too."""

from collections.abc import Iterator

from attribution.bodies import PublicationBody, RedactionBody, RowRedactionBody
from attribution.mlflow_context import ViewContext
from attribution.mlflow_datasets import write_rows
from attribution.mlflow_prompts import delete_version
from attribution.mlflow_runs import registered_name
from attribution.mlflow_server import TAG_LEAF
from attribution.trail import Entry


def write_redaction(context: ViewContext, entry: Entry) -> None:
    """Delete what shows the erased record, rows included. MLflow keeps deleted runs until `mlflow gc`."""
    assert entry.record is not None and isinstance(entry.record.body, RedactionBody)
    leaf = entry.record.body.leaf
    server = context.server
    run = server.find_run(leaf)
    if run is not None:
        server.client.delete_run(run.info.run_id)
    model = server.find_model(leaf)
    if model is not None:
        server.client.delete_logged_model(model.model_id)
    for name, version in _versions_of(context, leaf):
        server.client.delete_model_version(name, version)
    kind = context.trail.entry(leaf).leaf.kind
    if kind == "prompt":
        delete_version(context, leaf)
    if kind in ("dataset", "refinement"):
        for refinement in {leaf, *(entry.leaf_hash for entry in context.lineage.descendants(leaf))}:
            _renew_rows(context, refinement)
    if kind == "completions":
        doomed = [info.trace_id for info in server.trace_infos() if info.trace_metadata.get(TAG_LEAF) == leaf]
        if doomed:
            server.client.delete_traces(server.experiment_id, trace_ids=doomed)
    context.cursor.forget(leaf)
    context.pages.forget(leaf)


def write_row_redaction(context: ViewContext, entry: Entry) -> None:
    """Write the refined datasets that lost rows anew."""
    assert entry.record is not None and isinstance(entry.record.body, RowRedactionBody)
    for leaf in {rewrite.leaf for rewrite in entry.record.body.rewritten if rewrite.part == "refined"}:
        _renew_rows(context, leaf)


def _renew_rows(context: ViewContext, leaf: str) -> None:
    """Write the rows of a refined dataset anew, for records of an evaluation dataset are only ever added to."""
    rows = context.server.find_rows(leaf)
    if rows is None:
        return
    context.server.client.delete_dataset(rows.dataset_id)
    context.cursor.forget(leaf)
    refinement = context.trail.entry(leaf)
    if refinement.record is not None:
        write_rows(context, refinement)


def _versions_of(context: ViewContext, leaf: str) -> Iterator[tuple[str, str]]:
    """The registered versions whose model's record was erased."""
    erased = context.trail.entry(leaf).leaf
    digests = {subject.digest for subject in erased.subjects if subject.kind == erased.kind}
    for entry in context.trail.entries(kind="publication") if digests else ():
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, PublicationBody) and body.digest in digests:
            name = registered_name(body.name)
            version = context.server.find_version(name, entry.leaf_hash)
            if version is not None:
                yield name, version
