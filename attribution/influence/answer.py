"""The answer to "who made this answer?": frozen values and their JSON."""

from dataclasses import asdict, dataclass
from typing import Any

import rfc8785


@dataclass(frozen=True)
class Gain:
    """Mean nats per output token by which the adapter made the completion likelier than the base did."""

    mean: float
    low: float
    high: float
    num_tokens: int
    threshold: float

    @property
    def is_of_base(self) -> bool:
        """Whether the gain cannot be told from zero, or is surely too small to matter."""
        return self.low <= 0 or self.high < self.threshold


@dataclass(frozen=True)
class ContributorPart:
    """A contributor's share of the answer with its interval; `score` is the net predicted gain of their rows, nats."""

    key_id: str
    name: str
    share: float
    low: float
    high: float
    score: float
    score_low: float
    score_high: float


@dataclass(frozen=True)
class ExamplePart:
    """One training row and the nats by which it is predicted to have raised the completion's log-likelihood.

    `low` and `high` are None where the rows were only ranked (see `Attribution.score_unit`). `bm25`, `bm25_rank`: what
    word search gives the row, and its place there among all rows, from 1.
    """

    example_id: str
    contributor: str
    name: str
    score: float
    low: float | None
    high: float | None
    text: str
    bm25: float
    bm25_rank: int


@dataclass(frozen=True)
class BaselineExample:
    """A row that word search finds, best first."""

    example_id: str
    contributor: str
    name: str
    score: float


@dataclass(frozen=True)
class BaselineRank:
    """A contributor's score in a baseline, best first."""

    key_id: str
    name: str
    score: float


@dataclass(frozen=True)
class Attribution:
    """The answer to "who made this answer?". `contributors`' shares and `unattributed` sum to 1.

    `gradient_passes`: backward passes over the answer that the scores took. `influence_leaf`: the record of them.
    `score_unit`: of the examples' scores.
    """

    receipt_id: str
    receipt_leaf: str
    model: str
    base: str
    adapter: str | None
    adapter_name: str | None
    base_did_it: bool
    reason: str
    gain_nats: Gain | None
    contributors: tuple[ContributorPart, ...]
    unattributed: float
    examples: tuple[ExamplePart, ...]
    baselines: dict[str, tuple[BaselineRank, ...]]
    bm25_examples: tuple[BaselineExample, ...]
    method: str
    label: str
    confidence: float
    seed: int
    gradient_passes: int = 0
    influence_leaf: str | None = None
    score_unit: str = "nats"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; floats are rounded to a millionth, so the same answer is the same bytes."""
        return plain(asdict(self))

    def to_json(self) -> str:
        """Return canonical JSON (RFC 8785)."""
        return rfc8785.dumps(self.to_dict()).decode()


def plain(value: Any) -> Any:
    """Return value as JSON types with floats rounded to a millionth, so that equal answers are equal bytes."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
