"""Records that count for nothing: signed with a key from its revocation on, or after another had taken its place.

Which they are is `KeyHistory`'s to say, as in `verify` and the monitor. Here they are found behind a thing about to be
used, and told with what to do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.bodies import ApprovalBody, BaseModelBody, DatasetBody
from attribution.lineage import Lineage
from attribution.log.facts import utc
from attribution.log.proved import VerifyError
from attribution.people import People
from attribution.records import key_ids_of
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

CHECKS = frozenset({"revoked key", "rotated key"})
AGAIN = {"adapter": "train again", "refinement": "refine and train again"}


class VoidRecordError(UserError):
    """Something stands on records that count for nothing; each is named, with its key and what to do."""


@dataclass(frozen=True)
class VoidRecord:
    """A record that counts for nothing. `why` names the key and nobody; `name` is whose the key is."""

    entry: "Entry"
    key_id: str
    name: str
    why: str
    needs_key: bool

    @property
    def sentence(self) -> str:
        """As `told`, for readers who can do nothing about it, and without a name."""
        return f"{self.entry.leaf.kind} record {self.entry.leaf_hash} is {self.why}: it counts for nothing"

    @property
    def told(self) -> str:
        """A sentence with record, person, key and remedy."""
        return f"{_label(self.entry)} of {self.name}: {self.why}, {self._remedy()}"

    def _remedy(self) -> str:
        leaf, body = self.entry.leaf_hash[:12], self.entry.record.body if self.entry.record is not None else None
        rotate = f"give {self.name} a new key with `trailmark key rotate {self.name!r} --lost`, "
        new_key = rotate if self.needs_key else ""
        match body:
            case DatasetBody():
                return (
                    f"so whose rows it holds is unknown; {new_key}hand them in again with `trailmark contribute FILE "
                    f"--as {self.name!r}`, and take these out with `trailmark erase {leaf} --reason WHY` or name only "
                    "others with --dataset"
                )
            case ApprovalBody():
                return (
                    f"so who approved is unknown; {new_key}let {self.name} approve again with `trailmark approve`, or "
                    f"take it out with `trailmark erase {leaf} --reason WHY`"
                )
            case BaseModelBody():
                return "so who imported it is unknown; train again with --base naming where it comes from, not a digest"
        again = AGAIN.get(self.entry.leaf.kind, f"make the {self.entry.leaf.kind} again")
        return f"so who made it is unknown; {again}"


def void_of(people: People, entry: "Entry", error: VerifyError) -> VoidRecord:
    """Return what is to say of a record whose signature was refused with one of `CHECKS`."""
    assert entry.envelope is not None and error.check in CHECKS
    time_us, key_ids = entry.leaf.time_us, key_ids_of(entry.envelope)
    found = {key_id: people.history.revocation_of(key_id) for key_id in key_ids}
    revoked = {key_id: item for key_id, item in found.items() if item is not None and time_us >= item.from_us}
    key_id = next(iter(revoked), key_ids[0])
    why = error.reason.split(": ", 1)[-1]
    if error.check == "revoked key" and (item := revoked.get(key_id)):
        why = f"signed with key {key_id[:16]}, revoked from {utc(item.from_us)} on ({item.reason})"
    name = people.names.get(key_id, key_id[:12])
    current = people.by_name.get(name)
    needs_key = current is not None and people.history.revocation_of(current.key_id) is not None
    return VoidRecord(entry, key_id, name, why, needs_key)


def void_record(people: People, entry: "Entry") -> VoidRecord | None:
    """Return why a record counts for nothing; None where it counts, was erased, or is at fault in another way."""
    if entry.record is None:
        return None
    try:
        people.signers_of(entry)
    except VerifyError as error:
        return void_of(people, entry, error) if error.check in CHECKS else None
    return None


def void_behind(trail: "Trail", leaf_hashes: Iterable[str], people: People) -> list[VoidRecord]:
    """Return what counts for nothing among records and all they were made from, in log order.

    A contributor's own record is none: it only brings a key, and the rows that this key signed are judged themselves.
    """
    entries = map(trail.entry, Lineage(trail).closure(leaf_hashes))
    found = (void_record(people, entry) for entry in entries if entry.leaf.kind != "contributor")
    return [item for item in found if item is not None]


def require_counting(trail: "Trail", digest: str, *, to: str) -> None:
    """Refuse to `to` (publish, settle) a thing when a record that it comes from, or an approval of it, is void.

    Raises:
        VoidRecordError: names each such record, its key and the remedy.
    """
    maker, people = trail.find(digest), People(trail)
    void = [] if maker is None else void_behind(trail, [maker.leaf_hash], people)
    void += _void_approvals(trail, digest, people)
    if void:
        lines = [f"cannot {to} {digest}: it stands on records that count for nothing", *(item.told for item in void)]
        if any(item.entry.leaf.kind == "dataset" for item in void):
            lines.append("then refine and train again")
        raise VoidRecordError("\n".join(lines))


def _void_approvals(trail: "Trail", digest: str, people: People) -> list[VoidRecord]:
    """The approvals of a thing that count for nothing and that nobody of that name has given again."""
    void: dict[tuple[str, str], VoidRecord] = {}
    for entry in trail.entries(kind="approval"):
        body = entry.record.body if entry.record is not None else None
        if entry.record is None or not isinstance(body, ApprovalBody) or body.decision != "approved":
            continue
        if all(item.digest != digest for item in entry.record.inputs):
            continue
        found = void_record(people, entry)
        if found is not None:
            void[found.name, body.subject] = found
        else:
            signers = key_ids_of(entry.envelope) if entry.envelope is not None else ()
            for key_id in signers:
                void.pop((people.names.get(key_id, ""), body.subject), None)
    return list(void.values())


def _label(entry: "Entry") -> str:
    """Kind, name where there is one, and the beginning of the leaf hash."""
    name = getattr(entry.record.body, "name", "") if entry.record is not None else ""
    return " ".join([entry.leaf.kind, *([repr(name)] if name else []), f"({entry.leaf_hash[:12]})"])
