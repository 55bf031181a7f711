"""A game: the players behind an adapter, the rows or adapters they bring, and what a coalition of them comes to.

A switch is a way to part an adapter into players. Another kind of lineage node (a prompt's version, an index, a patch)
joins by a `Switch` of its own in `switches.SWITCHES`; nothing else knows their names.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from attribution.settlement import PlayerKind

if TYPE_CHECKING:
    from attribution.trail import Trail
    from pipelines.settle.subject import Subject
    from pipelines.train.data import Example

Bits = NDArray[np.bool_]
Mode = Literal["replay", "train", "combine"]
"""How a coalition becomes a model.

replay    the recorded run again, step by step, the rows of absent players at weight zero: same schedule, same batches
train     planned and trained from the start on the rows that are left, as if the others had never been there
combine   adapters as they are, their changes to the base added up; nothing is trained
"""


@dataclass(frozen=True)
class Player:
    """Something that can be switched off. `num_rows`: rows that hang on it, 0 where it brings none."""

    kind: PlayerKind
    id: str
    name: str
    num_rows: int = 0


@dataclass(frozen=True)
class Game:
    """Players, and what they share: rows [N] (`examples`), or `adapters` one for each player.

    `chosen(coalition)` returns bool [N]: the rows (or adapters) that a coalition bool [n] brings in.
    """

    over: str
    mode: Mode
    players: tuple[Player, ...]
    chosen: Callable[[Bits], Bits]
    examples: tuple["Example", ...] = ()
    adapters: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over everything that a coalition of this game can bring in, in order."""
        hasher = hashlib.sha256()
        for part in (self.mode, *self.adapters, *(player.id for player in self.players if self.adapters)):
            hasher.update(part.encode() + b"\n")
        for example in self.examples:
            hasher.update(f"{example.example_id} {list(example.input_ids)} {list(example.labels)}\n".encode())
        return f"sha256:{hasher.hexdigest()}"


@dataclass(frozen=True)
class Switch:
    """One way to settle: `over` is what the user names it, `build` returns the game of a subject.

    `build` may be given the digests of other adapters, which only a switch with `takes_adapters` accepts.
    """

    over: str
    help: str
    build: Callable[["Trail", "Subject", tuple[str, ...]], Game]
    takes_adapters: bool = False
