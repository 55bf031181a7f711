"""The adapter as a CycloneDX 1.7 machine-learning bill of materials.

The model is the BOM's subject with its card, its files and the base as ancestor; datasets are `data` components; each
contributor is cited (`citations`, new in 1.7) for the datasets they handed in and for their rows in the refined ones.

Source: https://cyclonedx.org/docs/1.7/json/ (bom-1.7.schema.json), against which `validate` holds a document.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attribution.exports.dossier import (
    Base,
    Dossier,
    ExportError,
    Measurement,
    Person,
    Refined,
    Source,
    decimal,
    instant,
    spdx,
)
from attribution.exports.files import CARD_FILE, PROVENANCE_FILE, SIGNATURE_FILE
from attribution.licences import KNOWN_LICENCES

if TYPE_CHECKING:
    from attribution.trail import Entry

Json = dict[str, Any]
SCHEMA = "http://cyclonedx.org/schema/bom-1.7.schema.json"
LICENCE_IDS = frozenset(KNOWN_LICENCES)


def cyclonedx(dossier: Dossier) -> str:
    """Return the bill of materials as JSON text; the same for the same log state."""
    return json.dumps(_Bill(dossier).document(), indent=2, ensure_ascii=False) + "\n"


def validate(text: str) -> bool:
    """Hold a document to the official 1.7 schema; False when the validator (extra `exports`) is not installed.

    ExportError names the place and what is wrong with it.
    """
    try:
        from cyclonedx.exception import MissingOptionalDependencyException
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError:
        return False
    try:
        error = JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)
    except MissingOptionalDependencyException:
        return False
    if error is not None:
        place = "/".join(map(str, error.data.absolute_path))
        raise ExportError(f"CycloneDX document, {place}: {error.data.message[:300]}")
    return True


class _Bill:
    """Builds one document; remembers who has been introduced, for a bom-ref stands once."""

    def __init__(self, dossier: Dossier) -> None:
        self._dossier = dossier
        self._people = {person.key_id: person for person in dossier.people}
        self._introduced: set[str] = set()

    def document(self) -> Json:
        """Return the whole document."""
        dossier = self._dossier
        components = [*self._bases(), *map(self._refined, dossier.refined), *map(self._source, dossier.sources)]
        components += self._suites()
        places = {component["bom-ref"]: f"/components/{index}" for index, component in enumerate(components)}
        model = self._model()  # last: it introduces whoever no dataset did
        document = {
            "$schema": SCHEMA,
            "bomFormat": "CycloneDX",
            "specVersion": "1.7",
            "serialNumber": f"urn:uuid:{dossier.document_id}",
            "version": 1,
            "metadata": self._metadata(model),
            "components": components,
            "dependencies": list(self._dependencies()),
            "citations": list(self._citations(places)),
            "formulation": [{"bom-ref": "formula", "workflows": [self._workflow()]}],
        }
        if dossier.holes:
            holes = [ref(entry) for entry in dossier.entries if entry.record is None]
            known = {component["bom-ref"] for component in (model, *components)}
            document["compositions"] = [
                {
                    "aggregate": "incomplete",
                    "assemblies": [hole for hole in holes if hole in known] or [model["bom-ref"]],
                }
            ]
        return document

    def _metadata(self, model: Json) -> Json:
        log = self._dossier.log
        leaves = [
            {"name": f"trailmark:leaf:{item.leaf.kind}", "value": item.leaf_hash} for item in self._dossier.entries
        ]
        properties = [
            *_properties("log", {"origin": log.origin, "treeSize": log.tree_size, "root": log.root}),
            *_properties("log", {"checkpoint": log.checkpoint}),
            *leaves,
            *({"name": "trailmark:hole", "value": hole.sentence} for hole in self._dossier.holes),
            *({"name": "trailmark:void", "value": sentence} for sentence in self._dossier.void.values()),
        ]
        tool = {"type": "application", "bom-ref": "trailmark", "name": "trailmark", "version": self._code_version()}
        return {
            "timestamp": instant(log.time_us),
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [tool]},
            "component": model,
            "properties": properties,
        }

    def _code_version(self) -> str:
        record = self._dossier.entry.record
        return "unknown" if record is None else record.code.version or "unknown"

    def _model(self) -> Json:
        dossier = self._dossier
        model: Json = {
            "type": "machine-learning-model",
            "bom-ref": ref(dossier.entry),
            "name": dossier.name,
            "version": str(dossier.version) if dossier.version else dossier.digest,
            "description": _description(dossier),
            "hashes": [_hash(dossier.digest)],
            "externalReferences": list(self._model_references()),
            "modelCard": self._card(),
            "properties": _properties(
                "adapter", {"digest": dossier.digest, "publishedAs": dossier.reference if dossier.version else "never"}
            ),
        }
        strangers = [person for person in dossier.people if person.key_id not in self._introduced]
        if strangers:
            model["authors"] = [self._contact(person) for person in strangers]
        if dossier.licences:
            model["licenses"] = _licences(dossier.licences, acknowledgement="concluded")
        if dossier.base is not None:
            ancestor = {
                "type": "machine-learning-model",
                "name": dossier.base.name,
                "hashes": [_hash(dossier.base.digest)],
            }
            model["pedigree"] = {
                "ancestors": [ancestor],
                "notes": "The weights of the base stay as they are beside LoRA.",
            }
        model["components"] = [
            {
                "type": "file",
                "bom-ref": f"file:{path}",
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": hexadecimal}],
            }
            for path, hexadecimal in dossier.files.items()
        ]
        return model

    def _model_references(self) -> Iterator[Json]:
        dossier = self._dossier
        yield self._evidence(dossier.entry)
        if dossier.publication is not None:
            yield self._evidence(dossier.publication)
        yield {"type": "attestation", "url": PROVENANCE_FILE, "comment": "in-toto statement, SLSA provenance v1, DSSE"}
        yield {"type": "model-card", "url": CARD_FILE}
        if dossier.signature is not None:
            comment = f"OpenSSF model signature, {dossier.signature[1].algorithm}"
            yield {"type": "digital-signature", "url": SIGNATURE_FILE, "comment": comment}

    def _card(self) -> Json:
        dossier = self._dossier
        parameters: Json = {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": "low-rank adaptation (LoRA)",
            "datasets": [{"ref": ref(item.entry)} for item in dossier.refined],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        }
        if dossier.base is not None and dossier.base.body is not None:
            parameters["modelArchitecture"] = dossier.base.body.architecture
        card: Json = {"bom-ref": "model-card", "modelParameters": parameters}
        metrics = [metric for item in dossier.measurements for metric in _metrics(item)]
        if metrics:
            card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
        limits = list(dossier.limits)
        if not dossier.measurements:
            limits.append("No benchmark of this adapter is recorded in the log.")
        if dossier.base is not None and dossier.base.body is not None and dossier.base.body.note:
            limits.append(f"Base model: {dossier.base.body.note}.")
        if limits:
            card["considerations"] = {"technicalLimitations": limits}
        card["properties"] = _properties("train", dossier.settings or {})
        return card

    def _bases(self) -> Iterator[Json]:
        base = self._dossier.base
        if base is None:
            return
        component: Json = {
            "type": "machine-learning-model",
            "bom-ref": _base_ref(base),
            "name": base.name,
            "version": base.digest,
            "hashes": [_hash(base.digest)],
        }
        if base.body is not None:
            component["description"] = (
                f"{base.body.architecture}, {base.body.num_parameters:,} parameters. {base.body.note}"
            )
            component["licenses"] = _licences([spdx(base.body.licence)])
            component["properties"] = _properties("base", {"source": base.body.source, "dtype": base.body.dtype})
        if base.entry is not None:
            component["externalReferences"] = [self._evidence(base.entry)]
        yield component

    def _refined(self, refined: Refined) -> Json:
        component = self._data(refined.entry, refined.name, refined.digest)
        if refined.body is None:
            return component
        component["description"] = f"{refined.body.num_kept} of {refined.body.num_in} rows, refined by rules"
        people = [self._people[person] for person, num_kept in refined.kept.items() if num_kept]
        component["authors"] = [self._contact(person) for person in people]
        return component

    def _source(self, source: Source) -> Json:
        component = self._data(source.entry, source.name, source.digest)
        if source.body is None:
            return component
        component["description"] = f"{source.body.num_rows} rows handed in as {source.body.source_file_name}"
        component["licenses"] = _licences([spdx(source.body.licence)])
        if source.key_id in self._people:
            person = self._people[source.key_id]
            component["authors"] = [self._contact(person)]
            component["data"][0]["governance"] = {"owners": [{"contact": {"name": person.label}}]}
        return component

    def _suites(self) -> Iterator[Json]:
        for item in self._dossier.measurements:
            yield self._data(item.entry, f"benchmark {item.body.name}", item.body.suite)

    def _data(self, entry: "Entry", name: str, digest: str | None) -> Json:
        component: Json = {
            "type": "data",
            "bom-ref": ref(entry),
            "name": name,
            "data": [{"type": "dataset", "name": name}],
            "externalReferences": [self._evidence(entry)],
        }
        if digest is not None:
            component |= {"version": digest, "hashes": [_hash(digest)]}
        return component

    def _evidence(self, entry: "Entry") -> Json:
        comment = f"{entry.leaf.kind} record {entry.leaf_hash}, entry {entry.index} of log {self._dossier.log.origin}"
        return {"type": "evidence", "url": self._dossier.proof_file_of[entry.leaf_hash], "comment": comment}

    def _contact(self, person: Person) -> Json:
        contact = {"name": person.label}
        if person.key_id not in self._introduced:
            self._introduced.add(person.key_id)
            return {"bom-ref": contributor_ref(person.key_id), **contact}
        return contact

    def _dependencies(self) -> Iterator[Json]:
        dossier = self._dossier
        shown = {item.entry.leaf_hash for item in dossier.refined} | {item.entry.leaf_hash for item in dossier.sources}
        bases = [] if dossier.base is None else [_base_ref(dossier.base)]
        for entry in (dossier.entry, *(item.entry for item in dossier.refined)):
            parents = sorted(f"record:{leaf}" for leaf in entry.leaf.parents if leaf in shown)
            yield {"ref": ref(entry), "dependsOn": [*(bases if entry is dossier.entry else ()), *parents]}

    def _citations(self, places: Mapping[str, str]) -> Iterator[Json]:
        for source in self._dossier.sources:
            if source.body is not None and source.key_id in self._people:
                note = f"Handed in {source.body.num_rows} rows, signed with key {source.signed_with}"
                yield _citation(places, source.entry, source.key_id, note)
        for refined in self._dossier.refined:
            for person, num_kept in refined.kept.items():
                if num_kept:
                    keys = " or ".join(self._people[person].keys)
                    note = f"{num_kept} of the rows of {refined.name}, signed with key {keys}"
                    yield _citation(places, refined.entry, person, note)

    def _workflow(self) -> Json:
        """How it was made: one task per record that made or measured something."""
        acts = {
            "dataset": "other",
            "refinement": "build",
            "adapter": "build",
            "benchmark": "test",
            "publication": "release",
        }
        tasks = [self._task(entry, acts[entry.leaf.kind]) for entry in self._dossier.entries if entry.leaf.kind in acts]
        return {
            "bom-ref": "workflow",
            "uid": str(self._dossier.document_id),
            "name": f"making of {self._dossier.reference}",
            "taskTypes": sorted({task["taskTypes"][0] for task in tasks}),
            "tasks": tasks,
        }

    def _task(self, entry: "Entry", task_type: str) -> Json:
        task: Json = {
            "bom-ref": f"task:{entry.leaf_hash}",
            "uid": entry.leaf_hash,
            "name": entry.leaf.kind,
            "taskTypes": [task_type],
            "timeEnd": instant(entry.leaf.time_us),
            "resourceReferences": [{"externalReference": self._evidence(entry)}],
        }
        record = entry.record
        if record is None:
            return task | {"description": "erased"}
        facts: dict[str, Any] = {"code": record.code.commit or "unknown", "codeDirty": record.code.dirty}
        facts |= {"environment": record.environment, "config": record.config or "none", "seed": record.seed}
        rules = getattr(record.body, "rules", ())
        return task | {
            "properties": [
                *_properties("task", facts),
                *({"name": f"trailmark:rule:{rule.name}", "value": f"{rule.digest} {rule.params}"} for rule in rules),
            ]
        }


def ref(entry: "Entry") -> str:
    """Return the bom-ref of what a record made."""
    return f"record:{entry.leaf_hash}"


def _base_ref(base: Base) -> str:
    return ref(base.entry) if base.entry is not None else base.digest


def contributor_ref(key_id: str) -> str:
    """Return the bom-ref of a contributor."""
    return f"contributor:{key_id}"


def _citation(places: Mapping[str, str], entry: "Entry", key_id: str, note: str) -> Json:
    return {
        "bom-ref": f"citation:{entry.leaf_hash}:{key_id}",
        "pointers": [places[ref(entry)]],
        "timestamp": instant(entry.leaf.time_us),
        "attributedTo": contributor_ref(key_id),
        "process": f"task:{entry.leaf_hash}",
        "note": note,
    }


def _metrics(item: Measurement) -> Iterator[Json]:
    """Adapter, base and their difference with its interval, for each metric of a benchmark."""
    where = f"{item.body.name}, {item.body.num_items} items, record {item.entry.leaf_hash}"
    interval = "" if item.confidence is None else f", {item.confidence:.0%} interval"
    for metric in item.body.metrics:
        yield {"type": metric.metric, "value": decimal(metric.adapter_micro), "slice": where}
        yield {"type": f"{metric.metric} of the base", "value": decimal(metric.base_micro), "slice": where}
        yield {
            "type": f"{metric.metric}, adapter minus base{interval}",
            "value": decimal(metric.delta_micro),
            "slice": where,
            "confidenceInterval": {
                "lowerBound": decimal(metric.low_micro),
                "upperBound": decimal(metric.high_micro),
            },
        }


def _description(dossier: Dossier) -> str:
    if dossier.body is None:
        return "LoRA adapter; the record of its training was erased"
    body = dossier.body
    return f"LoRA adapter of rank {body.rank} for {', '.join(body.target_modules)}, {body.num_steps} steps"


def _licences(names: Iterable[str], *, acknowledgement: str = "declared") -> list[Json]:
    """Licences as the schema wants them: an id it lists, an expression, or a name."""
    found: list[Json] = []
    for name in names:
        if name in LICENCE_IDS:
            found.append({"license": {"id": name, "acknowledgement": acknowledgement}})
        elif " AND " in name or " OR " in name or name.startswith("LicenseRef-"):
            found.append({"expression": name, "acknowledgement": acknowledgement})
        else:
            found.append({"license": {"name": name, "acknowledgement": acknowledgement}})
    return found


def _hash(digest: str) -> Json:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _properties(group: str, facts: Mapping[str, Any]) -> list[Json]:
    """Facts as properties of our namespace, whose values are text."""
    return [
        {"name": f"trailmark:{group}:{name}", "value": value if isinstance(value, str) else json.dumps(value)}
        for name, value in facts.items()
    ]
