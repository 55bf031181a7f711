"""Baselines that every influence answer is shown beside: word overlap (BM25) and chance."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from attribution.influence.store import TraceExample, contributors_of

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Ranked:
    """A contributor's place in a baseline; contributors are listed best first."""

    key_id: str
    score: float


def bm25_ranking(examples: Sequence[TraceExample], query: str, *, num_hits: int) -> tuple[Ranked, ...]:
    """Rank contributors by the summed BM25 score of their rows among the `num_hits` best hits for `query`.

    Okapi BM25 (k1 1.5, b 0.75) over lower-cased words. Only the best hits count, as a search engine would credit them:
    summing over all rows would rank contributors by how much they wrote.
    """
    from rank_bm25 import BM25Okapi

    scores = BM25Okapi([_words(example.text) or [""] for example in examples]).get_scores(_words(query))
    totals = dict.fromkeys(contributors_of(examples), 0.0)
    for row in sorted(range(len(examples)), key=lambda row: (-scores[row], row))[:num_hits]:
        totals[examples[row].contributor] += max(0.0, float(scores[row]))
    return tuple(Ranked(key, totals[key]) for key in sorted(totals, key=lambda key: (-totals[key], key)))


def random_ranking(examples: Sequence[TraceExample], *, seed: str) -> tuple[Ranked, ...]:
    """Rank contributors by chance, the same way for the same seed."""
    key_ids = list(contributors_of(examples))
    random.Random(seed).shuffle(key_ids)
    return tuple(Ranked(key, 0.0) for key in key_ids)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
