"""What was erased from the records leaves the view too."""

from attribution.bodies import RedactionBody
from attribution.mlflow_context import ViewContext
from attribution.mlflow_server import TAG_LEAF
from attribution.trail import Entry


def write_redaction(context: ViewContext, entry: Entry) -> None:
    """Delete the run, model and traces of the erased record. MLflow keeps deleted runs until `mlflow gc`."""
    assert entry.record is not None and isinstance(entry.record.body, RedactionBody)
    leaf = entry.record.body.leaf
    server = context.server
    run = server.find_run(leaf)
    if run is not None:
        server.client.delete_run(run.info.run_id)
    model = server.find_model(leaf)
    if model is not None:
        server.client.delete_logged_model(model.model_id)
    if context.trail.entry(leaf).leaf.kind == "completions":
        doomed = [info.trace_id for info in server.trace_infos() if info.trace_metadata.get(TAG_LEAF) == leaf]
        if doomed:
            server.client.delete_traces(server.experiment_id, trace_ids=doomed)
    context.cursor.forget(leaf)
    context.pages.forget(leaf)
