"""What an answer to a question is made of: findings with their tier, what they rest on, what is missing."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Trail

Tier = Literal["settle", "audit", "explain", "measured", "verbatim", "counted"]
PROMISES: dict[Tier, str] = {
    "settle": "measured by retraining; pays",
    "audit": "causal for small removals",
    "explain": "a ranking with its stability, no causal claim",
    "measured": "two models compared on the same items; says nothing on what made the difference",
    "verbatim": "rows that say the same, word for word; saying it is not causing it",
    "counted": "counted from records",
}
"""What each tier promises, firmest first."""


class Unexplained(UserError):
    """A receipt whose answer cannot be explained for a reason that lies in the store, not in the question."""


@dataclass(frozen=True)
class Finding:
    """One number. `low` and `high` are None for a plain count; `links` are leaf hashes of the records it rests on.

    `confidence` is that of the interval, None without one or when the record no longer says. `kind` says what the
    subject is (contributor, dataset, adapter, ...), '' where the measure does; `p_value` is adjusted for the others.
    """

    subject: str
    measure: str
    value: float
    low: float | None
    high: float | None
    unit: str
    verdict: str
    links: tuple[str, ...]
    confidence: float | None = None
    tier: Tier = "measured"
    kind: str = ""
    p_value: float | None = None

    @property
    def value_text(self) -> str:
        """The number with its unit: whole numbers whole, shares in percent, differences with a sign."""
        if isinstance(self.value, int):
            return f"{self.value:,} {self.unit}"
        if self.unit == "of 1" and self.tier in ("explain", "counted"):
            return f"{self.value:.1%}"
        return self._signed(self.value) + ("" if self.unit == "of 1" else f" {self.unit}")

    @property
    def interval_text(self) -> str:
        """The interval with its confidence and the p-value, '' without one."""
        if self.low is None or self.high is None:
            return ""
        if isinstance(self.low, int) and isinstance(self.high, int):
            text = f"{self.low:,} to {self.high:,}"
        elif self.unit == "of 1" and self.tier == "explain":
            text = f"{self.low:.0%} to {self.high:.0%}"
        else:
            text = f"{self._signed(self.low)} to {self._signed(self.high)}"
        text += "" if self.confidence is None else f" ({self.confidence:.0%})"
        return text if self.p_value is None else f"{text}, p {self.p_value:.3f}"

    def _signed(self, value: float) -> str:
        """A difference of probabilities is mostly small: one place more."""
        return f"{value:+.4f}" if self.unit.startswith("probability") else f"{value:+.3f}"


@dataclass(frozen=True)
class Missing:
    """Evidence that would make the answer firmer, and what supplies it."""

    evidence: str
    remedy: str


@dataclass(frozen=True)
class Cost:
    """What some evidence took: `amount` of `unit` for `what`."""

    what: str
    amount: float
    unit: str


@dataclass(frozen=True)
class RecordLink:
    """A record that an answer rests on, and how anyone checks it offline."""

    index: int
    leaf_hash: str
    kind: str
    label: str

    @property
    def proof(self) -> str:
        """The commands that show the record's proof and check it."""
        return f"trailmark log proof {self.leaf_hash[:16]} --out record.json && trailmark verify record.json"


@dataclass(frozen=True)
class Answer:
    """The reply to one of the five questions. `details` is what plots and tables are drawn from beyond the findings.

    `problem` says why the question could only be answered in part, '' when it could be.
    """

    question: str
    summary: str
    findings: tuple[Finding, ...]
    missing: tuple[Missing, ...]
    method: str
    confidence: float | None
    seed: int
    details: dict[str, Any] = field(default_factory=dict)
    cost: tuple[Cost, ...] = ()
    records: tuple[RecordLink, ...] = ()
    problem: str = ""

    @property
    def links(self) -> tuple[str, ...]:
        """Leaf hashes of every record the answer rests on, each once."""
        return links_of(self.findings)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers of its findings, firmest first."""
        present = {finding.tier for finding in self.findings}
        return tuple(tier for tier in PROMISES if tier in present)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, floats rounded to a millionth: the same evidence gives the same bytes."""
        from attribution.influence.answer import plain

        records = [{**asdict(record), "proof": record.proof} for record in self.records]
        tiers = {tier: PROMISES[tier] for tier in self.tiers}
        return plain({**asdict(self), "links": self.links, "records": records, "tiers": tiers})


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn where a record does not already hold one."""

    num_draws: int = 2000
    confidence: float = 0.9
    seed: int = 0


def links_of(findings: Iterable[Finding]) -> tuple[str, ...]:
    """Return the leaf hashes behind some findings, each once."""
    return tuple(dict.fromkeys(link for finding in findings for link in finding.links))


def records_of(trail: "Trail", leaf_hashes: Sequence[str]) -> tuple[RecordLink, ...]:
    """Return the records of leaf hashes that are in the log, by their place in it; an erased one says so itself."""
    from attribution.lineage import label_of

    found = []
    for leaf_hash in leaf_hashes:
        index = trail.log.index_of(leaf_hash)
        if index is not None:
            entry = trail.entry(index)
            found.append(RecordLink(index, leaf_hash, entry.leaf.kind, label_of(entry)))
    return tuple(sorted(found, key=lambda record: record.index))
