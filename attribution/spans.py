"""Verbatim spans: what a completion says word for word as a training row does, and where.

A suffix array over the words of a trace's rows, made when first asked for and kept in HOME/views/spans under the
trace's digest. That a row says the same is evidence that it was read, not that it caused the answer.

Tokens are words (runs of letters and digits; single characters in scripts that put no spaces between words) and every
other character alone, so equal tokens are equal characters. Rows end in token 0, which no completion has.
"""

import io
import re
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attribution.disk import make_directory, write_atomically
from attribution.influence.store import Trace, TraceExample
from attribution.span_files import index_file

METHOD = "spans/v1: maximal verbatim runs of words by a suffix array, rarest first by unigram log-probability"
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Thai, Lao, Burmese, Khmer, kana, Han."""
_TOKEN = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|.", re.DOTALL)

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Occurrence:
    """Where a row says it: characters `start` to `end` of the row's text (its turns, joined by newlines)."""

    example_id: str
    contributor: str
    start: int
    end: int


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of the completion that `num_rows` rows hold; `occurrences` is one for each of those
    that were asked for, in the order of training rows. `rarity`: nats, the words' summed unigram log-probability
    in these rows; the lower, the less they are everybody's words.
    """

    start: int
    end: int
    text: str
    num_words: int
    rarity: float
    num_rows: int
    occurrences: tuple[Occurrence, ...]


class StaleIndex(Exception):
    """An index that does not fit the rows."""


class SpanIndex:
    """The suffix array of some rows. Immutable."""

    def __init__(self, words: Sequence[str], ids: Ids, starts: Ids, rows: Ids, suffixes: Ids) -> None:
        """words [v]: of token id i + 1. Per token: id, first character in its row, row; suffixes in order."""
        self._words, self._ids, self._starts, self._rows, self._suffixes = words, ids, starts, rows, suffixes
        self._id_of = {word: number + 1 for number, word in enumerate(words)}
        is_word = np.array([False, *map(_is_word, words)])
        counts = np.bincount(ids, minlength=len(words) + 1) * is_word
        with np.errstate(divide="ignore"):
            self._log_p = np.where(is_word, np.log(counts / max(1, counts.sum())), 0.0)

    @classmethod
    def build(cls, texts: Sequence[str]) -> "SpanIndex":
        """Return the index of rows."""
        id_of: dict[str, int] = {}
        ids: list[int] = []
        starts: list[int] = []
        lengths = []
        for text in texts:
            before = len(ids)
            for match in _TOKEN.finditer(text):
                ids.append(id_of.setdefault(match.group(), len(id_of) + 1))
                starts.append(match.start())
            ids.append(0)
            starts.append(len(text))
            lengths.append(len(ids) - before)
        tokens = np.array(ids, dtype=np.int32)
        rows = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
        return cls(
            list(id_of),
            tokens,
            np.array(starts, dtype=np.int32),
            rows,
            suffix_array(tokens, max_length=max(lengths, default=0)),
        )

    def search(
        self, completion: str, examples: Sequence[TraceExample], *, min_words: int = 2, max_spans: int = 8,
        max_rows: int = 8, also: Collection[str] = (),
    ) -> tuple[Span, ...]:  # fmt: skip
        """Return the rarest maximal spans of at least `min_words` words. Raises StaleIndex for rows not its own.

        A span's occurrences are told of the first `max_rows` rows that have it, and of the examples in `also`.
        """
        matches = list(_TOKEN.finditer(completion))
        query = np.array([self._id_of.get(match.group(), -1) for match in matches], dtype=np.int32)
        found = []
        for first, last, low, high in self._maximal(query):
            ids = query[first:last]
            num_words = sum(_is_word(match.group()) for match in matches[first:last])
            if num_words >= min_words:
                found.append((float(self._log_p[ids].sum()), first, last, low, high, num_words))
        wanted = {row for row, example in enumerate(examples) if example.example_id in also} if also else set()
        spans = []
        for rarity, first, last, low, high, num_words in sorted(found)[:max_spans]:
            start, end = matches[first].start(), matches[last - 1].end()
            places = self._places(low, high)
            told = places[:max_rows] + [place for place in places[max_rows:] if place[0] in wanted]
            shown = tuple(_occurrence(examples, place, completion[start:end]) for place in told)
            spans.append(Span(start, end, completion[start:end], num_words, rarity, len(places), shown))
        return tuple(spans)

    def _places(self, low: int, high: int) -> list[tuple[int, int]]:
        """(row, character) of the first place in each row among the suffixes [low, high), by row."""
        positions = np.sort(self._suffixes[low:high])
        _, first = np.unique(self._rows[positions], return_index=True)
        kept = positions[first]
        return list(zip(self._rows[kept].tolist(), self._starts[kept].tolist(), strict=True))

    def _maximal(self, query: Ids) -> list[tuple[int, int, int, int]]:
        """(first token, token after the last, suffixes from, to) of spans from word to word, none within another."""
        best, low, high = self._longest(query)
        spans, furthest = [], 0
        for first in np.flatnonzero(best):
            last = int(first + best[first])
            if last > furthest:
                spans.append((int(first), last, int(low[first]), int(high[first])))
                furthest = last
        return spans

    def _longest(self, query: Ids) -> tuple[Ids, Ids, Ids]:
        """For each token that starts a word: length in tokens of the longest run that rows hold and that ends with a
        word (0: none), and its suffixes. All tokens are narrowed side by side, one word deeper a turn.
        """
        is_word = np.array([False, *map(_is_word, self._words), False])[query]  # -1, unknown, is the last
        best, best_low, best_high = (np.zeros(len(query), dtype=np.int32) for _ in range(3))
        alive = np.flatnonzero(is_word & (query > 0))
        low = np.zeros(len(alive), dtype=np.int64)
        high = np.full(len(alive), len(self._suffixes), dtype=np.int64)
        depth = 0
        while len(alive):
            wanted = query[alive + depth]
            low, high = self._bound(low, high, depth, wanted), self._bound(low, high, depth, wanted + 1)
            held = (low < high) & (wanted > 0)
            alive, low, high = alive[held], low[held], high[held]
            ends = is_word[alive + depth]
            best[alive[ends]], best_low[alive[ends]], best_high[alive[ends]] = depth + 1, low[ends], high[ends]
            depth += 1
            inside = alive + depth < len(query)
            alive, low, high = alive[inside], low[inside], high[inside]
        return best, best_low, best_high

    def _bound(self, low: NDArray[np.int64], high: NDArray[np.int64], depth: int, wanted: Ids) -> NDArray[np.int64]:
        """The first suffix of each [low, high) whose token at `depth` is not below `wanted`."""
        low, high = low.copy(), high.copy()
        while (open_ := low < high).any():
            middle = (low + high) // 2
            # A closed range may stand at the end, past every suffix.
            at = np.minimum(self._suffixes[np.minimum(middle, len(self._suffixes) - 1)] + depth, len(self._ids) - 1)
            below = self._ids[at] < wanted
            low = np.where(open_ & below, middle + 1, low)
            high = np.where(open_ & ~below, middle, high)
        return low

    def to_bytes(self) -> bytes:
        """Return the index as a NumPy archive."""
        sink = io.BytesIO()
        encoded = [word.encode("utf-8", "surrogatepass") for word in self._words]
        np.savez(
            sink,
            ids=self._ids,
            starts=self._starts,
            rows=self._rows,
            suffixes=self._suffixes,
            words=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            word_bytes=np.array([len(word) for word in encoded], dtype=np.int32),
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SpanIndex":
        """Return the index of an archive. Raises StaleIndex for what is none."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                joined = held["words"].tobytes()
                ends = np.cumsum(held["word_bytes"]).tolist()
                spans = zip([0, *ends[:-1]], ends, strict=True) if ends else ()
                words = [joined[start:end].decode("utf-8", "surrogatepass") for start, end in spans]
                return cls(words, *(held[name] for name in ("ids", "starts", "rows", "suffixes")))
        except (ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile) as error:
            raise StaleIndex(str(error)) from error


def find_spans(
    home: Path, trace: Trace, digest: str, completion: str, *, also: Collection[str] = (), **limits: int
) -> tuple[Span, ...]:
    """Return the spans of `completion` in the rows of the trace `digest`; `also` and `limits` are SpanIndex.search's.

    The index is read from the home's views, and made anew where it is missing, damaged or of other rows.
    """
    path = index_file(home, digest)
    if path.is_file():
        try:
            return SpanIndex.from_bytes(path.read_bytes()).search(completion, trace.examples, also=also, **limits)
        except StaleIndex:
            path.unlink(missing_ok=True)
    index = SpanIndex.build([example.text for example in trace.examples])
    make_directory(path.parent, 0o700)
    write_atomically(path, index.to_bytes())
    return index.search(completion, trace.examples, also=also, **limits)


def suffix_array(tokens: Ids, *, max_length: int) -> Ids:
    """Return the positions of `tokens` in the order of the suffixes that start there, by prefix doubling
    (Manber and Myers 1990), right for the first `max_length` tokens of each.
    """
    size = len(tokens)
    ranks = tokens.astype(np.int64)
    order = np.argsort(ranks, kind="stable")
    step = 1
    while step < max_length and size:
        following = np.zeros(size, dtype=np.int64)
        following[:-step] = ranks[step:] + 1
        keys = ranks * (size + 2) + following
        order = np.argsort(keys, kind="stable")
        is_new = np.concatenate([[False], np.diff(keys[order]) != 0])
        ranks = np.empty(size, dtype=np.int64)
        ranks[order] = np.cumsum(is_new)
        step *= 2
    return order.astype(np.int32)


def covered(spans: Collection[Span], length: int) -> float:
    """Return the share of `length` characters that lie in a span."""
    marks = np.zeros(length, dtype=bool)
    for span in spans:
        marks[span.start : span.end] = True
    return float(marks.mean()) if length else 0.0


def _is_word(token: str) -> bool:
    return token[0].isalnum() or token[0] == "_" or len(token) > 1


def _occurrence(examples: Sequence[TraceExample], place: tuple[int, int], text: str) -> Occurrence:
    row, start = place
    if row >= len(examples) or examples[row].text[start : start + len(text)] != text:
        raise StaleIndex(f"row {row} does not say {text!r} at {start}")
    example = examples[row]
    return Occurrence(example.example_id, example.contributor, start, start + len(text))
