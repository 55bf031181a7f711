"""Scores of an answer, and the interval of a difference over paired items."""

import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.schema import BenchmarkSettings
from pipelines.benchmark.suites import Item

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return text without case, punctuation and surplus white space, in Unicode's compatibility form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION).split())


def is_exact(answer: str, item: Item) -> bool:
    """Whether the answer is one of the expected texts or the reference, normalised."""
    return normalised(answer) in {normalised(text) for text in (*item.expected, item.reference)}


def contains_expected(answer: str, item: Item) -> bool:
    """Whether any expected text stands in the answer, whatever the case."""
    return any(expected.casefold() in answer.casefold() for expected in item.expected)


@dataclass(frozen=True)
class Comparison:
    """Means of one metric over the same items, and the interval of mean(adapter) - mean(base)."""

    metric: str
    base: float
    adapter: float
    low: float
    high: float
    num_items: int

    @property
    def delta(self) -> float:
        return self.adapter - self.base

    @property
    def is_distinct(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(metric: str, base: Sequence[float], adapter: Sequence[float], *, settings: BenchmarkSettings) -> Comparison:
    """Paired percentile bootstrap: items are drawn with replacement, base and adapter of an item together.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    assert len(base) == len(adapter) > 0, "a comparison needs paired items"
    deltas = np.asarray(adapter, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    draws = np.random.default_rng(settings.seed).integers(0, len(deltas), size=(settings.num_bootstrap, len(deltas)))
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(deltas[draws].mean(axis=1), [tail, 1 - tail])
    return Comparison(metric, float(np.mean(base)), float(np.mean(adapter)), float(low), float(high), len(deltas))
