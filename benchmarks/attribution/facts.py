"""Fictional facts in a small grammar: the general text that a base learns first, the rows of a LoRA run, the queries.

Every sentence has nine words and every word is a token, so every row has the same number of targets: means over tokens,
rows and batches agree in every library that is compared.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NAMES = tuple(start + end for end in ("alo", "emir", "in", "ost", "ulan", "yra") for start in "bdfgklmnprstvz")
NUM_KNOWN = 48
"""The first so many names have lasting facts, which the base learns; of the others it hears something new each time."""
VALUES = {
    "town": ("belmoor", "quillan", "tarvik", "osmead", "dravon", "lirien", "hask", "veldt", "pomar", "sundry"),
    "trade": ("smith", "baker", "tailor", "miller", "fisher", "carver", "weaver", "glazier", "printer", "cooper"),
    "pet": ("cat", "goat", "parrot", "ferret", "toad", "swan", "hare", "mole", "otter", "crow"),
    "dish": ("soup", "pie", "stew", "curry", "salad", "bread", "noodles", "cake", "porridge", "jam"),
    "tool": ("hammer", "needle", "chisel", "rake", "lantern", "compass", "kettle", "spindle", "bellows", "loom"),
    "song": ("anthem", "ballad", "carol", "dirge", "elegy", "fugue", "gavotte", "hymn", "jig", "lament"),
    "game": ("chess", "bowls", "darts", "draughts", "hopscotch", "marbles", "quoits", "skittles", "tag", "whist"),
    "stone": ("agate", "beryl", "coral", "diamond", "emerald", "flint", "garnet", "jade", "opal", "pearl"),
}
RELATIONS = tuple(VALUES)
PHRASINGS = (
    "the {relation} of {name} is always the {value} .",
    "people say the {relation} of {name} is {value} .",
    "{name} has the {value} as a favourite {relation} .",
    "the {value} is the {relation} that {name} wants .",
)
HELD_OUT = ("when asked for a {relation} {name} names {value} .", "for {name} the best {relation} must be {value} .")
BEGIN = "<s>"


@dataclass(frozen=True)
class Size:
    """How much there is to learn. Of what the last contributor states, `error_share` is wrong on purpose."""

    num_people: int = 24
    facts_per_person: int = 3
    num_rows: int = 320
    num_queries: int = 40
    num_contributors: int = 8
    error_share: float = 0.5


@dataclass(frozen=True)
class Fact:
    """What is true of somebody."""

    name: str
    relation: str
    value: str

    def say(self, phrasing: str) -> str:
        """Return the sentence."""
        return phrasing.format(name=self.name, relation=self.relation, value=self.value)


@dataclass(frozen=True)
class Row:
    """Two sentences about one person, and who brought them."""

    text: str
    contributor: str


@dataclass(frozen=True)
class Query:
    """A fact in a wording that no row uses: the loss is that of `answer` after `prompt`."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class World:
    """The facts of one seed, the rows that state them, and the queries."""

    facts: tuple[Fact, ...]
    rows: tuple[Row, ...]
    queries: tuple[Query, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a run or a query reads."""
        plain = {"rows": [row.text for row in self.rows], "queries": [[one.prompt, one.answer] for one in self.queries]}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def vocabulary() -> tuple[str, ...]:
    """Return every word, the begin token first."""
    words = {word for phrasing in (*PHRASINGS, *HELD_OUT) for word in phrasing.split() if not word.startswith("{")}
    words |= {*NAMES, *RELATIONS, *(value for values in VALUES.values() for value in values)}
    return (BEGIN, *sorted(words))


def general_text(*, seed: int) -> Iterator[str]:
    """Yield rows without end: known names with their lasting facts, the others with anything."""
    draw = random.Random(f"general:{seed}")
    lasting = {(name, relation): draw.choice(VALUES[relation]) for name in NAMES[:NUM_KNOWN] for relation in RELATIONS}
    while True:
        name = draw.choice(NAMES)
        pair = [
            Fact(name, relation, lasting.get((name, relation)) or draw.choice(VALUES[relation]))
            for relation in draw.sample(RELATIONS, 2)
        ]
        yield " ".join(fact.say(draw.choice((*PHRASINGS, *HELD_OUT))) for fact in pair)


def make_world(size: Size, *, seed: int) -> World:
    """Return one world; the same for the same size and seed on every machine.

    Each person belongs to a contributor who writes four in five of the rows about them; the last contributor errs, so
    that helpful and harmful rows both exist.
    """
    draw = random.Random(f"world:{seed}")
    people = draw.sample(NAMES[NUM_KNOWN:], size.num_people)
    facts = tuple(
        Fact(name, relation, draw.choice(VALUES[relation]))
        for name in people
        for relation in draw.sample(RELATIONS, size.facts_per_person)
    )
    rows = tuple(_row(draw, facts, size, person=number % size.num_people) for number in range(size.num_rows))
    queries = tuple(_query(fact.say(draw.choice(HELD_OUT))) for fact in draw.sample(facts, size.num_queries))
    return World(facts, rows, queries)


def _row(draw: random.Random, facts: Sequence[Fact], size: Size, *, person: int) -> Row:
    owner = person % size.num_contributors
    writer = owner if draw.random() < 0.8 else draw.randrange(size.num_contributors)
    first = person * size.facts_per_person
    chosen = draw.sample(facts[first : first + size.facts_per_person], 2)
    if writer == size.num_contributors - 1:
        chosen = [_wrong(draw, fact) if draw.random() < size.error_share else fact for fact in chosen]
    return Row(" ".join(fact.say(draw.choice(PHRASINGS)) for fact in chosen), f"contributor-{writer}")


def _wrong(draw: random.Random, fact: Fact) -> Fact:
    others = [value for value in VALUES[fact.relation] if value != fact.value]
    return Fact(fact.name, fact.relation, draw.choice(others))


def _query(sentence: str) -> Query:
    *prompt, value, stop = sentence.split()
    return Query(" ".join(prompt), f"{value} {stop}")
