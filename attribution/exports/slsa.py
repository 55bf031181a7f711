"""How the adapter was made, as an in-toto statement with SLSA provenance, in a DSSE envelope signed by the operator.

The subjects are the adapter's files by their SHA-256, so that a tool which knows only files can check them; the last is
manifest.json, whose SHA-256 is the adapter's digest. Levels are not claimed: nothing here says who watched the builder.

Sources: slsa.dev/spec/v1.1/provenance (predicate), in-toto attestation spec/v1/statement.md and resource_descriptor.md.
"""

from base64 import b64encode
from typing import TYPE_CHECKING, Any

import rfc8785

from attribution.exports.dossier import Dossier, instant
from attribution.records import PAYLOAD_TYPE, STATEMENT_TYPE, Signer, pre_auth_encoding, to_plain

if TYPE_CHECKING:
    from attribution.trail import Entry

Json = dict[str, Any]
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://trailmark.dev/build/lora-adapter/v1"
BUILDER = "https://trailmark.dev/builder"


def slsa_envelope(dossier: Dossier, signer: Signer) -> str:
    """Return the signed envelope as one line of JSON; the same for the same log state and key."""
    payload = rfc8785.dumps(slsa_statement(dossier))
    signature = {"keyid": signer.key_id, "sig": b64encode(signer.sign(pre_auth_encoding(payload))).decode()}
    envelope: Any = {"payload": b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}
    return rfc8785.dumps(envelope).decode() + "\n"


def slsa_statement(dossier: Dossier) -> Json:
    """Return the in-toto statement."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": path, "digest": {"sha256": value}} for path, value in dossier.files.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"buildDefinition": _definition(dossier), "runDetails": _run(dossier)},
    }


def _definition(dossier: Dossier) -> Json:
    """What was asked for, and every artefact that went in, with the people behind it as annotations."""
    record = dossier.entry.record
    parameters: Json = {"name": dossier.name}
    if dossier.body is not None:
        parameters |= {"base": dossier.body.base, "dataset": dossier.body.dataset}
    internal: Json = {"log": dossier.statement()}
    if record is not None:
        parameters |= {"seed": record.seed, "config": record.config}
        internal["environment"] = record.environment
    if dossier.settings is not None:
        parameters["settings"] = dict(dossier.settings)
    dependencies = [*_code(dossier), *_materials(dossier)]
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": parameters,
        "internalParameters": internal,
        "resolvedDependencies": dependencies,
    }


def _code(dossier: Dossier) -> list[Json]:
    record = dossier.entry.record
    if record is None or not record.code.commit:
        return []
    changed = {"localChanges": record.code.dirty}
    return [{"name": "trailmark", "digest": {"gitCommit": record.code.commit}, "annotations": changed}]


def _materials(dossier: Dossier) -> list[Json]:
    names = {person.key_id: person.label for person in dossier.people}
    found = []
    if dossier.base is not None:
        entry, body = dossier.base.entry, dossier.base.body
        notes: Json = {} if body is None else {"licence": body.licence, "source": body.source, "note": body.note}
        found.append(_material(dossier.base.name, "base_model", dossier.base.digest, entry, notes))
    for refined in dossier.refined:
        notes = {} if refined.body is None else {"num_in": refined.body.num_in, "num_kept": refined.body.num_kept}
        found.append(_material(refined.name, "refined", refined.digest, refined.entry, notes))
    for source in dossier.sources:
        notes = {} if source.body is None else {"licence": source.body.licence, "num_rows": source.body.num_rows}
        if source.key_id is not None:
            notes |= {"contributor": names.get(source.key_id, source.key_id), "key_id": source.signed_with}
        if void := dossier.void.get(source.entry.leaf_hash):
            notes |= {"void": void}
        found.append(_material(source.name, "dataset", source.digest, source.entry, notes))
    return found


def _material(name: str, kind: str, digest: str | None, entry: "Entry | None", notes: Json) -> Json:
    """A resource descriptor; an erased one is known by its leaf hash alone."""
    annotations = {"kind": kind, **notes}
    if entry is not None:
        annotations["leaf_hash"] = entry.leaf_hash
        if entry.record is None:
            annotations["erased"] = True
    material: Json = {"name": name, "annotations": annotations}
    if digest is not None:
        return material | {"digest": {"sha256": digest.removeprefix("sha256:")}}
    return material | {"uri": f"https://trailmark.dev/leaf/{annotations['leaf_hash']}"}


def _run(dossier: Dossier) -> Json:
    record = dossier.entry.record
    metadata = {"invocationId": dossier.entry.leaf_hash, "finishedOn": instant(dossier.entry.leaf.time_us)}
    version = {} if record is None or not record.code.version else {"version": {"trailmark": record.code.version}}
    builder = {"id": f"{BUILDER}/{dossier.log.origin}", **version}
    measured = [
        {
            "name": f"benchmark {item.body.name}",
            "digest": {"sha256": item.body.details.removeprefix("sha256:")},
            "annotations": {
                "leaf_hash": item.entry.leaf_hash,
                "metrics": to_plain(item.body.metrics, "metrics"),
            },
        }
        for item in dossier.measurements
    ]
    trace = [] if dossier.body is None else [_material("trace", "trace", dossier.body.trace, None, {})]
    return {"builder": builder, "metadata": metadata, "byproducts": [*trace, *measured]}
