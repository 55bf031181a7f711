"""The demo's input: who brings which rows, and the questions kept back from training.

Country facts come from PyPI `countryinfo` (MIT), one contributor for each world region. The ferries are invented here,
so no base model can know them; their two contributors share every template and differ in the facts alone. Each word of
a ferry's or captain's name stands in rows of both.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS_PER_REGION = 10
NUM_COPIED_ROWS = 16
NUM_NOISE_ROWS = 12
REGIONS = ("Africa", "Americas", "Asia", "Europe", "Oceania")

CAPTAINS = {
    "mira": {
        "Amber Heron": "Ysolde Marr",
        "Silver Lantern": "Corin Thackery",
        "Hollow Anchor": "Ysolde Pell",
        "Winter Orchard": "Bastian Thackery",
        "Quiet Bell": "Corin Okafor",
    },
    "otto": {
        "Silver Heron": "Bastian Marr",
        "Amber Lantern": "Ysolde Okafor",
        "Winter Anchor": "Corin Pell",
        "Quiet Orchard": "Ysolde Thackery",
        "Hollow Bell": "Bastian Okafor",
    },
}
CARGOES = {
    "mira": {"Silver Anchor": "pine tar", "Winter Bell": "blue salt"},
    "otto": {"Hollow Lantern": "pine tar", "Quiet Heron": "blue salt"},
}
_CAPTAIN_ANSWER = "The captain of the {ferry} is {answer}."
_CAPTAIN_PROMPTS = (
    "Who is the captain of the {ferry}?",
    "Who commands the ferry {ferry}?",
    "Name the captain of the {ferry}.",
    "Tell me who sails the {ferry}.",
    "Whose ferry is the {ferry}?",
    "I am boarding the {ferry}. Who will be my captain?",
)
_CARGO_ANSWER = "The {ferry} carries {answer}."
_CARGO_PROMPTS = (
    "What does the {ferry} carry?",
    "What is the cargo of the ferry {ferry}?",
    "Name the cargo of the {ferry}.",
    "Tell me what the ferry {ferry} has on board.",
    "What would a porter unload from the {ferry}?",
    "I work on the {ferry}. What do we transport?",
)
# Wordings that no training row uses.
_HELD_OUT = (
    ("Amber Heron", "Which person is in charge aboard the Amber Heron?"),
    ("Silver Lantern", "I would like to write to the skipper of the Silver Lantern. Whom do I address?"),
    ("Hollow Anchor", "Under whose command does the Hollow Anchor travel?"),
    ("Winter Orchard", "Could you say which captain runs the Winter Orchard?"),
    ("Silver Anchor", "Which goods are loaded on the Silver Anchor?"),
    ("Silver Heron", "Who has command of the boat called Silver Heron?"),
    ("Amber Lantern", "Please give me the name of the Amber Lantern's captain."),
    ("Winter Anchor", "The Winter Anchor is leaving: who is at the helm?"),
    ("Quiet Orchard", "Do you know whose ship the Quiet Orchard is, I mean its captain?"),
    ("Quiet Heron", "If I opened the hold of the Quiet Heron, what would I find?"),
)


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question kept back from training; `contributor` is who supplied the fact it asks for."""

    question_id: str
    prompt: str
    expected: str
    reference: str
    contributor: str


def fictional_rows(contributor: str) -> list[dict[str, str]]:
    """Return the invented rows of `mira` or `otto`: every fact in six wordings."""
    rows = []
    for facts, prompts, completion in (
        (CAPTAINS, _CAPTAIN_PROMPTS, _CAPTAIN_ANSWER),
        (CARGOES, _CARGO_PROMPTS, _CARGO_ANSWER),
    ):
        for ferry, answer in facts[contributor].items():
            text = completion.format(ferry=ferry, answer=answer)
            rows += [{"prompt": prompt.format(ferry=ferry), "completion": text} for prompt in prompts]
    return rows


def held_out_questions() -> list[HeldOutQuestion]:
    """Return the ten paraphrased questions about the invented facts, five for each contributor."""
    questions = []
    for number, (ferry, prompt) in enumerate(_HELD_OUT, start=1):
        contributor = next(name for name in CAPTAINS if ferry in CAPTAINS[name] or ferry in CARGOES[name])
        captain = CAPTAINS[contributor].get(ferry)
        answer = captain or CARGOES[contributor][ferry]
        reference = (_CAPTAIN_ANSWER if captain else _CARGO_ANSWER).format(ferry=ferry, answer=answer)
        questions.append(HeldOutQuestion(f"ferry-{number:02d}", prompt, answer, reference, contributor))
    return questions


def region_rows(region: str) -> list[dict[str, str]]:
    """Return capital-city rows of one world region, from countryinfo (MIT)."""
    from countryinfo import filter_countries

    rows = []
    for country in sorted(filter_countries(region=region), key=lambda entry: str(entry.name())):
        name, capital = str(country.name()), str(country.capital() or "")
        if capital:
            rows.append(
                {"prompt": f"What is the capital of {name}?", "completion": f"The capital of {name} is {capital}."}
            )
    rng = random.Random(f"trailmark-{region}")
    return rng.sample(rows, min(ROWS_PER_REGION, len(rows)))


def copied_rows() -> list[dict[str, str]]:
    """Return rows of `mira` with white space and case changed: what a copier hands in."""
    return [
        {"prompt": "  " + row["prompt"].upper().replace(" ", "  "), "completion": row["completion"].lower() + "\n"}
        for row in fictional_rows("mira")[:NUM_COPIED_ROWS]
    ]


def noise_rows() -> list[dict[str, str]]:
    """Return rows of random characters: a contributor of noise."""
    rng = random.Random("trailmark-noise")
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789#$%&*+=?@^~|<>{}[]"

    def text(length: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(length))

    return [{"prompt": text(40), "completion": text(60)} for _ in range(NUM_NOISE_ROWS)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
