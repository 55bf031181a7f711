"""The plan of a settlement: a JSON blob from which anyone with this home can measure any of its cells again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attribution.credit import RULE
from attribution.records import from_plain, to_plain
from pipelines.settle.game import Game
from pipelines.settle.subject import Subject

if TYPE_CHECKING:
    from attribution.trail import Trail

TOLERANCE = "0.0005"
"""How far a cell measured again may lie from the recorded one; of a likelihood, which may be small, as a part of it. On
one machine with as many threads the bits are equal; another rounds otherwise, and Adam turns rounding into movement, so
a cell that differs there is no proof of a lie."""


@dataclass(frozen=True)
class PlannedPlayer:
    """A player in the order of the bits of a coalition; its name is said elsewhere, where it may be erased."""

    kind: str
    id: str
    num_rows: int


@dataclass(frozen=True)
class SettlePlan:
    """What was measured and how; numbers with a point stand as text, for the blob holds integers alone.

    `prior`: digest of the table of predicted gains that the fit started from (a row for each player), '' without one.
    `rule`: the version of `attribution.credit` that drew and fitted; 0 in plans of version 1, which do not say.
    """

    version: int
    adapter: str
    base: str
    dataset: str
    settings: str
    suite: str
    over: str
    mode: str
    utility: str
    max_new_tokens: int
    others: tuple[str, ...]
    game: str
    players: tuple[PlannedPlayer, ...]
    items: tuple[str, ...]
    seed: int
    tolerance: str
    prior: str
    rule: int

    @property
    def player_ids(self) -> tuple[str, ...]:
        return tuple(player.id for player in self.players)

    def put(self, trail: "Trail") -> str:
        """Store the plan and return its digest."""
        return trail.put_json(to_plain(self, "plan"))

    @classmethod
    def get(cls, trail: "Trail", digest: str) -> "SettlePlan":
        """Return a stored plan."""
        plan: SettlePlan = from_plain(cls, {"rule": 0, **trail.get_json(digest)}, "plan")
        return plan


def plan_of(
    subject: Subject, game: Game, *, suite: str, others: tuple[str, ...], items: tuple[str, ...], **how: Any
) -> SettlePlan:
    """Return the plan of a settlement; `how`: utility, max_new_tokens, seed."""
    assert subject.entry.record is not None
    return SettlePlan(
        version=2,
        adapter=subject.adapter.digest,
        base=subject.adapter.base_digest,
        dataset=subject.dataset,
        settings=subject.entry.record.config or "",
        suite=suite,
        over=game.over,
        mode=game.mode,
        others=others,
        game=game.digest,
        players=tuple(PlannedPlayer(player.kind, player.id, player.num_rows) for player in game.players),
        items=items,
        tolerance=TOLERANCE,
        prior="",
        rule=RULE,
        **how,
    )
