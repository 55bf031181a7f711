"""What attacks on a credit statement gain, in per cent of the money they are after.

    python -m benchmarks.abuse [--quick] [--check] [--out FILE] [--plot FILE]

Eight people teach a tiny Llama 16 facts each; a suite asks for all of them. Every attack's game is played beside the
honest one: all rows are trained on (also those that refinement's own duplicates rule would take out: the harder case),
coalitions are retrained for real, values with 90 % intervals come from `attribution.credit`, near-duplicates are found
by `attribution.priority`, and a pool of 1,000,000 units is shared out as a statement does it. The same retrains are
settled by likelihood, the default of `trailmark settle`, which is judged, and by its other two utilities, which are
shown. The gain is what the attacker gets more than without the attack; for an outsider, all that it gets. Seeds differ
in base, facts, order and coalitions. The bound is the upper end of the 90 % interval of the mean over seeds (Student's
t). Replay, self-dealing and relabelling need no training: they are tried on a home with contributions, receipts and fee
tables.
"""

import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

import torch

from attribution.payouts import Allocation, allocate
from attribution.priority import NearDuplicates, prioritise
from attribution.records import from_plain
from attribution.statement import Copies, Settled, claims_of
from benchmarks.abuse_lab import (
    CONFIDENCE,
    SYLLABLES,
    UNRELATED,
    UTILITIES,
    Fact,
    LabSize,
    Person,
    encode_question,
    make_facts,
    registered,
    settle,
    train_base,
    word,
)
from benchmarks.abuse_traffic import traffic_gains
from benchmarks.adapter_traffic import parser, report
from benchmarks.cuda.report import Figure

POOL = 1_000_000
MAX_GAIN_PERCENT = 2.0
SEEDS, QUICK_SEEDS = 8, 2
# Two-sided 90 % points of Student's t by degrees of freedom.
T_90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833, 11: 1.796}
LOOK_ALIKES = str.maketrans({"a": "\u0430", "e": "\u0435", "o": "\u043e", "p": "\u0440", "i": "\u0456"})
HONEST = "honest"
SHOWN = {"exact_match": "by exact match: ", "log_likelihood": "by log-likelihood: "}
"""What the figures of a utility that is not judged begin with."""
IF_TOLD = "gain if all names could be told from zero"
"""Where many names lose because few of their values can be told from zero, this says what more retrains would give."""
HONEST_FLOORS = {"~ honest, paid in all": 30.0, "~ honest, people paid": 5.0}
"""Per cent of the pool, and of eight people: where nobody is paid no attack can gain, and the table says nothing."""
DEFAULT, SEMANTIC = NearDuplicates(), NearDuplicates("semantic")


@dataclass(frozen=True)
class Attack:
    """A line of the table. `game`: what is trained; `mine`: the attacker's names in it, `before`: in the honest one."""

    name: str
    game: str
    mine: tuple[str, ...]
    before: tuple[str, ...] = ()
    near: NearDuplicates = DEFAULT
    has_floor: bool = True


@dataclass
class World:
    """One seed's people and facts."""

    seed: int
    size: LabSize
    facts: dict[str, tuple[Fact, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random_ = random.Random(1000 + self.seed)
        self.facts = {f"p{n}": make_facts(random_, self.size.num_rows) for n in range(self.size.num_people)}
        self.random = random_

    @property
    def honest(self) -> list[Person]:
        """Everybody with rows of their own."""
        return [Person(name, tuple(fact.row() for fact in facts)) for name, facts in self.facts.items()]

    @property
    def questions(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """What the suite asks, of each person alike."""
        return [encode_question(fact.row()) for facts in self.facts.values() for fact in facts]

    @cached_property
    def games(self) -> dict[str, list[Person]]:
        """Every game by its name; the attacker is p0 or comes last."""
        honest, victim = self.honest, self.honest[0]
        rows, number = victim.rows, len(victim.rows)

        def joined(*others: Person) -> list[Person]:
            return [*honest, *others]

        def spelled(spell: Callable[[str], str]) -> list[Person]:
            return joined(Person("copy1", tuple((spell(asked), spell(told)) for asked, told in rows)))

        return {
            HONEST: honest,
            "copied": joined(Person("copy1", rows)),
            "copied x3": joined(*(Person(f"copy{n}", rows) for n in (1, 2, 3))),
            "case": spelled(str.upper),
            "white space": spelled(lambda text: "  ".join(text.split(" ")) + " \n"),
            "look-alikes": spelled(lambda text: text.translate(LOOK_ALIKES)),
            "paraphrase": joined(Person("copy1", tuple(fact.row(1) for fact in self.facts["p0"]))),
            "split in 2": [*_cut(victim, 2), *honest[1:]],
            "split in 4": [*_cut(victim, 4), *honest[1:]],
            "random tokens": joined(Person("spam", tuple(self._noise() for _ in range(number)))),
            "fluent, unrelated": joined(Person("spam", tuple(self._unrelated() for _ in range(number)))),
            "poison": joined(Person("poison", tuple(self._wrong(fact) for fact in self.facts["p0"]))),
        }

    def _noise(self) -> tuple[str, str]:
        return "".join(self.random.choices(SYLLABLES, k=6)), "".join(self.random.choices(SYLLABLES, k=4))

    def _unrelated(self) -> tuple[str, str]:
        place = word(self.random, 2, capital=True)
        return self.random.choice(UNRELATED).format(place=place), f"{word(self.random, 2)}."

    def _wrong(self, fact: Fact) -> tuple[str, str]:
        """An outlier: the victim's question with an answer as unlikely as any."""
        return fact.row()[0], "".join(self.random.choices("zqxjkvw#@%", k=8))


def _cut(person: Person, parts: int) -> list[Person]:
    return [Person(f"{person.name}.{part}", person.rows[part::parts]) for part in range(parts)]


ATTACKS = (
    Attack("clone x1", "copied", ("p0", "copy1"), ("p0",)),
    Attack("clone x3", "copied x3", ("p0", "copy1", "copy2", "copy3"), ("p0",)),
    Attack("thief, exact copy", "copied", ("copy1",)),
    Attack("thief, case changed", "case", ("copy1",)),
    Attack("thief, white space changed", "white space", ("copy1",)),
    Attack("thief, Unicode look-alikes", "look-alikes", ("copy1",)),
    Attack("thief, paraphrase", "paraphrase", ("copy1",), has_floor=False),
    Attack("thief, paraphrase, semantic clusters", "paraphrase", ("copy1",), near=SEMANTIC, has_floor=False),
    Attack("identity split in 2", "split in 2", ("p0.0", "p0.1"), ("p0",)),
    Attack("identity split in 4", "split in 4", tuple(f"p0.{part}" for part in range(4)), ("p0",)),
    Attack("random-token spam", "random tokens", ("spam",)),
    Attack("fluent unrelated spam", "fluent, unrelated", ("spam",)),
    Attack("outlier poisoning", "poison", ("poison",)),
)
THIEVES = tuple(attack.name for attack in ATTACKS if attack.name.startswith("thief") and attack.has_floor)


def share_out(settled: Settled, people: Sequence[Person], near: NearDuplicates) -> Allocation:
    """Return the pool as a statement shares it out."""
    rows = {row.row_id: row for row in registered(people)}
    priority = prioritise(list(rows.values()), near)
    counts: dict[tuple[str, str], int] = {}
    for row_id, owner in priority.owner.items():
        if owner != rows[row_id].contributor:
            pair = (rows[row_id].contributor, owner)
            counts[pair] = counts.get(pair, 0) + 1
    copies = [Copies("lab", "contributor", copier, owner, count) for (copier, owner), count in counts.items()]
    claims = claims_of(settled, copies)
    return allocate(POOL, claims, gain=settled.gain, confidence=CONFIDENCE, familywise=True)


def payouts(settled: Settled, people: Sequence[Person], near: NearDuplicates) -> dict[str, int]:
    """Return what everybody gets of the pool."""
    return {payout.claim.id: payout.amount for payout in share_out(settled, people, near).payouts}


def value_share(shared: Allocation, names: Sequence[str]) -> float:
    """Return what the names would get, in per cent of the pool, if every value could be told from zero."""
    values = (payout.claim.value for payout in shared.payouts if payout.claim.id in names)
    return 100 * sum(max(value, 0) for value in values) / shared.divisor


def settlements(world: World, folder: Path | None) -> dict[str, dict[str, Settled]]:
    """Return every game's settlements by utility, read from `folder` where a run of the same plan has left them."""
    file = folder / f"{plan_digest(world.size, [world.seed])[:16]}.json" if folder is not None else None
    kept: dict[str, dict[str, Settled]] = {}
    if file is not None and file.exists():
        for name, values in json.loads(file.read_text()).items():
            kept[name] = {utility: from_plain(Settled, value, name) for utility, value in values.items()}
    missing = [name for name in world.games if not set(UTILITIES) <= set(kept.get(name, ()))]
    base = train_base(world.size, seed=world.seed) if missing else None
    for name in missing:
        kept[name] = settle(base, world.games[name], world.questions, world.size, seed=world.seed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(to_json(kept)))
    return kept


def to_json(kept: Mapping[str, Mapping[str, Settled]]) -> dict[str, dict[str, object]]:
    """Return settlements as JSON types."""
    return {name: {key: asdict(value) for key, value in values.items()} for name, values in kept.items()}


def all_gains(world: World, folder: Path | None) -> dict[str, float]:
    """Play one seed; return the gains by the judged utility, and by the others under names that say so."""
    kept = settlements(world, folder)
    found = {}
    for utility in UTILITIES:
        prefix = SHOWN.get(utility, "")
        for name, value in gains(world.games, {game: kept[game][utility] for game in kept}).items():
            found[f"~ {prefix}{name.removeprefix('~ ')}" if name.startswith("~") else prefix + name] = value
    return found


def gains(games: Mapping[str, Sequence[Person]], settled: Mapping[str, Settled]) -> dict[str, float]:
    """Return each attack's gain of one seed in per cent of the pool, and facts under `~` names."""
    honest = payouts(settled[HONEST], games[HONEST], DEFAULT)
    found = {}
    for attack in ATTACKS:
        paid = payouts(settled[attack.game], games[attack.game], attack.near)
        more = sum(paid.get(name, 0) for name in attack.mine) - sum(honest[name] for name in attack.before)
        found[attack.name] = 100 * more / POOL
        if attack.before:
            alone = share_out(settled[HONEST], games[HONEST], DEFAULT)
            played = share_out(settled[attack.game], games[attack.game], attack.near)
            found[f"~ {attack.name}, {IF_TOLD}"] = value_share(played, attack.mine) - value_share(alone, attack.before)
    found["~ honest, paid in all"] = 100 * sum(honest.values()) / POOL
    found["~ honest, people paid"] = float(sum(amount > 0 for amount in honest.values()))
    found["~ victim's gain by being copied exactly"] = found["clone x1"] - found["thief, exact copy"]
    semantic = payouts(settled[HONEST], games[HONEST], SEMANTIC)
    found["~ honest people's loss under semantic clusters"] = (
        100 * sum(max(honest[name] - semantic.get(name, 0), 0) for name in honest) / POOL
    )
    found["~ adapter's gain"] = settled[HONEST].gain / 1e6
    return found


def upper_bound(values: Sequence[float]) -> float:
    """Return the upper end of the 90 % interval of the mean."""
    if len(values) < 2 or stdev(values) == 0:
        return mean(values)
    return mean(values) + T_90[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def plan_digest(size: LabSize, seeds: Sequence[int]) -> str:
    """Return the SHA-256 of everything that decides the games, printed before any of them is played."""
    worlds = [World(seed, size) for seed in seeds]
    parts = {
        "size": vars(size),
        "attacks": [(attack.name, attack.game, attack.mine, attack.before, vars(attack.near)) for attack in ATTACKS],
        "games": [
            (world.seed, name, [(person.name, person.rows) for person in people])
            for world in worlds
            for name, people in world.games.items()
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def figures_of(found: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Return the table: mean and bound of each attack, then what the honest game was like."""
    figures = []
    unjudged = {attack.name for attack in ATTACKS if not attack.has_floor}
    unjudged |= {name for name in found if name.startswith(tuple(SHOWN.values()))}
    for name, values in found.items():
        if name.startswith("~"):
            figures.append(Figure(f"{name.removeprefix('~ ')}, mean", mean(values), "", HONEST_FLOORS.get(name)))
            if name.endswith(IF_TOLD):
                figures.append(Figure(f"{name.removeprefix('~ ')}, bound", upper_bound(values), "% of the pool"))
            continue
        floor = None if name in unjudged else 0.0 if name in THIEVES[:1] else MAX_GAIN_PERCENT
        figures.append(Figure(f"{name}, mean gain", mean(values), "% of the pool"))
        figures.append(Figure(f"{name}, 90 % upper bound", upper_bound(values), "% of the pool", floor, True))
    return figures


def plot(found: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw every seed's gain and the bound by each utility, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in found if not name.startswith(("~", *SHOWN.values()))]
    chart, axes = pyplot.subplots(figsize=(9, 0.45 * len(names) + 1.6), layout="constrained")
    for utility, colour, shift in zip(UTILITIES, ("#0b7577", "#5a6675", "#a86a00"), (0.24, 0, -0.24), strict=True):
        prefix = SHOWN.get(utility, "")
        label = prefix.removesuffix(": ") or f"by {utility}, judged"
        for place, name in enumerate(reversed(names)):
            values = found.get(prefix + name, [])
            if values:
                height = place + shift
                axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.4, markersize=4)
                axes.plot([mean(values), upper_bound(values)], [height, height], "-", color=colour, linewidth=1.6)
                axes.plot(upper_bound(values), height, "|", color=colour, markersize=9, markeredgewidth=1.6)
        axes.plot([], [], "-o", color=colour, markersize=4, label=label)
    axes.axvline(MAX_GAIN_PERCENT, color="#c62a2f", linewidth=1, linestyle="--", label="floor: 2 %")
    axes.axvline(0, color="#5a6675", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks([-100, -50, -10, -5, 0, 2, 5, 10], ["-100", "-50", "-10", "-5", "0", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("gain, % of the pool (points: seeds; line: mean to the 90 % upper bound)")
    axes.legend(loc="lower right")
    chart.savefig(file, dpi=150)


def main() -> int:
    """Run the benchmark; return the exit status."""
    options_parser = parser("What attacks on a credit statement gain.")
    options_parser.add_argument("--plot", type=Path, help="write the table as a picture here")
    options_parser.add_argument(
        "--keep", type=Path, help="a folder for each seed's settlements; what is there is not run again"
    )
    options_parser.add_argument("--seeds", type=int, help=f"how many (default {SEEDS}, --quick: {QUICK_SEEDS})")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    size = LabSize()
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    digest = plan_digest(size, seeds)
    print(f"plan {digest}: {len(ATTACKS) + 3} attacks, {len(seeds)} seeds")
    found: dict[str, list[float]] = {}
    started = time.process_time()
    for seed in seeds:
        world = World(seed, size)
        for name, value in all_gains(world, options.keep).items():
            found.setdefault(name, []).append(value)
        print(f"seed {seed}: {time.process_time() - started:.0f} CPU seconds so far", flush=True)
    with tempfile.TemporaryDirectory(prefix="abuse-") as folder:
        found |= {name: [value] for name, value in traffic_gains(Path(folder)).items()}
    if options.plot:
        plot(found, options.plot)
    facts = {"plan": digest, "seeds": list(seeds), "lab": vars(size), "gains_percent": found}
    return report(figures_of(found), options, cpu_s=round(time.process_time() - started), **facts)


if __name__ == "__main__":
    sys.exit(main())
