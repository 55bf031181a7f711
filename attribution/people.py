"""Who may sign: contributors by name with the key their record introduced, and the operator."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from attribution.bodies import ContributorBody
from attribution.records import RecordError, signers_of
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.keys import SigningKey
    from attribution.trail import Entry, Trail

OPERATOR = "operator"


@dataclass(frozen=True)
class Person:
    """A name and its key; `leaf_hash` is the record that introduced it, '' for the operator."""

    name: str
    key_id: str
    public_bytes: bytes
    leaf_hash: str


def people(trail: "Trail") -> dict[str, Person]:
    """Return the operator and every contributor by name; of several records of one name the newest counts."""
    operator = trail.keys.get(OPERATOR)
    found = {OPERATOR: Person(OPERATOR, operator.key_id, operator.public_bytes, "")}
    for entry in trail.entries(kind="contributor"):
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, ContributorBody):
            found[body.name] = Person(body.name, body.key_id, bytes.fromhex(body.public_key), entry.leaf_hash)
    return found


def require_person(trail: "Trail", name: str, *, what: str) -> Person:
    """Return the person of a name; UserError, beginning with `what`, tells the nearest known name."""
    known = people(trail)
    if name in known:
        return known[name]
    near = get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"{what} {name!r}: no such contributor; {hint}Add them with `trailmark contributor add {name!r}`; "
        f"known: {', '.join(known)}"
    )


def signing_key(trail: "Trail", name: str, *, what: str) -> "SigningKey":
    """Return the private key with which `name` signs here.

    Raises:
        UserError: an unknown name, no private key of it in this home, or one that is not the key their record names.
    """
    person = require_person(trail, name, what=what)
    key = trail.keys.get(name)
    if key.key_id != person.key_id:
        raise UserError(
            f"{what} {name!r}: wrong key: {trail.keys.directory / (name + '.key')} holds {key.key_id[:16]}, but the "
            f"record {person.leaf_hash[:12]} says {person.key_id[:16]}; put the key of that record back"
        )
    return key


def signed_by(entry: "Entry", person: Person) -> bool:
    """Return whether a record carries a valid signature of that person, and of nobody else."""
    if entry.envelope is None:
        return False
    try:
        return signers_of(entry.envelope, {person.key_id: person.public_bytes}) == (person.key_id,)
    except RecordError:
        return False
