"""Which adapter is meant, what is said when it is not there, and exports of what was partly erased."""

import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path

import jsonschema
import pytest

from attribution.bodies import (
    AdapterBody,
    ContributorBody,
    ContributorRows,
    DatasetBody,
    RedactionBody,
    RefinementBody,
)
from attribution.exports.cyclonedx import cyclonedx, validate
from attribution.exports.dossier import ExportError, decimal, gather, instant, spdx
from attribution.exports.formats import FORMATS, export_text
from attribution.key_changes import revoke, rotate
from attribution.lineage import record_bundle
from attribution.log.verify import Trust, verify_bytes
from attribution.records import Artefact, Leaf, Party
from attribution.registry import RegistryError
from attribution.signed_models import sign
from attribution.trail import Entry, Trail
from pipelines.publish import publish
from tests.attribution.records_example import ExampleLog, digest_of

ERASABLE = ("contributor", "dataset", "refinement", "base_model", "adapter", "benchmark", "model_signature")
DIGEST = "sha256:" + "ab" * 32
OPENLINEAGE_SCHEMA = Path(__file__).parents[3] / "attribution/exports/schemas/openlineage.json"


def erase(trail: Trail, leaf_hash: str) -> None:
    """Do to a home what erasure does."""
    trail.record("redaction", RedactionBody(leaf_hash, "the contributor asked"))
    assert trail.delete_record(leaf_hash)


@pytest.mark.parametrize("kind", ERASABLE)
def test_an_erased_record_is_a_named_hole_in_every_format(copy: Callable[[], Trail], kind: str) -> None:
    trail = copy()
    leaf_hash = next(entry.leaf_hash for entry in trail.entries(kind=kind))
    erase(trail, leaf_hash)
    trail = copy()
    dossier = gather(trail, "facts@1")
    texts = {form: export_text(trail, dossier, form) for form in FORMATS}
    assert validate(texts["cyclonedx"])
    if kind == "model_signature":
        assert dossier.signature is None  # nothing is left that would lead to it
        return
    assert [(hole.kind, hole.leaf_hash, hole.reason) for hole in dossier.holes] == [
        (kind, leaf_hash, "the contributor asked")
    ]
    told = {**texts, "slsa": json.dumps(dossier.statement())}
    assert all(leaf_hash in text for text in told.values())
    assert json.loads(texts["cyclonedx"])["compositions"][0]["aggregate"] == "incomplete"
    assert "## What is missing" in texts["model-card"] and "was erased (the contributor asked)" in texts["model-card"]
    if kind == "contributor":
        assert "Amara" not in "".join(texts.values()).replace("amara", "")
        assert "erased contributor" in texts["model-card"] and "| 24 | 24 |" in texts["model-card"]


def test_all_that_can_be_erased_is_erased(copy: Callable[[], Trail]) -> None:
    trail = copy()
    for entry in list(trail.entries()):
        if entry.leaf.kind in ERASABLE:
            erase(trail, entry.leaf_hash)
    trail = copy()
    dossier = gather(trail, "facts@1")
    assert len(dossier.holes) == sum(entry.leaf.kind != "publication" for entry in dossier.entries)
    texts = {form: export_text(trail, dossier, form) for form in FORMATS}
    assert validate(texts["cyclonedx"])
    assert "The record of its training was erased" in texts["model-card"]


def test_proofs_cover_every_leaf(example: ExampleLog) -> None:
    trail = example.trail
    dossier = gather(trail, "facts@1")
    trust = Trust.load(trail.home / "trust.json")
    covered = set()
    for file, leaf in dossier.proofs.items():
        bundle = record_bundle(trail, leaf)
        verify_bytes(json.dumps(bundle).encode(), trust=trust)
        proved = {Leaf.from_json(item["leaf"]).leaf_hash for item in [bundle["record"], *bundle["lineage"]]}
        assert {leaf for leaf, of in dossier.proof_file_of.items() if of == file} <= proved
        covered |= proved
    assert {entry.leaf_hash for entry in dossier.entries} <= covered
    assert next(iter(dossier.proofs)) == "proof.json"


def test_two_names_and_a_later_signature_need_two_proofs(copy: Callable[[], Trail]) -> None:
    trail = copy()
    digest = gather(trail, "facts@1").digest
    assert not sign(trail, digest), "it has one"
    publish(trail, "facts", digest)
    assert gather(trail, "facts@2").publication is not None
    assert next(iter(gather(trail, "facts@2").proofs)) == "proof.json"
    assert gather(trail, "facts@1").reference == "facts@1" and gather(trail, "facts").reference == "facts@2"


def test_an_unpublished_adapter_is_exported_by_digest_and_its_name_says_how(copy: Callable[[], Trail]) -> None:
    trail = copy()
    blob = trail.store.put_blob(b"not published")
    base = trail.store.put_blob(b"unrecorded base")
    body = AdapterBody("fresh", base, blob, 8, 16, ("q_proj",), 1, 1, 0, 0, blob)
    trail.record(
        "adapter", body, inputs=[Artefact("base_model", "b", base)], outputs=[Artefact("adapter", "fresh", blob)]
    )
    with pytest.raises(ExportError, match=f"trained, but not published; run `trailmark publish fresh`, .*{blob}"):
        gather(trail, "fresh")
    dossier = gather(trail, blob)
    assert (dossier.version, dossier.measurements, dossier.people) == (None, (), ())
    assert "No benchmark of this adapter is recorded" in cyclonedx(dossier) and validate(cyclonedx(dossier))
    card = export_text(trail, dossier, "model-card")
    assert "None is recorded in the log" in card and "The log names none." in card
    assert json.loads(cyclonedx(dossier))["metadata"]["component"]["version"] == blob


def test_unknown_names_digests_and_formats_are_refused(example: ExampleLog) -> None:
    with pytest.raises(RegistryError, match="did you mean facts@1"):
        gather(example.trail, "fact@1")
    with pytest.raises(ExportError, match="no record of this log made it"):
        gather(example.trail, "sha256:" + "0" * 64)
    with pytest.raises(ExportError, match="no record of this log made it"):
        gather(example.trail, digest_of(example.base))
    with pytest.raises(ExportError, match="choose one of cyclonedx, openlineage, prov, slsa, model-card, all"):
        export_text(example.trail, gather(example.trail, "facts"), "spdx")


def test_numbers_times_and_licences() -> None:
    assert [decimal(value) for value in (0, 1, -3_500_000, 900_000, 10_000_000)] == [
        "0",
        "0.000001",
        "-3.5",
        "0.9",
        "10",
    ]
    assert instant(1_795_000_000_000_001) == "2026-11-18T11:06:40.000001Z"
    assert (spdx("apache-2.0"), spdx("mit OR cc0-1.0"), spdx("my own")) == ("Apache-2.0", "MIT OR CC0-1.0", "my own")


def rotated_log(folder: Path) -> tuple[Trail, Entry]:
    """A log in which Amara hands in rows, rotates her key and hands in more, all behind facts@1; her second rows."""
    trail = Trail.open(folder / "home")
    key = trail.keys.create("Amara")
    trail.record("contributor", ContributorBody("Amara", key.key_id, key.public_hex), signer=key)
    given = [_give(trail, "early")]
    rotate(trail, "Amara")
    given.append(_give(trail, "late"))
    refined = Artefact("refined", "facts", trail.store.put_blob(b"refined"))
    parts = tuple(ContributorRows(entry.record.contributors[0].key_id, 4, 3) for entry in given if entry.record)
    body = RefinementBody("facts", (), 8, 6, (), parts, refined.digest, refined.digest)
    inputs = [item for entry in given if entry.record for item in entry.record.outputs]
    trail.record("refinement", body, inputs=inputs, outputs=[refined])
    adapter = Artefact("adapter", "facts", trail.store.put_blob(b"adapter"))
    made = AdapterBody("facts", DIGEST, refined.digest, 8, 16, ("q_proj",), 1, 6, 0, 0, DIGEST)
    trail.record("adapter", made, inputs=[refined], outputs=[adapter])
    publish(trail, "facts", adapter.digest)
    return Trail.open(trail.home), given[1]


def _give(trail: Trail, name: str) -> Entry:
    key, rows = trail.keys.get("Amara"), trail.store.put_blob(name.encode())
    body, made = DatasetBody(name, "MIT", "jsonl", 4, 0, rows, "rows.jsonl"), Artefact("dataset", name, rows)
    return trail.record("dataset", body, outputs=[made], contributors=[Party(key.key_id, "contributor")], signer=key)


def test_who_rotated_a_key_is_one_person_in_every_format(tmp_path: Path) -> None:
    trail, late = rotated_log(tmp_path)
    dossier = gather(trail, "facts@1")
    (person,) = dossier.people
    assert (person.name, person.num_given, person.num_kept, len(person.keys)) == ("Amara", 8, 6, 2)
    assert late.record is not None and late.record.contributors[0].key_id == person.keys[1] != person.key_id
    texts = {form: export_text(trail, dossier, form) for form in FORMATS}
    assert validate(texts["cyclonedx"]) and all("erased" not in text for text in map(str.lower, _told(texts)))
    notes = [citation["note"] for citation in json.loads(texts["cyclonedx"])["citations"] if "note" in citation]
    assert f"Handed in 4 rows, signed with key {person.keys[1]}" in notes
    assert f"6 of the rows of facts, signed with key {' or '.join(person.keys)}" in notes
    people = {name: facts for name, facts in json.loads(texts["prov"])["agent"].items() if name.startswith("key:")}
    assert [name for name, facts in people.items() if facts["prov:label"] == "Amara"] == [f"key:{person.key_id}"]
    assert f"key:{person.keys[1]}" not in people
    assert "counts for nothing" not in "".join(texts.values())


def _told(texts: Mapping[str, str]) -> list[str]:
    """The texts without OpenLineage's field that says of each record whether it was erased."""
    return [text.replace('"erased":false', "").replace('"erased": false', "") for text in texts.values()]


def test_what_a_revoked_key_signed_is_said_to_count_for_nothing(tmp_path: Path) -> None:
    trail, late = rotated_log(tmp_path)
    revoke(trail, "Amara", reason="laptop stolen", from_us=late.leaf.time_us)
    dossier = gather(Trail.open(trail.home), "facts@1")
    assert list(dossier.void) == [late.leaf_hash]
    texts = {form: export_text(trail, dossier, form) for form in FORMATS}
    assert validate(texts["cyclonedx"])
    for form, text in {**texts, "statement": json.dumps(dossier.statement())}.items():
        plain = b64decode(json.loads(text)["payload"]).decode() if form == "slsa" else text
        assert f"dataset record {late.leaf_hash} is signed with key" in plain and "(laptop stolen)" in plain, form
    facets = [json.loads(line)["run"]["facets"]["trailmark_record"] for line in texts["openlineage"].splitlines()]
    schema = json.loads(OPENLINEAGE_SCHEMA.read_text(encoding="utf-8"))
    for facet in facets:
        jsonschema.validate(facet, {**schema, "$ref": "#/$defs/TrailmarkRecordRunFacet"})
    assert {facet["leafHash"] for facet in facets if "void" in facet} == {late.leaf_hash}
