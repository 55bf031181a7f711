"""The adapter's lineage as OpenLineage run events, one JSON object a line: what its HTTP and file transports take.

Each record that made, measured or handed in something is a run of a job. A run has a START and a COMPLETE at the same
moment, the one at which it was logged, for the log knows no other.

Source: openlineage.io/spec/2-0-2/OpenLineage.json and the facets' own schemas, whose versions stand in their URLs. Our
own facets' schema is schemas/openlineage.json beside this file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from attribution.exports.dossier import Dossier, instant
from attribution.lineage import label_of

if TYPE_CHECKING:
    from attribution.records import Artefact
    from attribution.trail import Entry

Json = dict[str, Any]
SPEC = "https://openlineage.io/spec"
OWN_SCHEMA = "https://trailmark.dev/schemas/openlineage/1-0-0.json#/$defs"
PRODUCER = "https://trailmark.dev/trailmark"
JOBS = {
    "dataset": "contribute",
    "base_model": "import",
    "refinement": "refine",
    "adapter": "train",
    "benchmark": "benchmark",
    "publication": "publish",
    "model_signature": "sign",
}
MODEL_KINDS = frozenset({"adapter", "base_model"})
# Columns of a refined dataset and the contributed column each was computed from (pipelines/refine/table.py).
COLUMNS = {
    "messages": ("messages", "TRANSFORMATION"),
    "original_content_id": ("content_id", "IDENTITY"),
    "line_number": ("line_number", "IDENTITY"),
}


def openlineage(dossier: Dossier) -> str:
    """Return the events as JSON lines; the same for the same log state."""
    events = (event for entry in dossier.entries if entry.leaf.kind in JOBS for event in _Events(dossier, entry).both())
    return "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)


def run_id(entry: "Entry") -> str:
    """Return the UUID (version 7: the record's time, then bits of its leaf hash) that names a record's run."""
    bits = int(entry.leaf_hash[:20], 16) >> 6  # 74 bits: 12 before the variant, 62 after it
    number = (entry.leaf.time_us // 1000) << 80 | 0x7 << 76 | bits >> 62 << 64 | 0b10 << 62 | bits & (1 << 62) - 1
    return str(UUID(int=number))


def _facet(schema: str, values: Mapping[str, Any]) -> Json:
    return {"_producer": PRODUCER, "_schemaURL": schema, **values}


def _spec_facet(name: str, version: str, values: Mapping[str, Any], *, file: str | None = None) -> Json:
    return _facet(f"{SPEC}/facets/{version}/{file or name}.json#/$defs/{name}", values)


def _own_facet(name: str, values: Mapping[str, Any]) -> Json:
    return _facet(f"{OWN_SCHEMA}/{name}", values)


@dataclass(frozen=True)
class _Events:
    """The two events of one record."""

    dossier: Dossier
    entry: "Entry"

    @property
    def namespace(self) -> str:
        return f"trailmark://{self.dossier.log.origin}"

    def both(self) -> Iterator[Json]:
        """Yield START, then COMPLETE with inputs and outputs."""
        inputs, outputs = self._inputs(), self._outputs()
        for event_type in ("START", "COMPLETE"):
            yield {
                "eventType": event_type,
                "eventTime": instant(self.entry.leaf.time_us),
                "producer": PRODUCER,
                "schemaURL": f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent",
                "run": {"runId": run_id(self.entry), "facets": self._run_facets()},
                "job": self._job(),
                "inputs": inputs,
                "outputs": outputs,
            }

    def _job(self) -> Json:
        kind = self.entry.leaf.kind
        words = "erased" if self.entry.record is None else label_of(self.entry)
        job_type = {"processingType": "BATCH", "integration": "TRAILMARK", "jobType": kind.upper()}
        text = {"description": f"{kind} record {self.entry.leaf_hash}", "contentType": "text/plain"}
        facets = {
            "jobType": _spec_facet("JobTypeJobFacet", "2-0-4", job_type),
            "documentation": _spec_facet("DocumentationJobFacet", "1-1-0", text),
        }
        return {"namespace": self.namespace, "name": f"{JOBS[kind]}.{words}", "facets": facets}

    def _run_facets(self) -> Json:
        entry, log, record = self.entry, self.dossier.log, self.entry.record
        facts: Json = {
            "leafHash": entry.leaf_hash,
            "logIndex": entry.index,
            "kind": entry.leaf.kind,
            "parents": list(entry.leaf.parents),
            "logOrigin": log.origin,
            "treeSize": log.tree_size,
            "root": log.root,
            "proof": self.dossier.proof_file_of[entry.leaf_hash],
            "erased": record is None,
        }
        if void := self.dossier.void.get(entry.leaf_hash):
            facts["void"] = void
        facets = {}
        if record is not None:
            facts |= {"commit": record.code.commit, "localChanges": record.code.dirty}
            facts |= {"environment": record.environment, "seed": record.seed, "attempt": record.attempt}
            facts |= {} if record.config is None else {"config": record.config}
            engine = {"version": record.code.version or "unknown", "name": "trailmark"}
            facets["processing_engine"] = _spec_facet("ProcessingEngineRunFacet", "1-1-1", engine)
        return {**facets, "trailmark_record": _own_facet("TrailmarkRecordRunFacet", facts)}

    def _inputs(self) -> list[Json]:
        if self.entry.record is not None:
            return [self._dataset(item) for item in self.dossier.inputs_of(self.entry.record)]
        return []

    def _outputs(self) -> list[Json]:
        """What the record made; of an erased one, the adapter or base model that its public header names."""
        if self.entry.record is None:
            made = [item for item in self.entry.leaf.subjects if item.kind == self.entry.leaf.kind]
            return [
                {"namespace": self.namespace, "name": f"{item.kind}/erased", "facets": _version(item.digest)}
                for item in made
            ]
        found = []
        for item in self.entry.record.outputs:
            dataset = self._dataset(item)
            if self.entry.leaf.kind in ("refinement", "adapter", "base_model", "benchmark"):
                dataset["facets"] |= self._lineage(self.dossier.inputs_of(self.entry.record))
            if item.kind == "refined":
                dataset["facets"] |= self._columns(self.dossier.inputs_of(self.entry.record))
            rows = getattr(
                self.entry.record.body, {"dataset": "num_rows", "refined": "num_kept"}.get(item.kind, ""), None
            )
            if rows is not None:
                statistics = _spec_facet("OutputStatisticsOutputDatasetFacet", "1-0-2", {"rowCount": rows})
                dataset["outputFacets"] = {"outputStatistics": statistics}
            found.append(dataset)
        return found

    def _dataset(self, item: "Artefact") -> Json:
        model = {"datasetType": "MODEL" if item.kind in MODEL_KINDS else "FILE", "subType": item.kind.upper()}
        facets: Json = {
            **_version(item.digest),
            "datasetType": _spec_facet("DatasetTypeDatasetFacet", "1-0-1", model),
        }
        people = self._people(item)
        if people:
            licence = next(
                (it.body.licence for it in self.dossier.sources if it.digest == item.digest and it.body), None
            )
            facts = {"contributors": people, **({"licence": licence} if licence else {})}
            owners = [{"name": f"contributor:{person['name']}", "type": "CONTRIBUTOR"} for person in people]
            facets["ownership"] = _spec_facet("OwnershipDatasetFacet", "1-0-1", {"owners": owners})
            facets["trailmark_contributors"] = _own_facet("TrailmarkContributorsDatasetFacet", facts)
        return {"namespace": self.namespace, "name": f"{item.kind}/{item.name}", "facets": facets}

    def _people(self, item: "Artefact") -> list[Json]:
        """Whose rows are in a dataset, or behind the adapter."""
        names = {person.key_id: person.label for person in self.dossier.people}
        counts: dict[str, int] = {}
        for source in self.dossier.sources:
            if source.digest == item.digest and source.body is not None and source.key_id is not None:
                counts[source.key_id] = source.body.num_rows
        for refined in self.dossier.refined:
            if refined.digest == item.digest:
                counts.update({person: num_kept for person, num_kept in refined.kept.items() if num_kept})
        if item.digest == self.dossier.digest:
            counts.update({person.key_id: person.num_kept for person in self.dossier.people if person.num_kept})
        return [{"keyId": key, "name": names.get(key, key), "numRows": number} for key, number in counts.items()]

    def _lineage(self, inputs: Sequence["Artefact"]) -> Json:
        sources = [
            {"namespace": self.namespace, "name": f"{item.kind}/{item.name}", "type": "DATASET"} for item in inputs
        ]
        values = {"inputs": sources, "fields": {}}
        return {"lineage": _spec_facet("LineageDatasetFacet", "1-0-0", values, file="LineageFacet")}

    def _columns(self, inputs: Sequence["Artefact"]) -> Json:
        """Which contributed column each refined one was computed from; rules drop rows by the messages."""
        field = partial(_input_field, self.namespace, [item for item in inputs if item.kind == "dataset"])
        columns = {
            column: {"inputFields": field(source, type="DIRECT", subtype=subtype)}
            for column, (source, subtype) in COLUMNS.items()
        }
        values = {"fields": columns, "dataset": field("messages", type="INDIRECT", subtype="FILTER")}
        return {"columnLineage": _spec_facet("ColumnLineageDatasetFacet", "1-2-0", values)}


def _input_field(namespace: str, inputs: Sequence["Artefact"], field: str, **transformation: str) -> list[Json]:
    return [
        {
            "namespace": namespace,
            "name": f"{item.kind}/{item.name}",
            "field": field,
            "transformations": [{**transformation, "description": "", "masking": False}],
        }
        for item in inputs
    ]


def _version(digest: str) -> Json:
    return {"version": _spec_facet("DatasetVersionDatasetFacet", "1-0-1", {"datasetVersion": digest})}
