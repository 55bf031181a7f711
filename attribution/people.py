"""Who may sign and who did: contributors by name, the operator, and every key they have or had, as the log tells it.

Whether a signature counts is `KeyHistory`'s to say, as in `verify` and the monitor: a key signs until another takes its
place, and nothing from its revocation on.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from attribution.bodies import ContributorBody, KeyRevocationBody, KeyRotationBody
from attribution.log.key_history import VoidKeyRecord
from attribution.log.proved import VerifyError
from attribution.log.trust import Trust
from attribution.trust_file import OPERATOR, TRUST_FILE
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.keys import SigningKey
    from attribution.trail import Entry, Trail


@dataclass(frozen=True)
class Person:
    """A name and the key it signs with now; `leaf_hash` is the record that brought the key, '' for a first operator."""

    name: str
    key_id: str
    leaf_hash: str = ""


class People:
    """Everybody who may sign, as of now; of several contributor records of one name the newest counts."""

    def __init__(self, trail: "Trail") -> None:
        self.history = Trust.load(trail.home / TRUST_FILE).history()
        self.names: dict[str, str] = {}  # key id -> whose it is or was
        self._brought: dict[str, str] = {}  # key id -> leaf hash
        for entry in sorted([*trail.entries(kind="contributor"), *trail.notices()], key=lambda entry: entry.index):
            self._take_in(entry)
        operators = [key for key in self.history.keys.values() if key.role == OPERATOR]
        self.names |= {key.key_id: OPERATOR for key in operators}
        in_use = [key.key_id for key in operators if key.until_us is None and key.last_index is None]
        self.by_name = {OPERATOR: Person(OPERATOR, in_use[0], self._brought.get(in_use[0], ""))}
        for key_id, name in self.names.items():
            if name != OPERATOR:  # in log order: the last key of a name is the one in use
                self.by_name[name] = Person(name, key_id, self._brought[key_id])

    def signers_of(self, entry: "Entry") -> tuple[str, ...]:
        """Return the ids of the keys that signed a record; VerifyError when one of them was not good for it then."""
        if entry.record is None or entry.envelope is None:
            raise VerifyError("record", f"record {entry.leaf_hash[:12]} was erased")
        return self.history.check(entry.index, entry.record, entry.envelope, f"record {entry.leaf_hash[:12]}")

    def signer_of(self, entry: "Entry") -> str:
        """Return the name of the one person who signed a record; VerifyError says why it counts as nobody's."""
        signers = self.signers_of(entry)
        if len(signers) != 1 or signers[0] not in self.names:
            raise VerifyError("signature", f"record {entry.leaf_hash[:12]}: not signed by one known person alone")
        return self.names[signers[0]]

    def _take_in(self, entry: "Entry") -> None:
        body = entry.record.body if entry.record is not None else None
        if not isinstance(body, ContributorBody | KeyRotationBody | KeyRevocationBody):
            return
        try:
            self.signers_of(entry)
        except VoidKeyRecord:
            pass  # the key is theirs, and revoked
        except VerifyError:
            return  # it brings no key
        if isinstance(body, ContributorBody):
            self.names = {key_id: name for key_id, name in self.names.items() if name != body.name}
            self.names[body.key_id] = body.name
        elif isinstance(body, KeyRotationBody) and body.old_key_id in self.names:
            self.names[body.key_id] = self.names[body.old_key_id]
        if not isinstance(body, KeyRevocationBody):
            self._brought[body.key_id] = entry.leaf_hash


def first_keys(trail: "Trail") -> dict[str, str]:
    """Return for each key of a contributor that took another's place the first of the chain: it stands for the person.

    Void rotations count too: the key is theirs, and as revoked as the one before.
    """
    first: dict[str, str] = {}
    for entry in trail.notices():
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, KeyRotationBody) and body.role == "contributor":
            first[body.key_id] = first.get(body.old_key_id, body.old_key_id)
    return first


def require_person(trail: "Trail", name: str, *, what: str) -> Person:
    """Return the person of a name; UserError, beginning with `what`, tells the nearest known name."""
    known = People(trail).by_name
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
        UserError: an unknown name, no private key of it in this home, or one that is not the key they have now.
    """
    person = require_person(trail, name, what=what)
    key = trail.keys.get(name)
    if key.key_id != person.key_id:
        source = f"the record {person.leaf_hash[:12]}" if person.leaf_hash else TRUST_FILE
        raise UserError(
            f"{what} {name!r}: wrong key: {trail.keys.directory / (name + '.key')} holds {key.key_id[:16]}, but "
            f"{source} says {person.key_id[:16]}; put that key back"
        )
    return key
