"""What the writers of the MLflow view share: the trail, the server, what stands for which record, and who made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attribution.bodies import RefinementBody
from attribution.lineage import Lineage, record_bundle
from attribution.mlflow_cursor import Cursor
from attribution.mlflow_notes import Credit, credits_json, note
from attribution.mlflow_server import (
    MAX_TAG_CHARS,
    TAG_CONTRIBUTORS,
    TAG_DIGEST,
    TAG_INDEX,
    TAG_KIND,
    TAG_LEAF,
    TAG_NOTE,
    MlflowServer,
    input_digest,
)
from attribution.pages.show import LineagePages
from attribution.records import Artefact, Record
from attribution.trail import Entry, Trail

if TYPE_CHECKING:
    from mlflow.entities import Dataset, Metric

MODEL_KINDS = frozenset({"adapter", "base_model"})
PAGE_FILE = "lineage.html"
NOT_DATASETS = MODEL_KINDS | {"trace", "prompt", "config", "receipts", "workflow"}


@dataclass(frozen=True)
class ViewContext:
    """The trail that is shown, the server that shows it, and the memory of what is where."""

    trail: Trail
    lineage: Lineage
    pages: LineagePages
    server: MlflowServer
    cursor: Cursor

    def credits(self, entry: Entry) -> list[Credit]:
        """Return the contributors of the nearest refinements at or above a record, their rows summed."""
        given: dict[str, int] = {}
        kept: dict[str, int] = {}
        queue, seen = [entry], {entry.leaf_hash}
        while queue:
            current = queue.pop()
            if current.record is not None and isinstance(current.record.body, RefinementBody):
                for rows in current.record.body.per_contributor:
                    given[rows.key_id] = given.get(rows.key_id, 0) + rows.num_in
                    kept[rows.key_id] = kept.get(rows.key_id, 0) + rows.num_kept
                continue
            for parent in current.leaf.parents:
                if parent not in seen:
                    seen.add(parent)
                    queue.append(self.trail.entry(parent))
        names = self.lineage.contributor_names()
        return [Credit(key_id, names.get(key_id, key_id[:12]), given[key_id], kept[key_id]) for key_id in given]

    def note(self, summary: str, entry: Entry, credits: Sequence[Credit], *, digest: str | None) -> str:
        """Return the description of a run, model or version."""
        return note(summary, entry, credits, digest=digest, has_pages=self.server.has_pages)

    def signer_name(self, entry: Entry) -> str:
        """Return the name of who signed a contribution, or the start of their key id."""
        key_id = next((party.key_id for party in _record(entry).contributors), "")
        return self.lineage.contributor_names().get(key_id, key_id[:12] or "nobody named")

    def tags(self, entry: Entry, *, digest: str | None) -> dict[str, str]:
        """Return the tags that tie a run, model or version to its record; `reconcile` compares exactly these."""
        tags = {TAG_LEAF: entry.leaf_hash, TAG_INDEX: str(entry.index), TAG_KIND: entry.leaf.kind}
        if digest:
            tags[TAG_DIGEST] = digest
        credits = self.credits(entry)
        if credits:
            tags[TAG_CONTRIBUTORS] = credits_json(credits, max_chars=MAX_TAG_CHARS)
        return tags

    def run(self, entry: Entry, *, name: str, start_us: int, digest: str | None, note: str) -> str:
        """Return the run that stands for a record, made if there is none yet."""
        known = self.cursor.get(entry.leaf_hash, "run")
        if known is not None:
            return known
        found = self.server.find_run(entry.leaf_hash)
        if found is None:
            tags = {**self.tags(entry, digest=digest), **_source_tags(_record(entry)), TAG_NOTE: note}
            client = self.server.client
            found = client.create_run(self.server.experiment_id, start_time=start_us // 1000, tags=tags, run_name=name)
        run_id = str(found.info.run_id)
        self.cursor.put(entry.leaf_hash, "run", run_id)
        return run_id

    def finish_run(self, entry: Entry, run_id: str, *, status: str = "FINISHED") -> None:
        """Store the run's lineage page, its resolved config and the record's proof, and end it at the record's time."""
        record = _record(entry)
        client = self.server.client
        client.log_text(run_id, self.pages.page(entry.leaf_hash), PAGE_FILE)
        client.log_dict(run_id, record_bundle(self.trail, entry.leaf_hash), "record.json")
        if record.config is not None and self.trail.store.has(record.config):
            self._log_config(run_id, record.config)
        client.set_terminated(run_id, status, end_time=record.time_us // 1000)

    def _log_config(self, run_id: str, digest: str) -> None:
        """Store a resolved configuration, with its values as parameters; a workflow's definition as the text it is."""
        try:
            config = self.trail.get_json(digest)
        except ValueError:
            text = self.trail.store.get_blob(digest).decode("utf-8", errors="replace")
            self.server.client.log_text(run_id, text, "config.yaml")
            return
        self.server.client.log_dict(run_id, config, "config.json")
        self.server.log_params(run_id, flat(config, "config."))  # MLflow lets no name have two values

    def model(
        self, entry: Entry, *, name: str, model_type: str, params: Mapping[str, Any], note: str, run_id: str | None
    ) -> str:
        """Return the LoggedModel that stands for an adapter or base model, made if there is none yet.

        It is external (the weights stay in our store) and ready at once.
        """
        known = self.model_id(entry.leaf_hash)
        if known is not None:
            return known
        digest = _record(entry).outputs[0].digest
        model = self.server.client.create_logged_model(
            self.server.experiment_id,
            name="".join("-" if letter in "/:.%\"'" else letter for letter in name) or entry.leaf.kind,
            source_run_id=run_id,
            tags={**self.tags(entry, digest=digest), "mlflow.model.isExternal": "true", TAG_NOTE: note},
            params={key: str(value) for key, value in params.items()},
            model_type=model_type,
        )
        self.cursor.put(entry.leaf_hash, "model", str(model.model_id))
        return str(model.model_id)

    def finish_model(self, entry: Entry, model_id: str) -> None:
        """Store the model's lineage page, anew each time something is learned of it, and mark the model ready."""
        page = self.pages.page(entry.leaf_hash)
        self.server.log_model_text(model_id, page, PAGE_FILE)
        self.server.client.finalize_logged_model(model_id, "READY")

    def model_id(self, leaf: str) -> str | None:
        """Return the LoggedModel of a record's leaf, or None."""
        known = self.cursor.get(leaf, "model")
        if known is None:
            found = self.server.find_model(leaf)
            if found is None:
                return None
            known = str(found.model_id)
            self.cursor.put(leaf, "model", known)
        return known

    def model_of(self, digest: str | None) -> str | None:
        """Return the LoggedModel of an adapter's or base model's digest, or None when its record is not in the log."""
        entry = self.trail.find(digest) if digest else None
        return None if entry is None else self.model_id(entry.leaf_hash)

    def datasets(self, record: Record, *, context: str) -> "list[tuple[Dataset, dict[str, str]]]":
        """Return the datasets among a record's inputs as MLflow wants them, each with its tags."""
        return [
            self.dataset(artefact, context=context) for artefact in record.inputs if artefact.kind not in NOT_DATASETS
        ]

    def dataset(self, artefact: Artefact, *, context: str) -> "tuple[Dataset, dict[str, str]]":
        """Return one dataset; its digest is cut to what MLflow takes, the whole stands in a tag."""
        import json

        from mlflow.entities import Dataset

        maker = self.trail.find(artefact.digest)
        body = None if maker is None or maker.record is None else maker.record.body
        made = () if maker is None or maker.record is None else maker.record.outputs
        name = next((output.name for output in made if output.digest == artefact.digest), artefact.name)
        num_rows = getattr(body, "num_rows", getattr(body, "num_kept", None))
        profile = {} if num_rows is None else {"num_rows": num_rows}
        source = {"digest": artefact.digest, **({"leaf": maker.leaf_hash} if maker else {})}
        tags = {"mlflow.data.context": context, TAG_DIGEST: artefact.digest}
        if maker is not None:
            tags[TAG_LEAF] = maker.leaf_hash
        data = Dataset(
            name, input_digest(artefact.digest), "trailmark", json.dumps(source), profile=json.dumps(profile)
        )
        return data, tags


def metrics_at(
    values: "Mapping[str, float]",
    time_us: int,
    *,
    step: int = 0,
    model_id: str | None = None,
    dataset: "Dataset | None" = None,
) -> "list[Metric]":
    """Return metrics of one moment; with a model they also stand on that model's page, beside the dataset."""
    from mlflow.entities import Metric

    place = {"dataset_name": dataset.name, "dataset_digest": dataset.digest} if dataset is not None else {}
    return [
        Metric(key, float(value), time_us // 1000, step, model_id=model_id, **place) for key, value in values.items()
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `section.name: value`."""
    flattened: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flattened.update(flat(value, f"{name}."))
        else:
            flattened[name] = value
    return flattened


def _record(entry: Entry) -> Record:
    assert entry.record is not None, "an erased record has no view"
    return entry.record


def _source_tags(record: Record) -> dict[str, str]:
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"trailmark {record.code.version}",
        "mlflow.user": "trailmark",
    }
    if record.code.commit:
        tags["mlflow.source.git.commit"] = record.code.commit
        tags["trailmark.dirty"] = str(record.code.dirty).lower()
    tags["trailmark.environment"] = record.environment
    return tags
