"""All that the log knows of one adapter, gathered once for every export; what was erased is named as a hole.

Read from the log alone but for the adapter's own manifest and its run's settings, so that the same log and tree size
give the same dossier on any machine that holds the adapter.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from attribution.bodies import (
    AdapterBody,
    BaseModelBody,
    BenchmarkBody,
    ContributorBody,
    DatasetBody,
    ModelSignatureBody,
    PublicationBody,
    RedactionBody,
    RefinementBody,
)
from attribution.evidence import recorded_confidence
from attribution.licences import LicenceError, canonical_licence
from attribution.lineage import Lineage
from attribution.log.note import open_checkpoint
from attribution.people import People, first_keys
from attribution.registry import RegistryError
from attribution.store import MANIFEST, Manifest, StoreError
from attribution.verify_adapter import PROOF_FILE, PROOF_SUFFIX
from attribution.void_records import void_behind
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.records import Artefact, Record
    from attribution.trail import Entry, Trail

NAMESPACE = UUID("6f0b8a52-57e9-5a3e-9f64-1b0a0a9c2d11")  # of the UUIDs that exports derive from leaf hashes
CLOCK_START = datetime(1970, 1, 1, tzinfo=UTC)


class ExportError(UserError):
    """An adapter that is not known, or cannot be exported."""


@dataclass(frozen=True)
class LogState:
    """The tree head that an export rests on: the signed checkpoint and the time of the newest leaf under it."""

    origin: str
    tree_size: int
    root: str
    checkpoint: str
    time_us: int


@dataclass(frozen=True)
class Hole:
    """A record that was erased: its place in the log is proven, its contents are gone."""

    leaf_hash: str
    kind: str
    reason: str

    @property
    def sentence(self) -> str:
        """What a reader is told."""
        return f"{self.kind} record {self.leaf_hash} was erased ({self.reason}): its place in the log stays proven"


@dataclass(frozen=True)
class Base:
    """The base model; `entry` None when the log has no record of its origin, `body` None when it was erased."""

    digest: str
    name: str
    entry: "Entry | None"
    body: BaseModelBody | None


@dataclass(frozen=True)
class Source:
    """A contributed dataset; `body` and `key_id` (the person's, as in `Person`) None when its record was erased."""

    entry: "Entry"
    body: DatasetBody | None
    key_id: str | None
    name: str
    digest: str | None
    signed_with: str = ""


@dataclass(frozen=True)
class Refined:
    """A refined dataset; `body` None when its record was erased. `kept`: rows by the person's key, where any are."""

    entry: "Entry"
    body: RefinementBody | None
    name: str
    digest: str | None
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Person:
    """A contributor, with the rows they handed in and those kept in what the adapter learnt from.

    One person, however often the key was rotated: `key_id` is the first, `keys` are all that signed here or joined.
    `name` is None when their record was erased. `num_given` counts the rows of the datasets whose records are there;
    `num_kept` is None when no refinement tells.
    """

    key_id: str
    name: str | None
    entry: "Entry | None"
    num_given: int
    num_kept: int | None
    keys: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, or that it was erased."""
        return self.name if self.name is not None else f"erased contributor {self.key_id[:12]}"


@dataclass(frozen=True)
class Measurement:
    """A recorded benchmark; `confidence` of its intervals, None when its settings are gone."""

    entry: "Entry"
    body: BenchmarkBody
    confidence: float | None


@dataclass(frozen=True)
class Dossier:
    """One adapter and all it rests on.

    `entries` are the records it rests on, in log order; `proofs` file name -> leaf hash of the record whose bundle it
    is, `proof_file_of` leaf hash of each entry -> the file that proves it, `void` leaf hash of each that counts for
    nothing -> why; `first_keys`: key of a contributor that took another's place -> the first of the chain.
    """

    digest: str
    name: str
    version: int | None
    entry: "Entry"
    body: AdapterBody | None
    publication: "Entry | None"
    manifest: Manifest | None
    settings: Mapping[str, Any] | None
    base: Base | None
    refined: tuple[Refined, ...]
    sources: tuple[Source, ...]
    people: tuple[Person, ...]
    measurements: tuple[Measurement, ...]
    signature: "tuple[Entry, ModelSignatureBody] | None"
    proofs: Mapping[str, str]
    proof_file_of: Mapping[str, str]
    entries: "tuple[Entry, ...]"
    holes: tuple[Hole, ...]
    log: LogState
    first_keys: Mapping[str, str]
    void: Mapping[str, str]

    @property
    def limits(self) -> tuple[str, ...]:
        """What a reader must be told: what was erased, and what counts for nothing."""
        return (*(hole.sentence for hole in self.holes), *self.void.values())

    def inputs_of(self, record: "Record") -> "tuple[Artefact, ...]":
        """Return a record's inputs, each by the name under which it was made: contributions stand there without one."""
        made = [item.record for item in self.entries if item.record is not None and item.leaf.kind != "publication"]
        names = {(output.kind, output.digest): output.name for other in made for output in other.outputs}
        return tuple(replace(item, name=names.get((item.kind, item.digest), item.name)) for item in record.inputs)

    @property
    def reference(self) -> str:
        """`name@version`, or the name and the beginning of the digest of an adapter nobody published."""
        return f"{self.name}@{self.version}" if self.version else f"{self.name} ({self.digest[7:19]})"

    @property
    def document_id(self) -> UUID:
        """A name for documents of this adapter at this log state: the same state, the same id."""
        return uuid5(
            NAMESPACE, f"{self.log.origin} {self.log.tree_size} {self.log.root} {self.digest} {self.reference}"
        )

    @property
    def files(self) -> dict[str, str]:
        """Path -> SHA-256 in hex of the adapter's files; its manifest, whose SHA-256 is the digest, stands last."""
        files = {} if self.manifest is None else {file.path: file.sha256 for file in self.manifest.files}
        return {**files, MANIFEST: self.digest.removeprefix("sha256:")}

    @cached_property
    def licences(self) -> tuple[str, ...]:
        """The distinct licences of base and contributed data as SPDX spells them, sorted."""
        found = {source.body.licence for source in self.sources if source.body is not None}
        if self.base is not None and self.base.body is not None:
            found.add(self.base.body.licence)
        return tuple(sorted({spdx(text) for text in found}))

    def statement(self) -> dict[str, Any]:
        """Return what every export carries so that a stranger can check it: log, tree head, leaf hashes, holes."""
        return {
            "log_origin": self.log.origin,
            "tree_size": self.log.tree_size,
            "root": self.log.root,
            "checkpoint": self.log.checkpoint,
            "adapter": self.digest,
            "published_as": self.reference if self.version else None,
            "leaves": [{"kind": entry.leaf.kind, "leaf_hash": entry.leaf_hash} for entry in self.entries],
            "holes": [hole.sentence for hole in self.holes],
            **({"void": list(self.void.values())} if self.void else {}),
        }


def resolve_adapter(trail: "Trail", reference: str) -> tuple[str, "Entry | None"]:
    """Return digest and publication of what NAME, NAME@VERSION or a digest means; an unpublished digest has none.

    ExportError or RegistryError says what was not found and what there is.
    """
    try:
        published = trail.registry.resolve(reference, kind="adapter", with_erased=True)  # the hole is told
        return published.digest, trail.entry(published.leaf_hash)
    except RegistryError as error:
        if reference.startswith("sha256:"):
            if _adapter_entry(trail, reference) is None:
                raise ExportError(
                    f"adapter {reference}: no record of this log made it; `trailmark log show`"
                ) from error
            return reference, None
        unpublished = _trained_as(trail, reference)
        if unpublished is None:
            raise
        raise ExportError(
            f"adapter {reference!r}: trained, but not published; run `trailmark publish {reference}`, "
            f"or give its digest {unpublished}"
        ) from error


def gather(trail: "Trail", reference: str) -> Dossier:
    """Return the dossier of a published name, name@version or an adapter's digest, as the log stands now.

    Raises:
        ExportError, RegistryError: no such adapter.
    """
    digest, publication = resolve_adapter(trail, reference)
    entry = _adapter_entry(trail, digest)
    if entry is None:
        raise ExportError(f"adapter {reference!r}: the log holds no record of how {digest} was made")
    log = _log_state(trail)
    body = entry.record.body if entry.record is not None else None
    assert body is None or isinstance(body, AdapterBody), "an adapter record has an adapter's body"
    measurements = tuple(_measurements(trail, digest))
    signature = _signature(trail, digest)
    own = [entry.leaf_hash, *(item.leaf_hash for item in (publication, signature and signature[0]) if item)]
    lineage = Lineage(trail)
    behind = [trail.entry(leaf) for leaf in lineage.closure(own)]
    measured = [item.leaf_hash for item in _benchmarks(trail, digest)]
    rests_on = [trail.entry(leaf) for leaf in lineage.closure([*own, *measured])]
    proofs, proof_file_of = _proofs(trail, lineage, [*own, *measured])
    first = first_keys(trail)
    refined = tuple(_refined(item, first) for item in behind if item.leaf.kind == "refinement")
    sources = tuple(_source(item, first) for item in behind if item.leaf.kind == "dataset")
    name, version = _name_of(publication, entry, digest)
    return Dossier(
        digest=digest,
        name=name,
        version=version,
        entry=entry,
        body=body,
        publication=publication,
        manifest=_manifest(trail, digest),
        settings=_settings(trail, entry),
        base=_base(trail, entry),
        refined=refined,
        sources=sources,
        people=tuple(
            _people(behind, [item for item in refined if item.entry.leaf_hash in entry.leaf.parents], sources)
        ),
        measurements=measurements,
        signature=signature,
        proofs=proofs,
        proof_file_of=proof_file_of,
        entries=tuple(rests_on),
        holes=tuple(_holes(trail, rests_on)),
        log=log,
        first_keys=first,
        void={item.entry.leaf_hash: item.sentence for item in void_behind(trail, [*own, *measured], People(trail))},
    )


def spdx(licence: str) -> str:
    """Return a recorded licence as SPDX spells it, or as it stands when SPDX's list (the part we know) lacks it."""
    try:
        return canonical_licence(licence)
    except LicenceError:
        return licence


def decimal(micro: int) -> str:
    """Return a number in micro-units as decimal text, without trailing zeros."""
    return format(Decimal(micro).scaleb(-6).normalize() + 0, "f")


def instant(time_us: int) -> str:
    """Return a time in microseconds since 1970 as RFC 3339 in UTC, to the microsecond."""
    return (CLOCK_START + timedelta(microseconds=time_us)).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _proofs(trail: "Trail", lineage: Lineage, leaves: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Few record bundles that prove the leaves and their ancestors, and which one proves what; widest first."""
    covers = {leaf: lineage.closure([leaf]) for leaf in leaves}
    measured = {leaf for leaf in covers if trail.entry(leaf).leaf.kind == "benchmark"}
    proofs: dict[str, str] = {}
    file_of: dict[str, str] = {}
    for leaf, covered in sorted(covers.items(), key=lambda item: (item[0] in measured, -len(item[1]), item[0])):
        if leaf not in file_of:
            file = f"{trail.entry(leaf).leaf.kind}-{leaf[:16]}{PROOF_SUFFIX}" if proofs else PROOF_FILE
            proofs[file] = leaf
            file_of = {**dict.fromkeys(covered, file), **file_of}
    return proofs, file_of


def _log_state(trail: "Trail") -> LogState:
    trail.refresh()
    note = trail.log.checkpoint
    checkpoint = open_checkpoint(note, *trail.log.known_keys)
    newest = trail.entry(checkpoint.size - 1).leaf
    # Witnesses may add their lines at any time; the log's own makes the same text for the same tree.
    text, _, lines = note.rpartition("\n\n")
    own = [line for line in lines.split("\n") if line.startswith(f"\u2014 {checkpoint.origin} ")]
    signed = "\n".join([text, "", *own, ""])
    return LogState(checkpoint.origin, checkpoint.size, checkpoint.root.hex(), signed, newest.time_us)


def _adapter_entry(trail: "Trail", digest: str) -> "Entry | None":
    """The newest adapter record that made a digest, by its public header, so that an erased one is found too."""
    newest = None
    for index, _, leaf in trail.leaves():
        if leaf.kind == "adapter" and any(item.digest == digest and item.kind == "adapter" for item in leaf.subjects):
            newest = index
    return None if newest is None else trail.entry(newest)


def _trained_as(trail: "Trail", name: str) -> str | None:
    found = None
    for entry in trail.entries(kind="adapter"):
        for output in () if entry.record is None else entry.record.outputs:
            if (output.kind, output.name) == ("adapter", name):
                found = output.digest
    return found


def _name_of(publication: "Entry | None", entry: "Entry", digest: str) -> tuple[str, int | None]:
    body = None if publication is None or publication.record is None else publication.record.body
    if isinstance(body, PublicationBody):
        return body.name, body.version
    return (digest[7:19] if entry.record is None else getattr(entry.record.body, "name", digest[7:19])), None


def _benchmarks(trail: "Trail", digest: str) -> Iterable["Entry"]:
    """The benchmark records whose public header names an adapter, erased ones too."""
    for entry in trail.entries(kind="benchmark"):
        if any(item.digest == digest for item in entry.leaf.subjects):
            yield entry


def _measurements(trail: "Trail", digest: str) -> Iterable[Measurement]:
    for entry in _benchmarks(trail, digest):
        if entry.record is not None and isinstance(entry.record.body, BenchmarkBody):
            yield Measurement(entry, entry.record.body, recorded_confidence(trail, entry.record.config))


def _signature(trail: "Trail", digest: str) -> "tuple[Entry, ModelSignatureBody] | None":
    found = None
    for entry in trail.entries(kind="model_signature"):
        if entry.record is not None and isinstance(entry.record.body, ModelSignatureBody):
            found = (entry, entry.record.body) if entry.record.body.digest == digest else found
    return found


def _manifest(trail: "Trail", digest: str) -> Manifest | None:
    try:
        return trail.store.manifest(digest)
    except StoreError:
        return None


def _settings(trail: "Trail", entry: "Entry") -> Mapping[str, Any] | None:
    config = None if entry.record is None else entry.record.config
    if config is None or not trail.store.has(config):
        return None
    settings: Mapping[str, Any] = trail.get_json(config)
    return settings


def _base(trail: "Trail", entry: "Entry") -> Base | None:
    """The base model among the adapter's parents; known by its digest alone when the log has no record of it."""
    for leaf in entry.leaf.parents:
        parent = trail.entry(leaf)
        if parent.leaf.kind != "base_model":
            continue
        body = parent.record.body if parent.record is not None else None
        digest = next(item.digest for item in parent.leaf.subjects if item.kind == "base_model")
        if isinstance(body, BaseModelBody):
            return Base(digest, body.name, parent, body)
        return Base(digest, f"erased base model {digest[7:19]}", parent, None)
    digests = [item.digest for item in entry.leaf.subjects if item.kind == "base_model"]
    return Base(digests[0], f"base model {digests[0][7:19]}", None, None) if digests else None


def _refined(entry: "Entry", first: Mapping[str, str]) -> Refined:
    if entry.record is None or not isinstance(entry.record.body, RefinementBody):
        return Refined(entry, None, f"erased refinement {entry.leaf_hash[:12]}", None, {})
    kept: dict[str, int] = {}
    for part in entry.record.body.per_contributor:
        person = first.get(part.key_id, part.key_id)
        kept[person] = kept.get(person, 0) + part.num_kept
    digest = next((item.digest for item in entry.record.outputs if item.kind == "refined"), None)
    return Refined(entry, entry.record.body, entry.record.body.name, digest, kept)


def _source(entry: "Entry", first: Mapping[str, str]) -> Source:
    if entry.record is None or not isinstance(entry.record.body, DatasetBody):
        return Source(entry, None, None, f"erased dataset {entry.leaf_hash[:12]}", None)
    signer = next((party.key_id for party in entry.record.contributors), "")
    digest = next((item.digest for item in entry.record.outputs if item.kind == "dataset"), None)
    person = first.get(signer, signer) or None
    return Source(entry, entry.record.body, person, entry.record.body.name, digest, signer)


def _people(behind: Iterable["Entry"], learnt: Iterable[Refined], sources: Sequence[Source]) -> Iterable[Person]:
    """Everyone who handed in rows, most kept rows first; the rows kept are those of the refinements learnt from."""
    known: dict[str, Entry] = {}
    for entry in behind:
        if entry.record is not None and isinstance(entry.record.body, ContributorBody):
            known[entry.record.body.key_id] = entry
    given: dict[str, int] = {}
    kept: dict[str, int] = {}
    for source in sources:
        if source.body is not None and source.key_id is not None:
            given[source.key_id] = given.get(source.key_id, 0) + source.body.num_rows
    for refined in learnt:
        for person, num_kept in refined.kept.items():
            kept[person] = kept.get(person, 0) + num_kept
    signed = {source.signed_with: source.key_id for source in sources if source.key_id}
    found = []
    for key_id in {**given, **kept, **known}:
        introduced = known.get(key_id)
        name = (
            None if introduced is None or introduced.record is None else getattr(introduced.record.body, "name", None)
        )
        keys = dict.fromkeys([key_id, *(key for key, person in signed.items() if person == key_id)])
        found.append(Person(key_id, name, introduced, given.get(key_id, 0), kept.get(key_id), tuple(keys)))
    return sorted(found, key=lambda item: (-(item.num_kept or 0), -item.num_given, item.label))


def _holes(trail: "Trail", entries: Iterable["Entry"]) -> Iterable[Hole]:
    reasons = {
        entry.record.body.leaf: entry.record.body.reason
        for entry in trail.entries(kind="redaction")
        if entry.record is not None and isinstance(entry.record.body, RedactionBody)
    }
    for entry in entries:
        if entry.record is None:
            yield Hole(entry.leaf_hash, entry.leaf.kind, reasons.get(entry.leaf_hash, "no reason recorded"))
