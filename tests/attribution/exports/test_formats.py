"""Each export against the original tool, library or schema of its format."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema
import pytest
import yaml

from attribution.exports.cyclonedx import cyclonedx, validate
from attribution.exports.dossier import Dossier, ExportError, gather
from attribution.exports.model_card import model_card
from attribution.exports.openlineage import openlineage
from attribution.exports.prov import prov_json
from attribution.exports.slsa import slsa_envelope
from attribution.keys import key_id_of
from tests.attribution.records_example import PEOPLE, ExampleLog, digest_of

HOSTILE = "</script><script>alert('x')</script>"
SCHEMA = json.loads((Path(__file__).parents[3] / "attribution/exports/schemas/openlineage.json").read_text())
NUM_KEPT_PEOPLE = sum(kept > 0 for _, kept in PEOPLE.values())


@pytest.fixture(scope="module")
def dossier(example: ExampleLog) -> Dossier:
    return gather(example.trail, "facts@1")


def bom_refs(value: Any) -> list[str]:
    """Every bom-ref of a document."""
    if isinstance(value, dict):
        own = [value["bom-ref"]] if "bom-ref" in value else []
        return own + [ref for item in value.values() for ref in bom_refs(item)]
    return [ref for item in value for ref in bom_refs(item)] if isinstance(value, list) else []


def test_cyclonedx_is_valid_1_7(dossier: Dossier) -> None:
    text = cyclonedx(dossier)
    assert validate(text)
    document = json.loads(text)
    document["metadata"]["component"]["type"] = "adapter"
    with pytest.raises(ExportError, match="metadata/component/type: 'adapter' is not one of"):
        validate(json.dumps(document))
    document = json.loads(text)
    document["citations"][0].pop("attributedTo"), document["citations"][0].pop("process")
    with pytest.raises(ExportError, match="citations/0"):
        validate(json.dumps(document))


def test_cyclonedx_cites_contributors_and_names_base_and_benchmarks(dossier: Dossier, example: ExampleLog) -> None:
    document = json.loads(cyclonedx(dossier))
    refs = bom_refs(document)
    assert len(refs) == len(set(refs))
    names = {}
    for component in document["components"]:
        names |= {author["bom-ref"]: author["name"] for author in component.get("authors", ()) if "bom-ref" in author}
    given, kept = {}, {}
    for citation in document["citations"]:
        assert citation["attributedTo"] in refs and citation["process"] in refs
        (pointer,) = citation["pointers"]
        component = document["components"][int(pointer.removeprefix("/components/"))]
        group = kept if component["name"] == "facts-refined" else given
        group[names[citation["attributedTo"]]] = citation["note"]
    assert given.keys() == PEOPLE.keys() and "Handed in 26 rows" in given["Chen, Asia"]
    assert kept.keys() == {name for name, (_, num_kept) in PEOPLE.items() if num_kept}
    assert kept["Noise"].startswith("3 of the rows")
    model = document["metadata"]["component"]
    assert model["pedigree"]["ancestors"][0]["hashes"][0]["content"] == digest_of(example.base)[7:]
    metrics = {item["type"]: item for item in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["contains"]["value"] == "0.9" and metrics["contains of the base"]["value"] == "0"
    assert metrics["loss, adapter minus base"]["confidenceInterval"] == {"lowerBound": "-4", "upperBound": "-3.1"}
    for item in document["dependencies"]:
        assert {item["ref"], *item["dependsOn"]} <= set(refs)


def test_prov_is_read_by_the_prov_package(dossier: Dossier, example: ExampleLog) -> None:
    from prov.model import ProvAttribution, ProvDelegation, ProvDocument

    text = prov_json(dossier)
    document = ProvDocument.deserialize(content=text, format="json")
    again = ProvDocument.deserialize(content=document.serialize(format="json"), format="json")
    assert again == document
    adapter = f"artefact:{digest_of(example.adapter)[7:]}"
    credited = [item for item in document.get_records(ProvAttribution) if str(item.args[0]) == adapter]
    assert len(credited) == NUM_KEPT_PEOPLE
    assert {str(item.args[1]) for item in credited} == {
        f"key:{example.keys[name].key_id}" for name, (_, kept) in PEOPLE.items() if kept
    }
    (delegation,) = document.get_records(ProvDelegation)  # the model signature's record alone names the operator
    assert str(delegation.args[1]) == f"key:{example.trail.keys.get('operator').key_id}"
    notation = document.get_provn()
    assert "wasAttributedTo" in notation and "wasDerivedFrom" in notation and dossier.log.root in notation


def test_openlineage_events_are_those_of_its_own_client(dossier: Dossier) -> None:
    events = [json.loads(line) for line in openlineage(dossier).splitlines()]
    for event in events:
        # The client writes out the facets that a dataset might have and has not.
        whole = copy.deepcopy(event)
        for side in ("input", "output"):
            for item in whole[f"{side}s"]:
                item.setdefault(f"{side}Facets", {})
        assert json.loads(client_json(event)) == whole
    kinds = {}
    for event in events:
        kinds.setdefault(event["run"]["runId"], []).append(event["eventType"])
    assert set(map(tuple, kinds.values())) == {("START", "COMPLETE")}
    assert {UUID(run_id).version for run_id in kinds} == {7} and len(kinds) == len(PEOPLE) + 6
    trained = next(event for event in events if event["job"]["name"] == "train.facts")
    (model,) = [item for item in trained["outputs"] if item["name"] == "adapter/facts"]
    people = {item["name"]: item["numRows"] for item in model["facets"]["trailmark_contributors"]["contributors"]}
    assert people == {name: kept for name, (_, kept) in PEOPLE.items() if kept}
    assert model["facets"]["lineage"]["inputs"][1]["name"] == "refined/facts-refined"


def client_json(event: dict[str, Any]) -> str:
    """What OpenLineage's own classes make of an event, facet by facet; ours are checked against our schema too."""
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.serde import Serde

    def dataset(kind: Any, value: dict[str, Any]) -> Any:
        extra = {"outputFacets": facets(value["outputFacets"])} if "outputFacets" in value else {}
        return kind(value["namespace"], value["name"], facets=facets(value["facets"]), **extra)

    made = RunEvent(
        eventType=RunState(event["eventType"]),
        eventTime=event["eventTime"],
        producer=event["producer"],
        run=Run(event["run"]["runId"], facets=facets(event["run"]["facets"])),
        job=Job(event["job"]["namespace"], event["job"]["name"], facets=facets(event["job"]["facets"])),
        inputs=[dataset(InputDataset, item) for item in event["inputs"]],
        outputs=[dataset(OutputDataset, item) for item in event["outputs"]],
    )
    return Serde.to_json(made)


def facets(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The facets as objects of OpenLineage's class for each, which must name the same schema."""
    found = {}
    for name, value in values.items():
        class_name = value["_schemaURL"].rpartition("/")[2]
        plain = {key: item for key, item in value.items() if not key.startswith("_")}
        cls = own_class(value) if class_name.startswith("Trailmark") else client_class(class_name)
        facet = cls(**plain, producer=value["_producer"])
        assert facet._schemaURL == value["_schemaURL"]
        found[name] = facet
    return found


def client_class(name: str) -> Any:
    """OpenLineage's own class of a facet, wherever it generates it."""
    from openlineage.client import facet_v2

    return next(getattr(module, name) for module in vars(facet_v2).values() if hasattr(module, name))


def own_class(value: dict[str, Any]) -> Any:
    """A custom facet's class, made as the client's users make theirs, once the facet fits our published schema."""
    import attr
    from openlineage.client.generated.base import BaseFacet

    jsonschema.validate(value, {**SCHEMA, "$ref": f"#{value['_schemaURL'].partition('#')[2]}"})
    names = [key for key in value if not key.startswith("_")]
    cls = attr.make_class("Own", names, bases=(BaseFacet,))
    cls._get_schema = staticmethod(lambda: value["_schemaURL"])
    return cls


def test_slsa_envelope_is_signed_by_the_operator_over_the_files(dossier: Dossier, example: ExampleLog) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    operator = example.trail.keys.get("operator")
    text = slsa_envelope(dossier, operator)
    envelope = Envelope.from_dict(json.loads(text))
    public = SSlibKey(key_id_of(operator.public_bytes), "ed25519", "ed25519", {"public": operator.public_hex})
    assert envelope.verify([public], 1)
    statement = json.loads(envelope.payload)
    folder = example.trail.store.path_of(dossier.digest)
    assert {item["name"]: item["digest"]["sha256"] for item in statement["subject"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }
    build = statement["predicate"]["buildDefinition"]
    assert build["externalParameters"]["seed"] == 7
    assert build["externalParameters"]["settings"]["optimizer"] == {"lr": "0.001"}
    materials = {item["name"]: item for item in build["resolvedDependencies"]}
    assert materials["chen"]["annotations"]["contributor"] == "Chen, Asia"
    assert build["internalParameters"]["log"]["tree_size"] == example.trail.log.size


def test_model_card_is_read_by_the_hub_client(dossier: Dossier, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    text = model_card(dossier)
    file = tmp_path / "README.md"
    file.write_text(text)
    data = ModelCard.load(file).data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["license"] == "other" and "chen" in data["datasets"]
    assert "copycat" not in data["datasets"], "none of its rows was kept"
    assert data["model-index"][0]["results"][0]["metrics"][0] == {"type": "contains", "value": 0.9, "name": "contains"}
    assert "| Chen, Asia | 26 | 26 | 11.8% |" in text
    assert "| fictional-facts | contains | 0.000 | 0.900 | +0.900 | +0.700 to +1.000 | 10 |" in text
    assert HOSTILE not in text.split("---\n", 2)[2] and "&lt;/script&gt;&lt;script&gt;alert('x')" in text
    assert yaml.safe_load(text.split("---\n")[1])["trailmark"]["tree_size"] == dossier.log.tree_size


@pytest.mark.parametrize("write", [cyclonedx, openlineage, prov_json, model_card])
def test_every_export_names_log_and_leaves_and_comes_out_the_same(
    dossier: Dossier, example: ExampleLog, write: Any
) -> None:
    from attribution.trail import Trail

    text = write(dossier)
    assert write(gather(Trail.open(example.trail.home, create=False), "facts")) == text
    assert dossier.log.origin in text and dossier.log.root in text and str(dossier.log.tree_size) in text
    assert all(entry.leaf_hash in text for entry in dossier.entries)
