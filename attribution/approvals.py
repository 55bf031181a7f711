"""Human sign-off: what is asked for, who said yes or no under their own key, and whether that is enough.

A request is a blob that names a workflow's step and the digests to be approved; an `approval` record's subject is that
blob's digest. When anything under it changes, the digest is another one, and what was said before does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from attribution.bodies import ApprovalBody
from attribution.log.proved import VerifyError
from attribution.people import People, signing_key
from attribution.records import Artefact, Party, canonical_bytes
from attribution.store import digest_of
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

ROLE = "approver"
REQUEST_VERSION = 1


@dataclass(frozen=True)
class Request:
    """What a step asks people to approve."""

    workflow: str
    step: str
    artefacts: tuple[Artefact, ...]

    def to_bytes(self) -> bytes:
        """Return the canonical JSON whose digest is the subject of the approvals."""
        things: list[Any] = [{"kind": item.kind, "digest": item.digest} for item in self.artefacts]
        value = {"v": REQUEST_VERSION, "workflow": self.workflow, "step": self.step, "artefacts": things}
        return canonical_bytes(value, "approval request")

    @property
    def subject(self) -> str:
        """The digest that an approval names."""
        return digest_of(self.to_bytes())


@dataclass(frozen=True)
class Decision:
    """What one person said last; `leaf_hash` is the record."""

    name: str
    approved: bool
    note: str
    leaf_hash: str


@dataclass(frozen=True)
class Standing:
    """Whether a request is approved, refused or waiting; `decisions` are those that count, one per person.

    `void`: why what somebody among the missing said does not count, one sentence each.
    """

    status: Literal["approved", "refused", "waiting"]
    decisions: tuple[Decision, ...]
    missing: tuple[str, ...]
    required: int
    void: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """A few words for people."""
        said = ", ".join(
            f"{item.name} {'approved' if item.approved else 'refused'}" + (f" ({item.note})" if item.note else "")
            for item in self.decisions
        )
        return (
            f"{self.required} of {', '.join((*(item.name for item in self.decisions), *self.missing))} must approve"
            + "".join(f"; {text}" for text in (said, *self.void) if text)
        )


def decide(trail: "Trail", request: Request, *, name: str, approve: bool, note: str = "") -> "Entry":
    """Record a decision signed with the key of `name`.

    Raises:
        UserError: an unknown name, no private key here, or a key other than the one they have now.
    """
    key = signing_key(trail, name, what="approver")
    subject = trail.store.put_blob(request.to_bytes())
    return trail.record(
        "approval",
        ApprovalBody(subject=subject, decision="approved" if approve else "refused", reason=note),
        inputs=request.artefacts,
        outputs=[Artefact("approval", f"{request.workflow}.{request.step}", subject)],
        contributors=[Party(key.key_id, ROLE)],
        signer=key,
    )


def standing(trail: "Trail", request: Request, *, approvers: Sequence[str], required: int) -> Standing:
    """Return how a request stands by the newest decision of each approver that was signed with a key good at its time.

    It is refused once so many refused that `required` can no longer be reached.

    Raises:
        UserError: an approver nobody introduced.
    """
    people = People(trail)
    known = people.by_name
    for name in approvers:
        if name not in known:
            raise UserError(
                f"approver {name!r}: no such contributor; add them with `trailmark contributor add {name!r}`; "
                f"known: {', '.join(known)}"
            )
    subject, newest, void = request.subject, dict[str, Decision](), dict[str, str]()
    for entry in trail.entries(kind="approval"):
        body = entry.record.body if entry.record is not None else None
        if entry.record is None or not isinstance(body, ApprovalBody) or body.subject != subject:
            continue
        try:
            name = people.signer_of(entry)
        except VerifyError as error:
            if entry.record.contributors:
                void[people.names.get(entry.record.contributors[0].key_id, "")] = error.reason
            continue
        newest[name] = Decision(name, body.decision == "approved", body.reason, entry.leaf_hash)
    said = tuple(newest[name] for name in approvers if name in newest)
    num_approved = sum(item.approved for item in said)
    num_refused = len(said) - num_approved
    status: Literal["approved", "refused", "waiting"] = "waiting"
    if num_approved >= required:
        status = "approved"
    elif len(approvers) - num_refused < required:
        status = "refused"
    missing = tuple(name for name in approvers if name not in newest)
    told = tuple(f"what {name} said does not count ({void[name]})" for name in missing if name in void)
    return Standing(status, said, missing, required, told)
