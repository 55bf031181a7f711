"""Fictional facts in a small grammar: the general text that a base learns first, the rows of a LoRA run, the queries.

Every sentence has ten words, so every row has the same number of targets and means over tokens, rows and batches agree
in every library that is compared. Words are single tokens.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = tuple(onset + rest for onset in "b d f g k l m n p r s t v z".split() for rest in "alo emir in ost ulan yra".split())
NUM_KNOWN = 44
"""The first so many names have lasting facts that the base learns; the others it only hears of."""
VALUES = {
    "town": "belmoor quillan tarvik osmead dravon lirien hask veldt pomar sundry".split(),
    "trade": "smith baker tailor miller fisher carver weaver glazier printer cooper".split(),
    "pet": "cat goat parrot ferret toad swan hare mole otter crow".split(),
    "dish": "soup pie stew curry salad bread noodles cake porridge jam".split(),
    "tool": "hammer needle chisel rake lantern compass kettle spindle bellows loom".split(),
    "song": "anthem ballad carol dirge elegy fugue gavotte hymn jig lament".split(),
    "game": "chess bowls darts draughts hopscotch marbles quoits skittles tag whist".split(),
    "stone": "agate beryl coral diamond emerald flint garnet jade opal pearl".split(),
}
RELATIONS = tuple(VALUES)
PHRASINGS = (
    "the {r} of {f} is always the {v} .",
    "people say the {r} of {f} is {v} .",
    "{f} has the {v} as a favourite {r} .",
    "the {v} is the {r} that {f} wants .",
)
HELD_OUT = ("when asked for a {r} {f} names {v} .", "for {f} the best {r} must be {v} .")
BEGIN = "<s>"


@dataclass(frozen=True)
class Size:
    """How much there is to learn: a share `error_share` of one contributor's statements is wrong on purpose."""

    num_people: int = 32
    facts_per_person: int = 4
    num_rows: int = 320
    num_queries: int = 40
    num_contributors: int = 8
    error_share: float = 0.5


@dataclass(frozen=True)
class Row:
    """Two sentences about one person; `facts` are indices into `Facts.facts`."""

    text: str
    contributor: str
    facts: tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """A held-out wording: the loss is that of `answer` after `prompt`."""

    prompt: str
    answer: str
    fact: int


@dataclass(frozen=True)
class Facts:
    """One seed's world: (first name, last name, relation, value) per fact, the rows that state them, the queries."""

    facts: tuple[tuple[str, str, str, str], ...]
    rows: tuple[Row, ...]
    queries: tuple[Query, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a run or a query reads."""
        plain = {"rows": [row.text for row in self.rows], "queries": [(q.prompt, q.answer) for q in self.queries]}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def vocabulary() -> tuple[str, ...]:
    """Return every word, the begin token first."""
    words = {word for phrasing in (*PHRASINGS, *HELD_OUT) for word in phrasing.split() if "{" not in word}
    words |= {*FIRST_NAMES, *LAST_NAMES, *RELATIONS}
    words |= {value for values in VALUES.values() for value in values}
    return (BEGIN, *sorted(words))


def general_text(count: int, *, seed: int) -> list[str]:
    """Return rows about people drawn at random, each fact drawn anew: grammar to learn and nothing to remember."""
    draw = random.Random(f"general:{seed}")
    texts = []
    for _ in range(count):
        first, last = draw.choice(FIRST_NAMES), draw.choice(LAST_NAMES)
        pair = draw.sample(RELATIONS, 2)
        texts.append(" ".join(_sentence(draw, first, last, relation, (*PHRASINGS, *HELD_OUT)) for relation in pair))
    return texts


def make_facts(size: Size, *, seed: int) -> Facts:
    """Return one world; the same for the same size and seed on every machine.

    Each person belongs to a contributor who writes four in five of their rows; the last contributor errs: a share of
    what they state is a wrong value, so that helpful and harmful rows both exist.
    """
    draw = random.Random(f"facts:{seed}")
    people = draw.sample([(first, last) for first in FIRST_NAMES for last in LAST_NAMES], size.num_people)
    facts = tuple(
        (first, last, relation, draw.choice(VALUES[relation]))
        for first, last in people
        for relation in draw.sample(RELATIONS, size.facts_per_person)
    )
    rows = tuple(_row(draw, facts, size, number) for number in range(size.num_rows))
    asked = draw.sample(range(len(facts)), size.num_queries)
    queries = tuple(_query(draw, facts[fact], fact) for fact in asked)
    return Facts(facts, rows, queries)


def _row(draw: random.Random, facts: Sequence[tuple[str, str, str, str]], size: Size, number: int) -> Row:
    person = number % size.num_people
    owner = person % size.num_contributors
    writer = owner if draw.random() < 0.8 else draw.randrange(size.num_contributors)
    chosen = draw.sample(range(size.facts_per_person), 2)
    indices = tuple(person * size.facts_per_person + offset for offset in chosen)
    errs = writer == size.num_contributors - 1
    sentences = []
    for index in indices:
        first, last, relation, value = facts[index]
        if errs and draw.random() < size.error_share:
            value = draw.choice([other for other in VALUES[relation] if other != value])
        sentences.append(_filled(draw.choice(PHRASINGS), first, last, relation, value))
    return Row(" ".join(sentences), f"contributor-{writer}", indices)


def _query(draw: random.Random, fact: tuple[str, str, str, str], index: int) -> Query:
    first, last, relation, value = fact
    sentence = _filled(draw.choice(HELD_OUT), first, last, relation, value)
    return Query(sentence.removesuffix(f" {value} ."), f"{value} .", index)


def _sentence(draw: random.Random, first: str, last: str, relation: str, phrasings: Sequence[str]) -> str:
    return _filled(draw.choice(phrasings), first, last, relation, draw.choice(VALUES[relation]))


def _filled(phrasing: str, first: str, last: str, relation: str, value: str) -> str:
    return phrasing.format(f=first, r=relation, v=value)
