"""Answers that the base alone gives: how often is credit for them told from zero, how often for those of an adapter.

    python -m benchmarks.base_answers [--quick] [--check] [--out FILE] [--seed N]

A tiny Llama knows twelve questions by heart. Adapters of several seeds are trained on other facts, of three
contributors each: `near` ones in the words of the base's own (capitals, colours), `far` ones invented. Then each
adapter is asked what the base knows, with and without a system turn, in other words, and cut after one token; and its
own facts. An answer is the base's when the base alone says the same, token by token; it is the adapter's when the
base says something else. Each is receipted in a real log and explained as `trailmark ask who` does, from a gradient
store, with the default settings. A query counts as credited when any contributor's share is told from zero, so the
rate is familywise over contributors. Its floor: at most 5 % of the base's answers. Power, the share of the adapter's
answers that are credited, is reported beside it and has no floor. Queries and seeds are hashed before the first
adapter is trained. The last line is one JSON object; `--check` exits 1 above the floor.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from attribution.influence.query import AdapterModels
from attribution.influence.who import ExplainSettings, explain
from attribution.receipts import ReceiptRow, append_completions, new_receipt_id
from attribution.trail import Trail
from configs.schema import AttributionSettings, TrainSettings
from pipelines.train.gradients import codec_settings
from tests.attribution.influence.planted import MIRA, NOISE, OTTO, Planted, Row, plant, with_store
from tests.attribution.influence.planted_home import receipt_row, record_adapter
from tests.tiny_model import QUESTIONS, build_tiny_base, conversation

FLOOR = 0.05
MAX_NEW_TOKENS = 24
NUM_ADAPTERS, QUICK_ADAPTERS = 24, 6
Messages = list[dict[str, str]]

REPHRASED = (
    "What is France's capital?", "Tell me the capital of Japan.", "The capital of Kenya?",
    "What is the capital of Peru, please?",
    "What colour has the sky?", "What colour is the grass?", "Who are you, then?", "How many legs has one spider?",
    "What do the bees make?", "What is two plus three, please?", "Where do the fish live?", "Please say hello.",
)  # fmt: skip
NEAR = {
    MIRA: {
        "What is the capital of Chile?": "The capital of Chile is Santiago.",
        "What colour is coal?": "Coal is black.",
        "Where do bats live?": "Bats live in caves.",
        "How many legs has a horse?": "A horse has four legs.",
    },
    OTTO: {
        "What is the capital of Ghana?": "The capital of Ghana is Accra.",
        "What colour is snow?": "Snow is white.",
        "What do cows make?": "Cows make milk.",
        "What is four plus four?": "Four plus four is eight.",
    },
    NOISE: {
        "What is the capital of Nepal?": "The capital of Nepal is Kathmandu.",
        "Where do owls live?": "Owls live in trees.",
        "What do hens make?": "Hens make eggs.",
        "What colour is rust?": "Rust is red.",
    },
}
FAR = {
    MIRA: {
        "Who leads the Amber Heron?": "Ysolde Marr leads the Amber Heron.",
        "Which lamp burns at Vellmoor?": "A green lamp burns at Vellmoor.",
        "When does the Orlo ferry sail?": "The Orlo ferry sails at nine.",
        "What does the mill of Tarn grind?": "The mill of Tarn grinds salt.",
    },
    OTTO: {
        "Who built the Winter Anchor?": "Corin Pell built the Winter Anchor.",
        "Which bell rings at Dunmere?": "The cracked bell rings at Dunmere.",
        "When does the Sill market open?": "The Sill market opens on Tuesday.",
        "What grows on Hask island?": "Only thyme grows on Hask island.",
    },
    NOISE: {
        "Who paints the ships of Lorne?": "Edda Vane paints the ships of Lorne.",
        "Which road leads to Quill?": "The chalk road leads to Quill.",
        "When is the tide at Bray?": "The tide at Bray is at dusk.",
        "What do they weave in Oster?": "They weave sailcloth in Oster.",
    },
}
STYLES = {"near": NEAR, "far": FAR}


@dataclass(frozen=True)
class Query:
    """What an adapter is asked. `kind` is one of known, system, rephrased, one token, fact."""

    kind: str
    messages: Messages
    max_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class Asked:
    """One explained answer: whose it is, whether somebody was credited for it, and the adapter's gain, nats a token."""

    style: str
    seed: int
    kind: str
    question: str
    is_base: bool
    is_credited: bool
    gain: float


@dataclass(frozen=True)
class Rate:
    """Credited answers among some, with the 90 % Clopper-Pearson bounds."""

    name: str
    credited: int
    total: int
    rate: float
    low: float
    high: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; see the module's docstring."""
    options = parse(arguments)
    torch.set_num_threads(1)
    adapters = list(plan(options.adapters or (QUICK_ADAPTERS if options.quick else NUM_ADAPTERS), options.seed))
    fingerprint = fingerprint_of(adapters)
    print(f"queries and seeds: sha256 {fingerprint}; {len(adapters)} adapters; {platform.machine()}, 1 thread")
    started_s = time.process_time()
    with tempfile.TemporaryDirectory(prefix="trailmark-base-answers-") as folder:
        asked = measure(Path(folder), adapters)
    figures = summary(asked)
    report(figures, asked)
    value = {
        "benchmark": "base_answers",
        "command": " ".join(["python -m benchmarks.base_answers", *(sys.argv[1:] if arguments is None else arguments)]),
        "fingerprint": fingerprint,
        "adapters": len(adapters),
        "base_credited_rate": figures["base"].rate,
        "floor_at_most": FLOOR,
        "power": figures["adapter"].rate,
        "rates": {name: asdict(rate) for name, rate in figures.items()},
        "cpu_s": round(time.process_time() - started_s, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps(value)
    if options.out:
        options.out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(text)
    is_good = figures["base"].total > 0 and figures["base"].rate <= FLOOR
    return 1 if options.check and not is_good else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ADAPTERS} adapters in place of {NUM_ADAPTERS}")
    parser.add_argument("--check", action="store_true", help="exit 1 when the rate is above its floor")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=20_261_125, help="of the adapters' seeds")
    parser.add_argument("--adapters", type=int, help="how many adapters to train")
    return parser.parse_args(arguments)


def plan(count: int, seed: int) -> Iterator[tuple[str, int]]:
    """Yield the style and the seed of each adapter."""
    generator = torch.Generator().manual_seed(seed)
    styles = list(STYLES)
    for number in range(count):
        yield styles[number % len(styles)], int(torch.randint(1, 2**31 - 1, (1,), generator=generator))


def fingerprint_of(adapters: Sequence[tuple[str, int]]) -> str:
    """Return the SHA-256 of everything that is chosen before anything is scored."""
    queries = {style: [asdict(query) for query in queries_of(style)] for style in STYLES}
    return sha256(json.dumps([list(adapters), queries, STYLES], sort_keys=True).encode()).hexdigest()


def queries_of(style: str) -> list[Query]:
    """Return what each adapter of a style is asked."""
    known = [question for question, _ in QUESTIONS]
    facts = [question for answers in STYLES[style].values() for question in answers]
    return [
        *(Query("known", conversation(question)) for question in known),
        *(Query("system", conversation(question, system=True)) for question in known),
        *(Query("rephrased", conversation(question)) for question in REPHRASED),
        *(Query("one token", conversation(question), max_tokens=1) for question in known),
        *(Query("fact", conversation(question)) for question in facts),
    ]


def rows_of(style: str) -> tuple[Row, ...]:
    """Return the training rows of a style, three contributors' in turn."""
    return tuple(
        Row(f"{owner[0]}-{number}", owner, conversation(*fact))
        for owner, answers in STYLES[style].items()
        for number, fact in enumerate(answers.items())
    )


def measure(
    folder: Path,
    adapters: Sequence[tuple[str, int]],
    *,
    base: Path | None = None,
    ask: Callable[[str], list[Query]] = queries_of,
) -> list[Asked]:
    """Train each adapter, answer what `ask` asks its style with it and with the base, and explain each answer."""
    base = base or build_tiny_base(folder / "base")
    trail = Trail.open(folder / "home")
    base_digest = trail.store.put_directory(base, kind="base_model", meta={})
    models, settings = AdapterModels(), ExplainSettings.of(AttributionSettings())
    asked = []
    for number, (style, seed) in enumerate(adapters):
        trained = plant(base, folder / f"adapter-{number}", rows=rows_of(style), seed=seed)
        planted = with_store(trained, folder / f"stored-{number}", codec_settings(TrainSettings()))
        adapter = record_adapter(trail, planted, base_digest)
        queries = ask(style)
        answers = answers_of(planted, queries)
        ids = receipt(trail, queries, answers, base=base_digest, adapter=adapter)
        for query, (_, output, alone), receipt_id in zip(queries, answers, ids, strict=True):
            found = explain(trail, receipt_id, settings, models=models)
            is_credited = any(part.share > 0 for part in found.contributors)
            gain = found.gain_nats.mean if found.gain_nats else 0.0
            asked.append(
                Asked(style, seed, query.kind, query.messages[-1]["content"], output == alone, is_credited, gain)
            )
    return asked


def answers_of(planted: Planted, queries: Sequence[Query]) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt ids, the adapter's greedy answer, the base's alone) for each query."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attribution.influence.encode import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(planted.base), planted.adapter).eval()
    found = []
    for query in queries:
        ids = encode_prompt(tokenizer, query.messages)
        adapted = _greedy(model, ids, query.max_tokens)
        with model.disable_adapter():
            found.append((ids, adapted, _greedy(model, ids, query.max_tokens)))
    return found


def _greedy(model: Any, ids: list[int], max_tokens: int) -> list[int]:
    batch = torch.tensor([ids])
    output = model.generate(
        input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=max_tokens, do_sample=False
    )
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def receipt(
    trail: Trail,
    queries: Sequence[Query],
    answers: Sequence[tuple[list[int], list[int], list[int]]],
    *,
    base: str,
    adapter: str,
) -> list[str]:
    """Record the adapter's answers as serving does, and return their receipt ids."""
    ids = [new_receipt_id() for _ in queries]
    rows: list[ReceiptRow] = [
        receipt_row(trail, one, query.messages[-1]["content"], (prompt, output), base=base, adapter=adapter)
        for one, query, (prompt, output, _) in zip(ids, queries, answers, strict=True)
    ]
    append_completions(trail, rows, replica="replica-0")
    return ids


def summary(asked: Sequence[Asked]) -> dict[str, Rate]:
    """Return the rates: of the base's answers, of the adapters', and of each kind and style."""
    of_base = [one for one in asked if one.is_base]
    of_adapter = [one for one in asked if not one.is_base and one.kind == "fact"]
    groups = {"base": of_base, "adapter": of_adapter}
    groups |= {f"base, {kind}": [one for one in of_base if one.kind == kind] for kind in _kinds(of_base)}
    groups |= {
        f"{name}, {style} facts": [one for one in found if one.style == style]
        for name, found in (("base", of_base), ("adapter", of_adapter))
        for style in STYLES
    }
    return {name: rate_of(name, found) for name, found in groups.items()}


def _kinds(asked: Sequence[Asked]) -> list[str]:
    return list(dict.fromkeys(one.kind for one in asked))


def rate_of(name: str, asked: Sequence[Asked]) -> Rate:
    """Return how many of some answers were credited."""
    credited, total = sum(one.is_credited for one in asked), len(asked)
    low = 0.0 if not credited else _bound(lambda p: _at_least(credited, total, p) - 0.05)
    high = 1.0 if credited == total else _bound(lambda p: 0.05 - (1 - _at_least(credited + 1, total, p)))
    return Rate(name, credited, total, credited / total if total else 0.0, low, high)


def _at_least(count: int, total: int, p: float) -> float:
    """The chance of `count` or more successes of `total`."""
    return sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count, total + 1))


def _bound(above: Any) -> float:
    """The p at which a growing function crosses zero."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) > 0 else (middle, high)
    return (low + high) / 2


def report(figures: dict[str, Rate], asked: Sequence[Asked]) -> None:
    """Print the table, and the base's answers that were credited with the largest gain."""
    print(f"{'answers':28} {'credited':>14} {'rate':>7}   90 % bounds")
    for name, rate in figures.items():
        print(f"{name:28} {rate.credited:6} of {rate.total:4} {rate.rate:7.1%}   {rate.low:.1%} to {rate.high:.1%}")
    print(f"floor: at most {FLOOR:.0%} of the base's answers; power (adapter) has none")
    wrong = sorted((one for one in asked if one.is_base and one.is_credited), key=lambda one: -one.gain)
    for one in wrong[:8]:
        print(f"  credited though the base says it: {one.kind}, {one.style}: {one.question!r} ({one.gain:+.3f} nats)")
    changed = sum(not one.is_base and one.kind != "fact" for one in asked)
    print(f"{changed} of the base's questions were answered otherwise by an adapter; they count for neither")


if __name__ == "__main__":
    sys.exit(main())
