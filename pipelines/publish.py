"""Give an artefact a name: `name@version` means one digest from then on."""

import re
from typing import TYPE_CHECKING

from attribution.registry import NAME_RULE, PUBLISHED_NAME
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.records import Artefact
    from attribution.trail import Draft, Entry, Trail


class PublishError(UserError):
    """A name or digest that cannot be published."""


def publish(
    trail: "Trail", name: str, digest: str, kind: str = "adapter", *, workflow: "Artefact | None" = None
) -> "Entry":
    """Record that the next version of `name` is `digest`.

    The artefact must be the output of a record of this trail and lie unaltered in its store. An adapter also gets a
    model signature, recorded in the same group unless it has one of this home's key. `workflow`: the
    definition of the workflow that asks, an input of the record.

    Raises:
        PublishError: a bad name, an unknown digest, or one of another kind.
        StoreError: its files were altered.
        VoidRecordError: a record it comes from, or an approval of it, is signed with a revoked key.
    """
    from attribution.bodies import PublicationBody
    from attribution.records import Artefact, Party
    from attribution.registry import RegistryError
    from attribution.trail import Draft
    from attribution.void_records import require_counting

    require_name(name)
    _require_artefact(trail, digest, kind)
    require_counting(trail, digest, to="publish")
    artefact = Artefact(kind, name, digest)
    signing, signatures = _signature(trail, digest, kind)
    while True:
        version = trail.registry.next_version(name)
        publication = Draft(
            "publication",
            PublicationBody(name=name, version=version, artefact_kind=kind, digest=digest),
            inputs=(artefact, *signatures, *([workflow] if workflow else [])),
            outputs=(artefact,),
            contributors=(Party(trail.keys.get("operator").key_id, "operator"),),
        )
        try:
            return trail.record_many([*signing, publication])[-1]
        except RegistryError:
            if trail.registry.next_version(name) == version:
                raise  # not taken by another process meanwhile: the name itself is refused


def require_name(name: str) -> None:
    """Raise PublishError unless `name` can be published; such a name is also safe as the name of a folder."""
    if not PUBLISHED_NAME.fullmatch(name):
        raise PublishError(f"name {name!r}: use {NAME_RULE}")


def newest_adapter(trail: "Trail", name: str) -> str:
    """Return the digest of the newest adapter trained under `name`. Raises PublishError listing the names there are."""
    newest: dict[str, str] = {}
    for entry in trail.entries(kind="adapter"):
        if entry.record is not None:
            newest.update({output.name: output.digest for output in entry.record.outputs if output.kind == "adapter"})
    if name not in newest:
        known = ", ".join(sorted(newest)) or "none yet"
        raise PublishError(f"name {name!r}: no adapter was trained under it; trained: {known}; or give its digest")
    return newest[name]


def _signature(trail: "Trail", digest: str, kind: str) -> "tuple[list[Draft], list[Artefact]]":
    """The record to append beside an adapter's publication, if any, and the signature the publication names."""
    from attribution.records import Artefact
    from attribution.signed_models import signature_draft

    if kind != "adapter" or not trail.store.path_of(digest).is_dir():
        return [], []
    found = signature_draft(trail, digest)
    return ([], [found]) if isinstance(found, Artefact) else ([found], list(found.outputs))


def _require_artefact(trail: "Trail", digest: str, kind: str) -> None:
    """Check that a record of this trail made the artefact, and that its bytes are what they were."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise PublishError(f"digest {digest!r}: write sha256: and 64 hex digits, as `trailmark train` prints it")
    entry = trail.find(digest)
    made = {} if entry is None or entry.record is None else {out.digest: out.kind for out in entry.record.outputs}
    if digest not in made:
        raise PublishError(f"digest {digest}: no record of this trail made it; train or refine it here first")
    if made[digest] != kind:
        raise PublishError(f"digest {digest}: it is of kind {made[digest]!r}, not {kind!r}; pass --kind {made[digest]}")
    if trail.store.path_of(digest).is_dir():
        trail.store.get_directory(digest)
    else:
        trail.store.get_blob(digest)
