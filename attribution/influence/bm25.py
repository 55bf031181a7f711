"""Baselines that every influence answer is shown beside: word overlap (BM25) and chance."""

import logging
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from attribution.influence.store import TraceExample, contributors_of

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Ranked:
    """A contributor's place in a baseline; contributors are listed best first."""

    key_id: str
    score: float


@dataclass(frozen=True)
class WordMatches:
    """BM25 of every row for one query, over lower-cased words. `order`: rows, best first, equal ones as they stand."""

    examples: Sequence[TraceExample]
    scores: Sequence[float]
    order: Sequence[int]

    @classmethod
    def of(cls, examples: Sequence[TraceExample], query: str) -> "WordMatches":
        """Score rows for a query."""
        scores = bm25_scores([_words(example.text) for example in examples], _words(query))
        return cls(examples, scores, sorted(range(len(examples)), key=lambda row: (-scores[row], row)))

    def best(self, num_hits: int) -> list[int]:
        """Return the best rows that share a word with the query."""
        return [row for row in self.order[:num_hits] if self.scores[row] > 0]

    def places(self, example_ids: Collection[str]) -> dict[str, tuple[float, int]]:
        """Return (score, place among all rows from 1) of some examples."""
        return {
            self.examples[row].example_id: (float(self.scores[row]), place)
            for place, row in enumerate(self.order, start=1)
            if self.examples[row].example_id in example_ids
        }

    def contributors(self, num_hits: int) -> tuple[Ranked, ...]:
        """Rank contributors by the summed score of their rows among the `num_hits` best.

        Only the best hits count, as a search engine would credit them: summing over all rows would rank contributors
        by how much they wrote.
        """
        totals = dict.fromkeys(contributors_of(self.examples), 0.0)
        for row in self.best(num_hits):
            totals[self.examples[row].contributor] += float(self.scores[row])
        return tuple(Ranked(key, totals[key]) for key in sorted(totals, key=lambda key: (-totals[key], key)))


def bm25_scores(rows: Sequence[list[str]], query: list[str]) -> Sequence[float]:
    """Return each row's score; a word that stands twice in the query counts twice.

    Semantics: sum over words of idf * tf / (tf + 1.5 (0.25 + 0.75 length / mean length)), with Lucene's
    idf = log(1 + (N - df + 0.5) / (df + 0.5)), which stays above 0 for words that stand in most rows.
    """
    from bm25s import BM25

    # The library sets its logger to DEBUG when it is imported and reports each index there.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    known = {word for row in rows for word in row}
    asked = [word for word in query if word in known]
    if not asked:
        return [0.0] * len(rows)
    index = BM25(k1=1.5, b=0.75, method="lucene", dtype="float64", backend="numpy")
    index.index([row or [""] for row in rows], create_empty_token=False, show_progress=False)
    scores: Sequence[float] = index.get_scores(asked).tolist()
    return scores


def random_ranking(examples: Sequence[TraceExample], *, seed: str) -> tuple[Ranked, ...]:
    """Rank contributors by chance, the same way for the same seed."""
    key_ids = list(contributors_of(examples))
    random.Random(seed).shuffle(key_ids)
    return tuple(Ranked(key, 0.0) for key in key_ids)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
