"""Completions as MLflow traces, one per receipt, linked to the model that answered; influence as their assessments.

A trace's id is made from its receipt's id, so that writing it twice writes the same rows. Traces are written
synchronously through the tracking store: MLflow's own queue drops what does not fit (export/async_export_queue.py).
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from attribution.bodies import CompletionsBody, InfluenceBody, Share
from attribution.mlflow_context import ViewContext
from attribution.mlflow_notes import Credit, credit_list, escape
from attribution.mlflow_server import TAG_CONTRIBUTORS, TAG_INDEX, TAG_LEAF, TAG_RECEIPT
from attribution.receipts import ReceiptRow, completion_rows
from attribution.registry import RegistryError
from attribution.store import StoreError
from attribution.trail import Entry

if TYPE_CHECKING:
    from mlflow.entities.span import Span
    from mlflow.entities.trace_info import TraceInfo

MICRO = 1e6
MAX_PREVIEW_CHARS = 1000  # MLflow cuts there
MAX_METADATA_CHARS = 250
ASSESSMENT = "top_contributor"
ASSESSMENT_SHARES = "contributor_shares"
NOBODY = "nobody stands out"
NUM_CREDITS = 50


def trace_id_of(receipt_id: str) -> str:
    """Return the id of a receipt's trace."""
    return f"tr-{sha256(f'trailmark/{receipt_id}'.encode()).hexdigest()[:32]}"


def write_completions(context: ViewContext, entry: Entry) -> None:
    """One trace per receipt of the batch."""
    assert entry.record is not None and isinstance(entry.record.body, CompletionsBody)
    credits: dict[str, list[Credit]] = {}
    rows = rows_of(context, entry)
    for record in {row.receipt["adapter_record"] for row in rows if row.receipt["adapter_record"]}:
        ranked = sorted(context.credits(context.trail.entry(record)), key=lambda credit: -credit.num_kept)
        credits[record] = ranked[:NUM_CREDITS]
    context.server.log_traces(
        [_trace(context, entry, row, credits.get(row.receipt["adapter_record"] or "", [])) for row in rows]
    )
    for row in rows:
        _link_prompt(context, row)


def rows_of(context: ViewContext, entry: Entry) -> list[ReceiptRow]:
    """Return the receipts of a batch; none when their table was erased."""
    assert entry.record is not None and isinstance(entry.record.body, CompletionsBody)
    return completion_rows(context.trail, entry) if context.trail.store.has(entry.record.body.table) else []


def write_influence(context: ViewContext, entry: Entry) -> None:
    """Two assessments on the receipt's trace: the first contributor, and all recorded shares with intervals."""
    from mlflow.entities import AssessmentSource, Feedback

    assert entry.record is not None and isinstance(entry.record.body, InfluenceBody)
    body = entry.record.body
    trace_id = trace_id_of(body.receipt_id)
    info = _trace_info(context, trace_id)
    if info is None or not body.top:
        return
    written = {item.name for item in info.assessments if (item.metadata or {}).get(TAG_LEAF) == entry.leaf_hash}
    names = context.lineage.contributor_names()
    name_of = {share.key_id: names.get(share.key_id, share.key_id[:12]) for share in body.top}
    source = AssessmentSource(source_type="CODE", source_id=f"trailmark {body.method}")
    metadata = {TAG_LEAF: entry.leaf_hash, TAG_INDEX: str(entry.index), "method": body.method}
    first = name_of[body.top[0].key_id] if body.top[0].share_micro > 0 else NOBODY
    rationale = "; ".join(_share_in_words(share, name_of[share.key_id]) for share in body.top)
    shares = {name_of[share.key_id]: share.share_micro / MICRO for share in body.top}
    for name, value in ((ASSESSMENT, first), (ASSESSMENT_SHARES, shares)):
        if name not in written:
            feedback = Feedback(
                name=name,
                value=value,
                source=source,
                metadata=metadata,
                rationale=f"{rationale}. Intervals show stability.",
                create_time_ms=entry.leaf.time_us // 1000,
                last_update_time_ms=entry.leaf.time_us // 1000,
            )
            context.server.traces.log_assessment(trace_id, feedback)


def _share_in_words(share: Share, name: str) -> str:
    low, high = share.low_micro / MICRO, share.high_micro / MICRO
    return f"{name} {share.share_micro / MICRO:.1%} ({low:.1%} to {high:.1%})"


def _trace_info(context: ViewContext, trace_id: str) -> "TraceInfo | None":
    from mlflow.exceptions import MlflowException

    try:
        return context.server.traces.get_trace_info(trace_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _link_prompt(context: ViewContext, row: ReceiptRow) -> None:
    """Link a trace to the version of the prompt that its receipt names, when the log has that prompt."""
    reference = row.receipt["prompt_version"]
    if not reference:
        return
    try:
        digest = context.trail.registry.resolve(reference, kind="prompt").digest
    except RegistryError:
        return
    maker = context.trail.find(digest)
    known = None if maker is None else context.cursor.get(maker.leaf_hash, "prompt")
    if known is not None:
        name, _, version = known.rpartition("/")
        client = context.server.client
        client.link_prompt_versions_to_trace([client.get_prompt_version(name, version)], trace_id_of(row.receipt["id"]))


def _trace(
    context: ViewContext, entry: Entry, row: ReceiptRow, credits: list[Credit]
) -> "tuple[TraceInfo, list[Span]]":
    from mlflow.entities.trace_info import TraceInfo
    from mlflow.entities.trace_location import TraceLocation
    from mlflow.entities.trace_state import TraceState

    receipt = row.receipt
    trace_id = trace_id_of(receipt["id"])
    question, answer = _content(context, row)
    usage = {
        "input_tokens": receipt["prompt_tokens"],
        "output_tokens": receipt["completion_tokens"],
        "total_tokens": receipt["prompt_tokens"] + receipt["completion_tokens"],
    }
    record = receipt["adapter_record"]
    model_id = (context.model_id(record) if record else None) or context.model_of(receipt["adapter"] or receipt["base"])
    metadata = {
        TAG_RECEIPT: receipt["id"],
        TAG_LEAF: entry.leaf_hash,
        TAG_INDEX: str(entry.index),
        "trailmark.base": receipt["base"],
        "trailmark.adapter": receipt["adapter"] or "",
        "trailmark.adapter_record": record or "",
        "mlflow.modelId": model_id or "",
        "mlflow.trace.tokenUsage": json.dumps(usage),
        "mlflow.trace.user": receipt["tenant"],
    }
    info = TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(context.server.experiment_id),
        request_time=receipt["time_us"] // 1000,
        state=TraceState.ERROR if receipt["finish_reason"] == "error" else TraceState.OK,
        request_preview=_preview(question),
        response_preview=_preview(answer),
        client_request_id=receipt["id"],
        trace_metadata={key: value[:MAX_METADATA_CHARS] for key, value in metadata.items() if value},
        tags={
            "mlflow.traceName": receipt["model"],
            "mlflow.trace.spansLocation": "TRACKING_STORE",
            TAG_CONTRIBUTORS: ", ".join(credit.name for credit in credits),
        },
    )
    return info, _spans(entry, receipt, trace_id, usage, credits, question, answer)


def _content(context: ViewContext, row: ReceiptRow) -> tuple[Any, Any]:
    """Return what was asked and answered, or their digests when the content was erased."""
    receipt = row.receipt
    try:
        content = context.trail.get_json(row.content) if row.content else None
    except StoreError:
        content = None
    if content is None:
        return {"request_digest": receipt["request_digest"]}, {"output_digest": receipt["output_digest"]}
    answer = content["output_text"]
    if "messages" in content:
        message = {"role": "assistant", "content": answer}
        return {"messages": content["messages"]}, {
            "choices": [{"message": message, "finish_reason": receipt["finish_reason"]}]
        }
    return {"prompt": content.get("prompt", "")}, {"text": answer}


def _preview(value: Any) -> str:
    """Return the last message, prompt or answer as one line of text."""
    if "messages" in value:
        text = str(value["messages"][-1].get("content", ""))
    elif "choices" in value:
        text = str(value["choices"][0]["message"]["content"])
    else:
        text = str(next(iter(value.values())))
    return text[:MAX_PREVIEW_CHARS]


def _spans(
    entry: Entry,
    receipt: Mapping[str, Any],
    trace_id: str,
    usage: Mapping[str, int],
    credits: list[Credit],
    question: Any,
    answer: Any,
) -> "list[Span]":
    root, child = (sha256(f"{trace_id}/{name}".encode()).hexdigest()[:16] for name in ("completion", "provenance"))
    asked = {
        "mlflow.spanType": "CHAT_MODEL",
        "mlflow.spanInputs": question,
        "mlflow.spanOutputs": answer,
        "mlflow.chat.tokenUsage": dict(usage),
        "mlflow.llm.model": receipt["model"],
    }
    proof = {
        "receipt": receipt["id"],
        "log_leaf": entry.leaf_hash,
        "log_index": entry.index,
        "request_digest": receipt["request_digest"],
        "output_digest": receipt["output_digest"],
        "replica": receipt["replica"],
    }
    behind = {
        "summary": _summary(receipt, credits),
        "contributors": [
            {"name": item.name, "rows_kept": item.num_kept, "rows_given": item.num_in, "key_id": item.key_id}
            for item in credits
        ],
        **{
            key: receipt[key]
            for key in ("adapter_name", "adapter", "adapter_record", "base", "prompt_version", "retrieved")
        },
    }
    provenance = {"mlflow.spanType": "TASK", "mlflow.spanInputs": proof, "mlflow.spanOutputs": behind}
    time_ns = receipt["time_us"] * 1000
    return [
        _span("completion", trace_id, root, None, time_ns, asked),
        _span("provenance", trace_id, child, root, time_ns, provenance),
    ]


def _summary(receipt: Mapping[str, Any], credits: list[Credit]) -> str:
    """Return who is behind an answer, in Markdown; the adapter is the one that was loaded, whatever was asked for."""
    if receipt["adapter"] is None:
        return "Answered by the base model alone: no adapter, so no contributor."
    name = escape(receipt["adapter_name"] or receipt["adapter"])
    return f"Answered by the adapter **{name}**, trained on the rows of these contributors.\n\n{credit_list(credits)}"


def _span(
    name: str, trace_id: str, span_id: str, parent_id: str | None, time_ns: int, attributes: Mapping[str, Any]
) -> "Span":
    """Return a finished span. A receipt holds one time, so a span starts and ends there."""
    from mlflow.entities.span import Span

    values = {"mlflow.traceRequestId": trace_id, **attributes}
    return Span.from_dict(
        {
            "name": name,
            "trace_id": trace_id,
            "span_id": span_id,
            "parent_span_id": parent_id,
            "start_time_unix_nano": time_ns,
            "end_time_unix_nano": time_ns,
            "status": {"code": "STATUS_CODE_OK", "message": ""},
            "attributes": {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()},
            "events": [],
        }
    )
