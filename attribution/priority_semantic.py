"""Rows that say the same in other words, as far as their rare words tell: cosine of TF-IDF vectors of letter runs.

No model: the result depends on the rows alone and can be recomputed by anybody. A paraphrase keeps names and terms,
which are rare and weigh most; a translation keeps little else, and is not found.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import log

import numpy as np
from scipy import sparse

from attribution.lookalikes import skeleton

RUNS = (3, 4, 5)
BLOCK_ROWS = 1024


def semantic_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield (later, earlier) for texts with a cosine of at least `threshold`, in the order of the texts."""
    if len(texts) < 2:
        return
    vectors = tfidf(texts)
    for start in range(0, len(texts), BLOCK_ROWS):
        cosines = (vectors[start : start + BLOCK_ROWS] @ vectors.T).tocoo()
        # 1e-9: sums in another order must not move a pair over the border.
        close = (cosines.data >= threshold - 1e-9) & (cosines.col < cosines.row + start)
        yield from sorted(zip((cosines.row[close] + start).tolist(), cosines.col[close].tolist(), strict=True))


def tfidf(texts: Sequence[str]) -> sparse.csr_matrix:
    """Return unit vectors [texts, terms]: (1 + log count) * log((1 + n) / (1 + texts with it)), terms in sorted order.

    A term is a run of 3 to 5 letters inside a word, its ends marked, in the spelling of `skeleton`.
    """
    counts = [Counter(_terms(text)) for text in texts]
    spread = Counter(term for found in counts for term in found)
    column = {term: place for place, term in enumerate(sorted(spread))}
    data, columns, starts = [], [], [0]
    for found in counts:
        weights = {
            column[term]: (1 + log(count)) * log((1 + len(texts)) / (1 + spread[term])) for term, count in found.items()
        }
        length = sum(weight * weight for _, weight in sorted(weights.items())) ** 0.5
        columns += sorted(weights)
        data += [weights[place] / length if length else 0.0 for place in sorted(weights)]
        starts.append(len(columns))
    return sparse.csr_matrix((np.array(data), np.array(columns, dtype=np.int64), starts), (len(texts), len(column)))


def _terms(text: str) -> Iterator[str]:
    for word in re.split(r"\s+", text):
        if spelled := skeleton(word):
            marked = f" {spelled} "
            for length in RUNS:
                yield from (marked[start : start + length] for start in range(len(marked) - length + 1))
