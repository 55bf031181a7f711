"""Does MLflow say what the log says? The expected entities, from the records alone, against those on the server."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from attribution.bodies import (
    AdapterBody,
    BaseModelBody,
    BenchmarkBody,
    InfluenceBody,
    PromptBody,
    PublicationBody,
    SettlementBody,
)
from attribution.mlflow_context import MODEL_KINDS, ViewContext
from attribution.mlflow_datasets import TAG_ROWS_DIGEST, row_tags, shown_rows, stored_digest
from attribution.mlflow_prompts import TAG_TEXT, prompt_tags, registered, template_of, versions_of
from attribution.mlflow_runs import registered_name
from attribution.mlflow_server import TAG_LEAF, UNSHOWABLE
from attribution.mlflow_traces import rows_of, trace_id_of
from attribution.mlflow_workflows import WORKFLOW_KINDS
from attribution.trail import Entry

Role = Literal["run", "model", "version", "dataset", "prompt", "trace", "assessment"]
Entities = dict[str, tuple[str, dict[str, str]]]
"""Key of an entity among those of its role -> its MLflow id and tags."""


@dataclass(frozen=True)
class Expected:
    """One entity that a record must have in MLflow; `key` names it among those of its role."""

    role: Role
    key: str
    leaf: str
    tags: dict[str, str]


@dataclass(frozen=True)
class Difference:
    """One way in which the view departs from the log."""

    problem: Literal["missing", "altered", "unknown"]
    role: Role
    leaf: str
    mlflow_id: str
    detail: str
    tags: dict[str, str] = field(default_factory=dict)

    def clear(self, context: ViewContext) -> None:
        """Remove an altered dataset of rows, so that it is written anew: MLflow only ever adds to its records."""
        if self.problem == "altered" and self.role == "dataset":
            context.server.client.delete_dataset(self.mlflow_id)

    def mend(self, context: ViewContext) -> None:
        """Set altered tags back to what the record says."""
        if self.problem != "altered":
            return
        client = context.server.client
        if self.role == "run":
            for key, value in self.tags.items():
                client.set_tag(self.mlflow_id, key, value)
        elif self.role == "model":
            client.set_logged_model_tags(self.mlflow_id, self.tags)
        elif self.role == "version":
            name, _, version = self.mlflow_id.rpartition("/")
            for key, value in self.tags.items():
                client.set_model_version_tag(name, version, key, value)
        elif self.role == "prompt":
            name, _, version = self.mlflow_id.rpartition("/")
            for key, value in self.tags.items():
                client.set_prompt_version_tag(name, version, key, value)


def expected_entities(context: ViewContext) -> Iterator[Expected]:
    """Yield what the log's records, as far as they are not erased, must have in MLflow."""
    traces: set[str] = set()
    for entry in context.trail.entries():
        if entry.record is None:
            continue
        if isinstance(entry.record.body, InfluenceBody):
            if entry.record.body.top and trace_id_of(entry.record.body.receipt_id) in traces:
                yield Expected("assessment", entry.leaf_hash, entry.leaf_hash, {})
            continue
        try:
            wanted = list(_expected_of(context, entry))
        except UNSHOWABLE:  # set aside when it was written; it stays missing
            wanted = [Expected("trace", f"log entry {entry.index}", entry.leaf_hash, {})]
        for expected in wanted:
            if expected.role == "trace":
                traces.add(expected.key)
            yield expected


def differences(context: ViewContext) -> list[Difference]:
    """Return everything that is missing, altered, or has no record behind it."""
    traces, assessments = _traces_and_assessments(context)
    actual: dict[Role, Entities] = {
        "run": _runs(context),
        "model": _models(context),
        "version": _versions(context),
        "dataset": _row_datasets(context),
        "prompt": _prompts(context),
        "trace": traces,
        "assessment": assessments,
    }
    found = []
    for expected in expected_entities(context):
        entity = actual[expected.role].pop(expected.key, None)
        if entity is None:
            found.append(Difference("missing", expected.role, expected.leaf, "", "not in MLflow", expected.tags))
            continue
        mlflow_id, tags = entity
        wrong = [key for key, value in expected.tags.items() if tags.get(key) != value]
        if wrong:
            detail = ", ".join(f"{key} is {tags.get(key)!r}" for key in wrong)
            found.append(Difference("altered", expected.role, expected.leaf, mlflow_id, detail, expected.tags))
    for role, entities in actual.items():
        for key, (mlflow_id, tags) in entities.items():
            found.append(
                Difference("unknown", role, tags.get(TAG_LEAF, ""), mlflow_id, f"no record stands behind {key}")
            )
    return found


def _expected_of(context: ViewContext, entry: Entry) -> Iterator[Expected]:
    assert entry.record is not None
    record, body, leaf = entry.record, entry.record.body, entry.leaf_hash
    kind = entry.leaf.kind
    if kind in ("dataset", "refinement", "adapter", "base_model"):
        tags = context.tags(entry, digest=record.outputs[0].digest)
        if kind != "base_model":
            yield Expected("run", leaf, leaf, tags)
        if kind in MODEL_KINDS:
            yield Expected("model", leaf, leaf, tags)
        if kind == "refinement":
            yield Expected("dataset", leaf, leaf, row_tags(context, entry, shown_rows(context, entry)))
    elif kind in WORKFLOW_KINDS:
        yield Expected("run", leaf, leaf, context.tags(entry, digest=None))
    elif isinstance(body, PromptBody):
        yield Expected("prompt", leaf, leaf, {**prompt_tags(context, entry), TAG_TEXT: template_of(context, entry)})
    elif isinstance(body, BenchmarkBody | SettlementBody):
        yield Expected("run", leaf, leaf, context.tags(entry, digest=body.adapter))
    elif isinstance(body, PublicationBody):
        maker = context.trail.find(body.digest)
        if (
            maker is not None
            and maker.record is not None
            and isinstance(maker.record.body, AdapterBody | BaseModelBody)
        ):
            yield Expected("version", leaf, leaf, context.tags(entry, digest=body.digest))
    elif kind == "completions":
        for row in rows_of(context, entry):
            tags = {TAG_LEAF: leaf, "trailmark.adapter": row.receipt["adapter"] or ""}
            yield Expected("trace", trace_id_of(row.receipt["id"]), leaf, tags)


def _runs(context: ViewContext) -> Entities:
    return {
        run.data.tags.get(TAG_LEAF, f"run {run.info.run_id}"): (run.info.run_id, dict(run.data.tags))
        for run in context.server.runs()
    }


def _models(context: ViewContext) -> Entities:
    return {
        model.tags.get(TAG_LEAF, f"model {model.model_id}"): (model.model_id, dict(model.tags))
        for model in context.server.models()
    }


def _versions(context: ViewContext) -> Entities:
    names = {registered_name(published.name) for published in context.trail.registry.list()}
    versions = [
        version for name in sorted(names) for version in context.server.client.search_model_versions(f"name = '{name}'")
    ]
    return {
        version.tags.get(TAG_LEAF, f"version {version.name}/{version.version}"): (
            f"{version.name}/{version.version}",
            dict(version.tags),
        )
        for version in versions
    }


def _row_datasets(context: ViewContext) -> Entities:
    """The datasets of rows; what their records say now stands in place of the tag that says what was written."""
    return {
        dataset.tags.get(TAG_LEAF, f"dataset {dataset.dataset_id}"): (
            dataset.dataset_id,
            {**dataset.tags, TAG_ROWS_DIGEST: stored_digest(context, dataset)},
        )
        for dataset in context.server.row_datasets()
    }


def _prompts(context: ViewContext) -> Entities:
    return {
        version.tags.get(TAG_LEAF, f"prompt {name}/{version.version}"): (
            f"{name}/{version.version}",
            {**version.tags, TAG_TEXT: version.template},
        )
        for name in registered(context)
        for version in versions_of(context, name)
    }


def _traces_and_assessments(context: ViewContext) -> tuple[Entities, Entities]:
    traces: Entities = {}
    assessments: Entities = {}
    for info in context.server.trace_infos():
        traces[info.trace_id] = (info.trace_id, {"trailmark.adapter": "", **info.trace_metadata})
        for item in info.assessments:
            leaf = (item.metadata or {}).get(TAG_LEAF)
            if leaf:  # people may add assessments of their own
                assessments[leaf] = (info.trace_id, {TAG_LEAF: leaf})
    return traces, assessments
