"""The refined dataset that a run learns from, by name or digest."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.records import Artefact
    from attribution.trail import Trail


class TrainError(UserError):
    """A training run that cannot start, or ended without an adapter."""


@dataclass(frozen=True)
class Refined:
    """A refined dataset as a run's input."""

    name: str
    digest: str

    @property
    def artefact(self) -> "Artefact":
        from attribution.records import Artefact

        return Artefact("refined", self.name, self.digest)


def resolve_refined(trail: "Trail", dataset: str) -> Refined:
    """Return the refined dataset of a name or digest. Raises TrainError listing the names that exist."""
    from attribution.bodies import RefinementBody
    from attribution.erasure import remaining

    known: dict[str, Refined] = {}
    for entry in trail.entries(kind="refinement"):
        if entry.record is None or not isinstance(entry.record.body, RefinementBody):
            continue
        name = entry.record.body.name
        for output in entry.record.outputs:
            if output.kind == "refined":
                left = remaining(trail, output.digest)
                known[name] = known[output.digest] = known[left] = Refined(name, left)
    if dataset not in known:
        names = ", ".join(sorted({refined.name for refined in known.values()})) or "none"
        raise TrainError(f"dataset {dataset!r}: no such refined dataset; known: {names} (see `trailmark refine`)")
    return known[dataset]
