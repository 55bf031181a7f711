"""Who gets what of a pool: integer arithmetic alone, the same on every machine and in every order.

Three rules hold by construction, and tests/attribution/test_payouts.py tries to break them:

1. What is paid and what is not attributed sum to the pool, to the unit.
2. A request's parts sum to its fee, and its platform part is rounded up; so who pays fees to themselves gets back at
   most what they paid less the platform's share.
3. An identity's amount is rounded down, and the divisor is blind to how people are cut into identities and to who
   passes the threshold. Cutting an identity into several whose values sum to its own gains nothing, not even a unit,
   and nobody gains by another's falling short. (The largest remainder, fairer by less than one unit a person, would pay
   one unit to each of a thousand identities that are owed 0.9: it is used where nobody can add a name, among base,
   adapter and data, and not among people.)

What no rule with clipping can refuse: who mixes good rows with harmful ones under one name, and then cuts the harmful
ones off, earns what the good ones alone are worth. That is the same as handing in only those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from statistics import NormalDist
from typing import Literal

MILLION = 1_000_000
MICRO = 1_000_000

Verdict = Literal["paid", "no measurable effect", "negative", "later copy", "revoked key"]


@dataclass(frozen=True)
class Split:
    """Shares of a fee in millionths; they sum to 1,000,000."""

    platform: int
    base: int
    adapter: int
    data: int


@dataclass(frozen=True)
class Parts:
    """One request's fee in parts that sum to it."""

    platform: int
    base: int
    adapter: int
    data: int


@dataclass(frozen=True)
class Claim:
    """What a settlement says of one player, in micro-units of its utility, and who gets the money.

    moved: value that was another player's, because the rows behind it are later copies of this one's.
    is_copy: every row of the player is a later copy, so that nothing is left of its own.
    withheld: the part of a positive value whose rows are signed with a revoked key: in the divisor, and paid to nobody.
    is_withheld: every row of the player is signed so, or is a later copy.
    settled_p_micro: the settlement's own chance of such a value without any effect (two-sided, Holm over its players,
    in millionths); 0 where none is known, or where the value was joined with that of copies.
    """

    kind: str
    id: str
    value: int
    low: int
    high: int
    moved: int = 0
    is_copy: bool = False
    settled_p_micro: int = 0
    withheld: int = 0
    is_withheld: bool = False

    @property
    def is_barred(self) -> bool:
        """Whether nothing is left of it that could be paid, whatever it was measured at."""
        return self.is_copy or self.is_withheld


@dataclass(frozen=True)
class Payout:
    """A claim and its money: `amount` is paid, `low` and `high` are the amounts at the ends of the value's interval.

    p_micro: one-sided chance of such a value with no effect at all, after Holm where that is asked for, in millionths.
    """

    claim: Claim
    verdict: Verdict
    p_micro: int
    amount: int
    low: int
    high: int


@dataclass(frozen=True)
class Allocation:
    """A pool shared out: payouts in the order of the claims' (kind, id), and what nobody has a settled claim to.

    divisor: the value, in micro-units, that the whole pool stands for.
    """

    pool: int
    divisor: int
    payouts: tuple[Payout, ...]
    unattributed: int


def split_fee(fee: int, split: Split) -> Parts:
    """Return a fee's parts: the platform's rounded up, the rest by largest remainder (ties: data, adapter, base)."""
    platform = -(-fee * split.platform // MILLION)
    rest = fee - platform
    weights = (split.data, split.adapter, split.base)
    total = sum(weights)
    if not total:
        return Parts(fee, 0, 0, 0)
    floors = [rest * weight // total for weight in weights]
    by_remainder = sorted(range(3), key=lambda k: -(rest * weights[k] % total))
    for k in by_remainder[: rest - sum(floors)]:
        floors[k] += 1
    data, adapter, base = floors
    return Parts(platform, base, adapter, data)


def allocate(pool: int, claims: Sequence[Claim], *, gain: int, confidence: float, familywise: bool) -> Allocation:
    """Share `pool` out by settled values: net, then threshold, then clip.

    Semantics: amount_i = floor(pool * value_i / divisor) for each i whose value is distinguishable from zero, with
    divisor = max(gain, sum of all positive values and of what is withheld); everything else is unattributed. `gain` is
    what the adapter as a whole was measured to change (full - empty, micro-units). Values are already net over the
    period's items, harm in one item against good in another.

    confidence: that of the intervals, two-sided. A player passes when its lower bound is above zero and, with
    `familywise`, when Holm's step-down keeps the chance of paying any player without effect under (1 - confidence) / 2,
    however many names join; the settlement's own test, which knows the shape of its errors, must agree.
    """
    ordered = sorted(claims, key=lambda claim: (claim.kind, claim.id))
    chances = _chances(ordered, confidence=confidence)
    if familywise:
        settled = (claim.settled_p_micro / MICRO / 2 for claim in ordered)
        chances = [max(pair) for pair in zip(_holm(chances), settled, strict=True)]
    limit = (1 - confidence) / 2
    passed = [
        not claim.is_barred and claim.low > 0 and claim.value > 0 and chance <= limit + 1e-12
        for claim, chance in zip(ordered, chances, strict=True)
    ]
    divisor = max(gain, sum(max(claim.value, 0) + claim.withheld for claim in ordered), 1)
    payable = pool if gain > 0 else 0

    def amount(value: int) -> int:
        return payable * min(value, divisor) // divisor

    payouts = tuple(
        Payout(claim, _verdict(claim, passes), round(chance * MICRO), *_amounts(claim, passes, amount))
        for claim, chance, passes in zip(ordered, chances, passed, strict=True)
    )
    return Allocation(pool, divisor, payouts, pool - sum(payout.amount for payout in payouts))


def joined_half_width(one: int, other: int) -> int:
    """Return the half-width of the sum of two estimates, in quadrature, rounded up.

    The values of two copies come out of one regression with errors that pull against each other, so this errs wide.
    """
    square = one * one + other * other
    root = isqrt(square)
    return root if root * root == square else root + 1


def _amounts(claim: Claim, passes: bool, amount: Callable[[int], int]) -> tuple[int, int, int]:
    if not passes:
        return 0, 0, 0
    return amount(claim.value), amount(claim.low), amount(claim.high)


def _verdict(claim: Claim, passes: bool) -> Verdict:
    if passes:
        return "paid"
    if claim.is_barred:
        return "revoked key" if claim.is_withheld else "later copy"
    return "negative" if claim.high < 0 else "no measurable effect"


def _chances(claims: Sequence[Claim], *, confidence: float) -> list[float]:
    """One-sided chance of each value with no effect, from the distance of its lower bound, 1 for the barred."""
    normal = NormalDist()
    border = normal.inv_cdf((1 + confidence) / 2)
    chances = []
    for claim in claims:
        half_width = max(claim.value - claim.low, 1)
        chances.append(1.0 if claim.is_barred else normal.cdf(-border * claim.value / half_width))
    return chances


def _holm(chances: Sequence[float]) -> list[float]:
    """Holm's adjusted chances. Source: Holm (1979), A simple sequentially rejective multiple test procedure."""
    tested = sorted((chance, index) for index, chance in enumerate(chances) if chance < 1.0)
    adjusted = list(chances)
    highest = 0.0
    for rank, (chance, index) in enumerate(tested):
        highest = max(highest, min(1.0, chance * (len(tested) - rank)))
        adjusted[index] = highest
    return adjusted
