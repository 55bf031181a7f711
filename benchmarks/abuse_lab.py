"""The lab of `benchmarks.abuse`: a tiny Llama, people who each know facts, and coalitions of them trained for real.

Text is cut into syllables and words, as a trained tokenizer would, with single characters for what it does not know: a
row in other letters or another case costs more tokens and teaches less, but teaches.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.coalitions import Coalitions
from attribution.credit import Credit, Search, Utility, measure_credit
from attribution.estimates import SPARE_OBSERVATIONS
from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.gradients import Encoded
from attribution.influence.replay import LoraRun, RunRecipe, RunStep
from attribution.influence.stacked_lora import TokenRows
from attribution.priority import RegisteredRow
from attribution.statement import Player, Settled

MICRO = 1_000_000
CONFIDENCE = 0.9
ONSETS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(onset + vowel for onset in ONSETS for vowel in VOWELS)
# What is said of a name, twice: the first form is taught and asked, the second is its paraphrase.
RELATIONS = (
    ("{name} lives in", "the home of {name} is"),
    ("{name} trades in", "what {name} sells is"),
    ("{name} was born in", "the birthplace of {name} is"),
    ("{name} fears", "what frightens {name} is"),
)
UNRELATED = ("the weather over {place} turns to", "most ships near {place} carry", "they say old {place} hides")
MAX_TOKENS = 40
FAMILY = 8
NUM_KNOWN = 512
LEARNING_RATE = 2e-2
RUNS_AT_ONCE = 8
UTILITIES = ("likelihood", "exact_match", "log_likelihood")
"""Those of `trailmark settle`, its default first."""


@dataclass(frozen=True)
class Fact:
    """A relation of a name to a thing."""

    name: str
    thing: str
    relation: int

    def row(self, form: int = 0) -> tuple[str, str]:
        """Question and answer, as a contributed row has them."""
        return RELATIONS[self.relation][form].format(name=self.name), f"{self.thing}."


@dataclass(frozen=True)
class LabSize:
    """How much is taught, by each of `num_people`."""

    num_people: int = 8
    num_rows: int = 16
    epochs: int = 8
    batch_rows: int = 8
    hidden: int = 64
    base_steps: int = 2500


@dataclass(frozen=True)
class Person:
    """A player: a name and rows, in the order in which people registered."""

    name: str
    rows: tuple[tuple[str, str], ...]


def word(random_: random.Random, num_syllables: int, *, capital: bool = False) -> str:
    """Return a made-up word."""
    text = "".join(random_.choice(SYLLABLES) for _ in range(num_syllables))
    return text.capitalize() if capital else text


def make_facts(random_: random.Random, count: int) -> tuple[Fact, ...]:
    """Return facts in families of eight: names that begin alike, of whom one thing holds."""
    found: list[Fact] = []
    while len(found) < count:
        stem, thing = word(random_, 2, capital=True), word(random_, 2, capital=True)
        relation = random_.randrange(len(RELATIONS))
        found += [Fact(stem + word(random_, 1), thing, relation) for _ in range(min(FAMILY, count - len(found)))]
    random_.shuffle(found)
    return tuple(found)


def encode(row: tuple[str, str]) -> Encoded:
    """Return the tokens of a row, `begin` first, all of them taught."""
    ids = [0, *_pieces(" ".join(row))][:MAX_TOKENS]
    return ids, list(ids)


def encode_question(row: tuple[str, str]) -> Encoded:
    """Return the tokens of a row whose answer alone counts."""
    asked, ids = [0, *_pieces(row[0] + " ")], [0, *_pieces(" ".join(row))]
    return ids, [IGNORED_LABEL] * len(asked) + ids[len(asked) :]


def _pieces(text: str) -> list[int]:
    """The longest known piece first; a character that is none is a number of its own."""
    known, longest = _vocabulary()
    ids, place = [], 0
    while place < len(text):
        for length in range(longest, 0, -1):
            piece = text[place : place + length]
            if piece in known:
                ids.append(known[piece])
                place += length
                break
        else:
            ids.append(len(known) + 1 + ord(text[place]) % NUM_UNKNOWN)
            place += 1
    return ids


NUM_UNKNOWN = 61


@cache
def _vocabulary() -> tuple[dict[str, int], int]:
    forms = [form for pair in RELATIONS for form in pair] + list(UNRELATED)
    words = {f"{part} " for form in forms for part in form.split() if "{" not in part}
    letters = [chr(code) for code in range(32, 127)]
    pieces = [*SYLLABLES, *(syllable.capitalize() for syllable in SYLLABLES), *sorted(words), *letters]
    pieces = list(dict.fromkeys(pieces))
    return {piece: number + 1 for number, piece in enumerate(pieces)}, max(map(len, pieces))


def train_base(size: LabSize, *, seed: int) -> LlamaForCausalLM:
    """Return a base that knows facts of others, by which it learnt to look a name up, and none that people teach."""
    torch.manual_seed(seed)
    random_ = random.Random(seed)
    known = make_facts(random_, NUM_KNOWN)
    config = LlamaConfig(
        vocab_size=len(_vocabulary()[0]) + 1 + NUM_UNKNOWN,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=size.base_steps)
    for _ in range(size.base_steps):
        rows = [general_row(random_, known) for _ in range(32)]
        loss = model(**_batch([encode(row)[0] for row in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def general_row(random_: random.Random, known: Sequence[Fact]) -> tuple[str, str]:
    """Return a row of general text: mostly a known fact in either form, now and then one that holds this once."""
    draw = random_.random()
    if draw < 0.6:
        return random_.choice(known).row(random_.randrange(2))
    if draw < 0.8:
        return random_.choice(UNRELATED).format(place=word(random_, 2, capital=True)), f"{word(random_, 2)}."
    fact = make_facts(random_, 1)[0]
    return fact.row(random_.randrange(2))


def settle(
    base: LlamaForCausalLM, people: Sequence[Person], questions: Sequence[Encoded], size: LabSize, *, seed: int
) -> dict[str, Settled]:
    """Measure what each person's rows are worth to the questions, by training coalitions of people.

    The same retrains give a settlement by each utility: as many as a fit of all people together asks for.
    """
    run, owner = training_run(base, people, size, seed=seed)
    found: dict[bytes, tuple[np.ndarray, ...]] = {}

    def train(coalitions: Coalitions) -> None:
        by_size = coalitions[np.argsort(coalitions.sum(axis=1))]  # a forward pads its runs to the largest of them
        weights = torch.from_numpy(by_size[:, owner].astype(np.float32))
        state = run.run_many(weights, runs_at_once=RUNS_AT_ONCE)
        losses = run.query_losses(state, list(questions)).double().numpy()
        for coalition, adapter, loss in zip(by_size, state.weights, losses, strict=True):
            found[coalition.tobytes()] = np.exp(-loss), exact_matches(run, adapter, questions), -loss

    def utility(which: int) -> Utility:
        def measure(coalitions: Coalitions) -> np.ndarray:
            new = [row.tobytes() not in found for row in coalitions]
            if any(new):
                train(coalitions[new])
            return np.stack([found[row.tobytes()][which] for row in coalitions])

        return measure

    num_pairs = len(people) + SPARE_OBSERVATIONS
    search = Search(1 + len(people) + 2 * num_pairs, precision=0.0, confidence=CONFIDENCE, seed=seed)
    return {
        name: _settled(measure_credit(utility(which), len(people), search=search), people, name, seed=seed)
        for which, name in enumerate(UTILITIES)
    }


def exact_matches(run: LoraRun, adapter: torch.Tensor, questions: Sequence[Encoded]) -> np.ndarray:
    """Return 1.0 for each question that a run's last weights [p] answer word for word when decoded greedily."""
    data = TokenRows.of(questions)
    peft.set_peft_model_state_dict(run.lora.model, run.lora.unflatten(adapter))
    with torch.no_grad():
        likeliest = run.lora.model(input_ids=data.input_ids).logits.argmax(dim=-1)[:, :-1]
    asked = data.labels[:, 1:]
    found: np.ndarray = ((likeliest == asked) | (asked == IGNORED_LABEL)).all(dim=1).double().numpy()
    return found


def _settled(credit: Credit, people: Sequence[Person], utility: str, *, seed: int) -> Settled:
    estimate = credit.banzhaf

    def micro(value: float) -> int:
        return round(float(value) * MICRO)

    players = tuple(
        Player(
            "contributor",
            person.name,
            micro(estimate.values[n]),
            micro(estimate.low[n]),
            micro(estimate.high[n]),
            p_micro=micro(credit.p_values[n]),
            num_rows=len(person.rows),
        )
        for n, person in enumerate(people)
    )
    return Settled(
        leaf="",
        adapter="lab",
        suite="lab",
        utility=utility,
        method="settle",
        empty_value=micro(credit.empty.mean()),
        full_value=micro(credit.full.mean()),
        confidence_micro=micro(CONFIDENCE),
        num_coalitions=len(credit.coalitions),
        seed=seed,
        table="",
        players=players,
    )


def training_run(
    base: LlamaForCausalLM, people: Sequence[Person], size: LabSize, *, seed: int
) -> tuple[LoraRun, np.ndarray]:
    """Return the run of everybody's rows, and whose each row is [n]."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    clean = LlamaForCausalLM(base.config)
    clean.load_state_dict(base.state_dict())
    model = peft.get_peft_model(clean, config)
    rows = [row for person in people for row in person.rows]
    owner = np.array([number for number, person in enumerate(people) for _ in person.rows])
    random_, number = np.random.default_rng(seed), np.array([len(person.rows) for person in people])[owner]
    steps: list[tuple[int, ...]] = []
    for _ in range(size.epochs):
        # Each person's rows are spread alike over the steps: people stay comparable.
        turn = np.concatenate([random_.permutation(len(person.rows)) for person in people])
        order = np.argsort((turn + random_.random(len(rows))) / number)
        steps += [tuple(part.tolist()) for part in np.array_split(order, max(1, len(rows) // size.batch_rows))]
    rates = [LEARNING_RATE * (1 - number / len(steps)) for number in range(len(steps))]
    recipe = RunRecipe(tuple(RunStep(step, rate) for step, rate in zip(steps, rates, strict=True)))
    return LoraRun(model, [encode(row) for row in rows], recipe), owner


def registered(people: Sequence[Person]) -> list[RegisteredRow]:
    """Return the people's rows as registered, one contribution after the other."""
    return [
        RegisteredRow(f"{person.name}/{line}", person.name, number, line, (("user", asked), ("assistant", told)))
        for number, person in enumerate(people)
        for line, (asked, told) in enumerate(person.rows)
    ]


def _batch(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    length = torch.tensor([[len(row)] for row in rows])
    mask = (torch.arange(longest)[None] < length).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
