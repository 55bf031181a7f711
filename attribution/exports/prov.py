"""The adapter's lineage as W3C PROV, in PROV-JSON.

Artefacts are entities, records are activities, keys are agents. Contributors' keys sign for their datasets; what the
cluster did is done by its software on behalf of the operator's key.

Sources: www.w3.org/TR/prov-dm; www.w3.org/submissions/prov-json (the layout).
"""

import json
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

from attribution.exports.dossier import Dossier, instant
from attribution.lineage import label_of

if TYPE_CHECKING:
    from attribution.records import Artefact, Record
    from attribution.trail import Entry

Json = dict[str, Any]
PREFIXES = {
    "trailmark": "https://trailmark.dev/prov#",
    "artefact": "https://trailmark.dev/artefact/",
    "leaf": "https://trailmark.dev/leaf/",
    "key": "https://trailmark.dev/key/",
    "software": "https://trailmark.dev/software/",
    "log": "https://trailmark.dev/log/",
}
SECTIONS = ("entity", "activity", "agent")


def prov_json(dossier: Dossier) -> str:
    """Return the PROV document as JSON text; the same for the same log state."""
    return json.dumps(_Document(dossier).build(), indent=2, ensure_ascii=False) + "\n"


class _Document:
    """Collects elements, each once, and numbered relations."""

    def __init__(self, dossier: Dossier) -> None:
        self._dossier = dossier
        self._sections: dict[str, Json] = {name: {} for name in SECTIONS}
        self._numbers = count(1)

    def build(self) -> Json:
        """Return the document."""
        self._log()
        for person in self._dossier.people:
            self._agent(person.key_id, "prov:Person", person.label)
        leaves = {entry.leaf_hash for entry in self._dossier.entries}
        for entry in self._dossier.entries:
            self._activity(entry)
            for parent in entry.leaf.parents:
                if parent in leaves:
                    self._relate("wasInformedBy", informed=f"leaf:{entry.leaf_hash}", informant=f"leaf:{parent}")
        self._credit()
        return {"prefix": PREFIXES, **self._sections}

    def _log(self) -> None:
        """The log state that everything rests on, as an entity that the adapter's influence is read from."""
        state = self._dossier.statement()
        self._sections["entity"][self._log_id] = {
            "prov:label": f"log {state['log_origin']} at {state['tree_size']} entries",
            "prov:type": _qualified("trailmark:Checkpoint"),
            "trailmark:log_origin": state["log_origin"],
            "trailmark:tree_size": state["tree_size"],
            "trailmark:root": state["root"],
            "trailmark:checkpoint": state["checkpoint"],
            "trailmark:leaf_hash": [leaf["leaf_hash"] for leaf in state["leaves"]],
            **({"trailmark:hole": state["holes"]} if state["holes"] else {}),
            **({"trailmark:void": state["void"]} if "void" in state else {}),
        }

    @property
    def _log_id(self) -> str:
        return f"log:{self._dossier.log.root}"

    def _activity(self, entry: "Entry") -> None:
        act, record = f"leaf:{entry.leaf_hash}", entry.record
        self._sections["activity"][act] = {
            "prov:endTime": instant(entry.leaf.time_us),
            "prov:label": label_of(entry),
            "prov:type": _qualified(f"trailmark:{entry.leaf.kind}"),
            "trailmark:leaf_hash": entry.leaf_hash,
            "trailmark:log_index": entry.index,
            "trailmark:proof": self._dossier.proof_file_of[entry.leaf_hash],
            **({"trailmark:erased": True} if record is None else {"trailmark:seed": record.seed}),
        }
        if record is None:
            # What the public header names is all that is left: the output of an adapter or base model record.
            for subject in entry.leaf.subjects:
                if subject.kind == entry.leaf.kind:
                    self._generated(act, self._entity(subject.kind, "erased", subject.digest), entry)
            return
        used = [self._entity(item.kind, item.name, item.digest) for item in self._dossier.inputs_of(record)]
        for entity in used:
            self._relate("used", activity=act, entity=entity)
        self._outputs(act, entry, record, used)
        self._associate(act, record)

    def _outputs(self, act: str, entry: "Entry", record: "Record", used: Iterable[str]) -> None:
        """What a record made; a publication makes nothing but a name for what it used."""
        if entry.leaf.kind == "publication":
            return
        for output in record.outputs:
            entity = self._entity(output.kind, output.name, output.digest)
            self._generated(act, entity, entry)
            self._describe(entity, output, record)
            for source in used:
                self._relate("wasDerivedFrom", generatedEntity=entity, usedEntity=source, activity=act)

    def _describe(self, entity: str, output: "Artefact", record: "Record") -> None:
        body = record.body
        for name in (
            "licence",
            "num_rows",
            "num_in",
            "num_kept",
            "architecture",
            "source",
            "rank",
            "alpha",
            "num_steps",
        ):
            value = getattr(body, name, None)
            if output.kind in ("dataset", "refined", "adapter", "base_model") and value is not None:
                self._sections["entity"][entity][f"trailmark:{name}"] = value

    def _associate(self, act: str, record: "Record") -> None:
        software = f"software:trailmark-{record.code.version or 'unknown'}-{record.code.commit[:12] or 'unknown'}"
        self._sections["agent"][software] = {
            "prov:type": _qualified("prov:SoftwareAgent"),
            "prov:label": f"trailmark {record.code.version}",
            "trailmark:commit": record.code.commit or "unknown",
        }
        self._relate("wasAssociatedWith", activity=act, agent=software)
        for party in record.contributors:
            key_id = self._dossier.first_keys.get(party.key_id, party.key_id)
            agent = self._agent(key_id, "prov:Agent", f"key {key_id[:12]}")
            role = {"prov:role": party.role}
            self._relate("wasAssociatedWith", activity=act, agent=agent, extra=role)
            if key_id not in {person.key_id for person in self._dossier.people}:
                self._relate("actedOnBehalfOf", delegate=software, responsible=agent, activity=act)

    def _credit(self) -> None:
        """Who is to be credited for the datasets, for their rows in the refined ones, and for the adapter."""
        for source in self._dossier.sources:
            if source.body is not None and source.key_id is not None and source.digest is not None:
                self._attribute("dataset", source.name, source.digest, source.key_id, source.body.num_rows)
        for refined in self._dossier.refined:
            for person, num_kept in refined.kept.items():
                if num_kept and refined.digest is not None:
                    self._attribute("refined", refined.name, refined.digest, person, num_kept)
        for one in self._dossier.people:
            if one.num_kept:
                self._attribute("adapter", self._dossier.name, self._dossier.digest, one.key_id, one.num_kept)
        adapter = self._entity("adapter", self._dossier.name, self._dossier.digest)
        if self._dossier.version:
            self._sections["entity"][adapter]["trailmark:published_as"] = self._dossier.reference
        self._relate("wasInfluencedBy", influencee=adapter, influencer=self._log_id)

    def _attribute(self, kind: str, name: str, digest: str, key_id: str, num_rows: int) -> None:
        agent = self._agent(key_id, "prov:Person", f"key {key_id[:12]}")
        rows = {"trailmark:num_rows": num_rows}
        self._relate("wasAttributedTo", entity=self._entity(kind, name, digest), agent=agent, extra=rows)

    def _generated(self, act: str, entity: str, entry: "Entry") -> None:
        time = {"prov:time": instant(entry.leaf.time_us)}
        self._relate("wasGeneratedBy", entity=entity, activity=act, extra=time)

    def _entity(self, kind: str, name: str, digest: str) -> str:
        """The id of an artefact; the first that names it describes it."""
        entity = f"artefact:{digest.removeprefix('sha256:')}"
        facts = {"prov:label": name, "prov:type": _qualified(f"trailmark:{kind}"), "trailmark:digest": digest}
        self._sections["entity"].setdefault(entity, facts)
        return entity

    def _agent(self, key_id: str, agent_type: str, label: str) -> str:
        agent = f"key:{key_id}"
        facts = {"prov:type": _qualified(agent_type), "prov:label": label, "trailmark:key_id": key_id}
        self._sections["agent"].setdefault(agent, facts)
        return agent

    def _relate(self, relation: str, *, extra: Json | None = None, **ends: str) -> None:
        """Add a relation; its ends are `prov:` attributes, in PROV-JSON's spelling."""
        attributes = {f"prov:{name}": value for name, value in ends.items()}
        self._sections.setdefault(relation, {})[f"_:r{next(self._numbers)}"] = {**attributes, **(extra or {})}


def _qualified(name: str) -> Json:
    """A qualified name as a PROV-JSON value."""
    return {"$": name, "type": "prov:QUALIFIED_NAME"}
