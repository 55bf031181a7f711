"""A record whose place in the log, commitment and signature have been checked; and the error of a check that failed."""

from dataclasses import dataclass

from attribution.bodies import PublicationBody
from attribution.records import Leaf, Record
from configs.errors import UserError


class VerifyError(UserError):
    """A check that failed; `check` names it."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(f"{check}: {reason}")
        self.check = check
        self.reason = reason


@dataclass(frozen=True)
class ProvedRecord:
    """Leaf `index` of the log, the record behind it (None when it was erased) and the ids of the keys that signed."""

    index: int
    leaf_hash: str
    leaf: Leaf
    record: Record | None
    signers: tuple[str, ...] = ()

    def makes(self, *digests: str | None) -> bool:
        """Return whether one of the digests is an output; an erased record is judged by its header."""
        if self.leaf.kind == "publication":
            return False
        if self.record is None:
            return any(subject.digest in digests for subject in self.leaf.subjects if subject.kind == self.leaf.kind)
        return any(output.digest in digests for output in self.record.outputs)

    def publishes(self, digest: str | None, name: str | None = None) -> bool:
        """Return whether this is a publication of `digest`, as `name` (NAME or NAME@VERSION) if that is given."""
        body = self.record.body if self.record is not None else None
        if not isinstance(body, PublicationBody) or body.digest != digest:
            return False
        return name is None or name in (body.name, f"{body.name}@{body.version}")
