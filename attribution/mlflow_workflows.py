"""Records about work as MLflow runs: a workflow that ended, a patch to one, what a patch did, somebody's approval."""

from attribution.bodies import ApprovalBody, WorkflowEffectBody, WorkflowPatchBody, WorkflowRunBody
from attribution.mlflow_context import ViewContext, metrics_at
from attribution.mlflow_notes import escape
from attribution.store import StoreError
from attribution.trail import Entry

MICRO = 1e6
STATUSES = {"failed": "FAILED", "refused": "FAILED", "killed": "KILLED", "stopped": "KILLED"}  # MLflow's for ours
DIFF_FILE = "patch.diff"
WORKFLOW_KINDS = frozenset({"workflow_run", "workflow_patch", "workflow_effect", "approval"})


def write_workflow_run(context: ViewContext, entry: Entry) -> None:
    """A run with a line for each step; it failed when the workflow did."""
    assert entry.record is not None and isinstance(entry.record.body, WorkflowRunBody)
    body = entry.record.body
    steps = "\n".join(f"- {escape(step)}" for step in body.steps) or "- no step"
    summary = f"Workflow {escape(body.name)}: **{body.status}**.\n\n{steps}"
    run_id = _run(context, entry, f"workflow {body.name}", summary)
    context.server.log_params(run_id, {"workflow": body.name, "status": body.status, "seed": entry.record.seed})
    context.server.log_metrics(run_id, metrics_at({"steps": len(body.steps)}, entry.record.time_us))
    context.server.log_inputs(run_id, context.datasets(entry.record, context="workflow"), [])
    context.finish_run(entry, run_id, status=STATUSES.get(body.status, "FINISHED"))


def write_workflow_patch(context: ViewContext, entry: Entry) -> None:
    """A run with the reason and the diff of a change to a workflow."""
    assert entry.record is not None and isinstance(entry.record.body, WorkflowPatchBody)
    body = entry.record.body
    summary = f"{escape(context.signer_name(entry))} changed workflow {escape(body.workflow)}: {escape(body.reason)}"
    run_id = _run(context, entry, f"patch {body.workflow}", summary)
    try:
        text = context.trail.store.get_blob(body.diff).decode("utf-8", errors="replace")
        context.server.client.log_text(run_id, text, DIFF_FILE)
    except StoreError:
        pass  # erased since; the description says who changed what and why
    context.finish_run(entry, run_id)


def write_workflow_effect(context: ViewContext, entry: Entry) -> None:
    """A run with what patches did to each metric, and how sure that is."""
    assert entry.record is not None and isinstance(entry.record.body, WorkflowEffectBody)
    body = entry.record.body
    lines = [
        f"- {escape(item.benchmark)}, {escape(item.metric)}: {item.before_micro / MICRO:.3f} to "
        f"**{item.after_micro / MICRO:.3f}**, change {item.delta_micro / MICRO:+.3f} "
        f"({item.low_micro / MICRO:+.3f} to {item.high_micro / MICRO:+.3f}, {item.num_items} items)"
        for item in body.changes
    ]
    others = f"\n\nAlso changed: {escape(', '.join(body.also_changed))}." if body.also_changed else ""
    summary = f"**{body.verdict}**: {escape(body.reason)}\n\n" + "\n".join(lines) + others
    run_id = _run(context, entry, f"effect on {body.workflow}", summary)
    context.server.log_params(run_id, {"verdict": body.verdict, "patches": ", ".join(body.patches)})
    values = {f"{item.benchmark}.{item.metric}.change": item.delta_micro / MICRO for item in body.changes}
    context.server.log_metrics(run_id, metrics_at(values, entry.record.time_us))
    context.finish_run(entry, run_id)


def write_approval(context: ViewContext, entry: Entry) -> None:
    """A run that says who approved or refused what, and why."""
    assert entry.record is not None and isinstance(entry.record.body, ApprovalBody)
    body = entry.record.body
    reason = f": {escape(body.reason)}" if body.reason else ""
    summary = f"{escape(context.signer_name(entry))} **{body.decision}** `{body.subject}`{reason}"
    run_id = _run(context, entry, f"approval: {body.decision}", summary)
    context.server.log_params(run_id, {"decision": body.decision, "subject": body.subject})
    context.finish_run(entry, run_id)


def _run(context: ViewContext, entry: Entry, name: str, summary: str) -> str:
    assert entry.record is not None
    text = context.note(summary, entry, [], digest=None)
    return context.run(entry, name=name, start_us=entry.record.time_us, digest=None, note=text)
