"""The rules of refinement: each looks at one row and says keep, or drop and why.

A rule is a pure function of the row's messages and its own parameters, so that its decision can be made again by anyone
who holds the row. Its digest names rule, version and parameters. The rule on duplicates needs all rows: see dedup.py.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import rfc8785

from configs.schema import RefineSettings
from pipelines.refine.canonical import Messages, canonical_text
from pipelines.refine.letters import letter_bits

MIN_LETTER_PAIRS = 20
"""Pairs below which letters say too little: 5 % of random strings of 20 to 29 pairs pass -1 bit, 0.4 % of 50."""

MIN_SYMBOL_CHARS = 20
"""A short answer such as `3.14` or `:-)` is not noise."""

REPEATED_WORDS = 5
"""Length of the word run that counts as repeated; shorter ones recur in honest prose ("the capital of")."""

# Chinese and Japanese characters stand alone, since no spaces part their words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
CHARACTER_RUN = re.compile(r"([^\W_])\1{4,}")

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Verdict:
    """What one rule says about one row; `score` is the figure it decided by, `reason` why it dropped or what it did."""

    keep: bool
    reason: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Rule:
    """One rule. `sees`: which form of the row `judge` is given. `source`: where the rule comes from.

    `is_gate`: no other rule can judge a row that this one drops.
    """

    name: str
    version: int
    params: tuple[tuple[str, int], ...]
    judge: Callable[[Messages], Verdict]
    sees: Literal["contributed", "canonical"] = "canonical"
    source: str = ""
    is_gate: bool = False

    @cached_property
    def digest(self) -> str:
        """Return the digest of name, version and parameters; shares and bits stand in it as micro-units."""
        return rule_digest(self.name, version=self.version, params=dict(self.params))


def rule_digest(name: str, *, version: int, params: dict[str, int]) -> str:
    """Return `sha256:<hex>` of the canonical JSON of what identifies a rule."""
    identity: dict[str, Any] = {"name": name, "version": version, "params": params}
    return f"sha256:{hashlib.sha256(rfc8785.dumps(identity)).hexdigest()}"


def row_rules(settings: RefineSettings) -> tuple[Rule, ...]:
    """Return the rules that look at one row, in the order in which they are asked."""
    repetition, alphanumeric, bits = (
        micro(value) for value in (settings.max_repetition, settings.min_alphanumeric, settings.min_letter_bits)
    )
    return (
        Rule("schema", 1, (), judge_schema, sees="contributed", is_gate=True),
        Rule(
            "canonical_form",
            1,
            (),
            judge_canonical_form,
            sees="contributed",
            source="https://www.unicode.org/reports/tr15/",
        ),
        _length_rule(settings.min_chars, settings.max_chars),
        Rule(
            "repetition",
            1,
            (("max_micro", repetition), ("num_words", REPEATED_WORDS)),
            lambda messages: judge_repetition(messages, maximum=repetition / 1e6),
            source="Gopher, table A1: https://arxiv.org/abs/2112.11446",
        ),
        Rule(
            "symbols",
            1,
            (("min_micro", alphanumeric), ("min_chars", MIN_SYMBOL_CHARS)),
            lambda messages: judge_symbols(messages, minimum=alphanumeric / 1e6),
            source="Gopher, table A1: https://arxiv.org/abs/2112.11446",
        ),
        Rule(
            "letters",
            1,
            (("min_bits_micro", bits), ("min_pairs", MIN_LETTER_PAIRS)),
            lambda messages: judge_letters(messages, minimum=bits / 1e6),
            source="letter pairs of the Unicode CLDR: https://cldr.unicode.org",
        ),
    )


def micro(value: float) -> int:
    """Return `value` in millionths, the form in which records and rule digests hold fractions."""
    return round(value * 1_000_000)


def judge_schema(messages: Messages) -> Verdict:
    """Drop a row that is no conversation: [system], then user and assistant in turn, the assistant last, none empty."""
    problem = conversation_problem(messages)
    return Verdict(not problem, problem)


def conversation_problem(messages: Messages) -> str:
    """Return what is wrong with the turns, or an empty string. Expects string roles and contents."""
    if not messages:
        return "no messages"
    unknown = next((message["role"] for message in messages if message["role"] not in ROLES), None)
    if unknown is not None:
        return f"unknown role {unknown[:40]!r}; roles are system, user, assistant"
    if any(not message["content"].strip() for message in messages):
        return "empty content"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        return "no assistant turn"
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        return "wrong order of roles; after an optional system message user and assistant take turns, the user first"
    if turns[-1] != "assistant":
        return "ends without the assistant's answer"
    return ""


def judge_canonical_form(messages: Messages) -> Verdict:
    """Keep, noting whether the text was rewritten; drop a row of which the canonical form leaves a message empty."""
    changed = False
    for message in messages:
        canonical = canonical_text(message["content"])
        if not canonical:
            return Verdict(False, "nothing visible in a message", 1.0)
        changed = changed or canonical != message["content"]
    return Verdict(True, "rewritten" if changed else "", float(changed))


def _length_rule(minimum: int, maximum: int) -> Rule:
    return Rule(
        "length",
        1,
        (("max_chars", maximum), ("min_chars", minimum)),
        lambda messages: judge_length(messages, minimum=minimum, maximum=maximum),
        source="C4 and Gopher drop by length: https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2112.11446",
    )


def judge_length(messages: Messages, *, minimum: int, maximum: int) -> Verdict:
    """Drop under `minimum` characters from the assistant or over `maximum` in all; score: characters in all."""
    total = sum(len(message["content"]) for message in messages)
    answered = sum(len(message["content"]) for message in messages if message["role"] == "assistant")
    if answered < minimum:
        return Verdict(False, "answer too short", float(total))
    return Verdict(total <= maximum, "" if total <= maximum else "too long", float(total))


def judge_repetition(messages: Messages, *, maximum: float) -> Verdict:
    """Drop a message that repeats itself: the share of its characters in repeated lines, word runs or letters.

    Semantics: score = max over messages and the three measures; the first occurrence is not counted as repeated.
    """
    measures = {
        "repeated lines": repeated_lines,
        f"repeated runs of {REPEATED_WORDS} words": repeated_words,
        "one character over and over": repeated_characters,
    }
    shares = {reason: max(measure(m["content"]) for m in messages) for reason, measure in measures.items()}
    reason = max(shares, key=lambda name: shares[name])
    score = shares[reason]
    return Verdict(score <= maximum, "" if score <= maximum else reason, score)


def repeated_lines(text: str) -> float:
    """Return the share of characters in lines that stood before."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(1, sum(map(len, lines)))


def repeated_words(text: str) -> float:
    """Return the share of word characters in runs of REPEATED_WORDS words that stood before (case ignored)."""
    words = WORD.findall(text.casefold())
    seen: set[tuple[str, ...]] = set()
    repeated = start = 0
    while start + REPEATED_WORDS <= len(words):
        run = tuple(words[start : start + REPEATED_WORDS])
        if run in seen:
            repeated += sum(map(len, run))
            start += REPEATED_WORDS
        else:
            seen.add(run)
            start += 1
    return repeated / max(1, sum(map(len, words)))


def repeated_characters(text: str) -> float:
    """Return the share of visible characters in runs of five or more of the same letter or digit."""
    visible = "".join(text.split())
    return sum(len(match.group()) for match in CHARACTER_RUN.finditer(visible)) / max(1, len(visible))


def judge_symbols(messages: Messages, *, minimum: float) -> Verdict:
    """Drop a row mostly of symbols; score: share of letters, marks and digits among its visible characters."""
    visible = "".join("".join(message["content"].split()) for message in messages)
    # isalnum is false for combining marks, without which Hindi would look like symbols; isidentifier knows them.
    share = sum(c.isalnum() or f"a{c}".isidentifier() for c in visible) / max(1, len(visible))
    keep = share >= minimum or len(visible) < MIN_SYMBOL_CHARS
    return Verdict(keep, "" if keep else "mostly symbols", share)


def judge_letters(messages: Messages, *, minimum: float) -> Verdict:
    """Drop a row whose Latin letters follow each other as random ones do; score: mean bits per pair (letters.py)."""
    bits, num_pairs = letter_bits("\n".join(message["content"] for message in messages))
    keep = bits >= minimum or num_pairs < MIN_LETTER_PAIRS
    return Verdict(keep, "" if keep else "random letters", bits)
