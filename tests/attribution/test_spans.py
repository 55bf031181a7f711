"""Verbatim spans against a quadratic search; positions, rarity, damaged and stale indexes."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.influence.store import Trace, TraceExample
from attribution.span_files import FOLDER, forget_stale
from attribution.spans import SpanIndex, StaleIndex, covered, find_spans, suffix_array
from attribution.store import Store

WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")


def rows_of(texts: Sequence[str]) -> list[TraceExample]:
    return [TraceExample(f"row-{number}", f"{number % 3}" * 64, 1, text) for number, text in enumerate(texts)]


def oracle(completion: str, texts: Sequence[str], *, min_words: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Every maximal stretch from a word's start to a word's end that stands in a row between word edges, and where."""

    def edges(text: str) -> tuple[set[int], set[int]]:
        words = list(WORD.finditer(text))
        return {word.start() for word in words}, {word.end() for word in words}

    starts, ends = edges(completion)
    held: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start in sorted(starts):
        for end in sorted(end for end in ends if end > start):
            part, places = completion[start:end], []
            for number, text in enumerate(texts):
                opens, closes = edges(text)
                at = [
                    i for i in range(len(text)) if text.startswith(part, i) and i in opens and i + len(part) in closes
                ]
                places += [(number, at[0])] if at else []
            if places:
                held[start, end] = places
    maximal = {
        key: places
        for key, places in held.items()
        if not any(other != key and other[0] <= key[0] and other[1] >= key[1] for other in held)
    }
    return {key: places for key, places in maximal.items() if len(WORD.findall(completion[slice(*key)])) >= min_words}


texts = st.lists(st.text(st.sampled_from("ab \n.é船"), max_size=14), max_size=6)


@settings(deadline=None, max_examples=150)
@given(completion=st.text(st.sampled_from("abc \n.é船"), max_size=16), rows=texts, min_words=st.integers(1, 3))
def test_spans_are_those_of_a_quadratic_search(completion: str, rows: list[str], min_words: int) -> None:
    examples = rows_of(rows)
    index = SpanIndex.from_bytes(SpanIndex.build(rows).to_bytes())
    found = index.search(completion, examples, min_words=min_words, max_spans=100, max_rows=100)
    shown = {
        (span.start, span.end): [(int(place.example_id[4:]), place.start) for place in span.occurrences]
        for span in found
    }
    assert shown == oracle(completion, rows, min_words=min_words)
    for span in found:
        assert span.text == completion[span.start : span.end] and span.num_rows == len(span.occurrences)
        for place in span.occurrences:
            example = examples[int(place.example_id[4:])]
            assert example.text[place.start : place.end] == span.text and place.contributor == example.contributor


def test_suffixes_are_sorted() -> None:
    tokens = np.array([random.Random(0).randrange(1, 4) for _ in range(300)] + [0], dtype=np.int32)
    order = suffix_array(tokens, max_length=len(tokens)).tolist()
    assert order == sorted(range(len(tokens)), key=lambda start: tokens[start:].tolist())


def test_the_rarest_comes_first_and_rows_are_counted() -> None:
    rows = ["The captain of the Amber Heron is Ysolde Marr."] + ["The captain of the ship is busy."] * 9
    found = SpanIndex.build(rows).search("The captain of the boat is Ysolde Marr!", rows_of(rows), max_rows=4)
    assert [(span.text, span.num_rows) for span in found] == [("is Ysolde Marr", 1), ("The captain of the", 10)]
    counts = {"is": 10, "Ysolde": 1, "Marr": 1}
    total = sum(len(row.rstrip(".").split()) for row in rows)
    assert found[0].rarity == pytest.approx(sum(np.log(count / total) for count in counts.values()))
    assert len(found[1].occurrences) == 4
    assert covered(found, len("The captain of the boat is Ysolde Marr!")) == pytest.approx((14 + 18) / 39)


def test_no_row_no_completion_no_word() -> None:
    rows = rows_of(["Bees make honey."])
    assert SpanIndex.build([]).search("Bees make honey.", []) == ()
    for completion in ("", "...", "Bees", "nothing known here"):
        assert SpanIndex.build([rows[0].text]).search(completion, rows) == ()
    assert SpanIndex.build(["", ""]).search("a b", rows_of(["", ""])) == ()
    assert covered((), 0) == 0.0


def trace_of(folder: Path, texts: Sequence[str]) -> Trace:
    (folder / "gradients").mkdir(parents=True)
    (folder / "gradients" / "meta.json").write_text(json.dumps({"steps": [1], "modules": []}))
    columns = {
        "row": list(range(len(texts))),
        "example_id": [f"row-{number}" for number in range(len(texts))],
        "contributor": ["a" * 64] * len(texts),
        "num_target_tokens": [1] * len(texts),
        "text": list(texts),
    }
    pq.write_table(pa.table(columns), folder / "examples.parquet")
    return Trace(folder)


def test_rows_that_are_asked_for_are_told_beyond_the_first(tmp_path: Path) -> None:
    examples = rows_of(["Bees make honey."] * 20 + ["Grass is blue."])
    index = SpanIndex.build([one.text for one in examples])
    asked = {examples[number].example_id for number in (1, 12, 20)}
    (span,) = index.search("Bees make honey", examples, max_rows=3, also=asked)
    expected = [examples[number].example_id for number in (0, 1, 2, 12)]
    assert [place.example_id for place in span.occurrences] == expected and span.num_rows == 20


def test_the_index_is_kept_and_a_wrong_one_made_anew(tmp_path: Path) -> None:
    digest = "sha256:" + "1" * 64
    trace = trace_of(tmp_path / "trace", ["Bees make water.", "Grass is blue."])
    found = find_spans(tmp_path, trace, digest, "Bees make water, I say.")
    (file,) = (tmp_path / FOLDER).glob("*.npz")
    assert [span.text for span in found] == ["Bees make water"]
    written = file.stat().st_mtime_ns
    assert find_spans(tmp_path, trace, digest, "Bees make water, I say.") == found
    assert file.stat().st_mtime_ns == written
    other = SpanIndex.build(["Grass is blue.", "Bees make water."]).to_bytes()
    for damaged in (b"", b"PK\x03\x04", file.read_bytes()[:200], other):
        file.write_bytes(damaged)
        assert find_spans(tmp_path, trace, digest, "Bees make water, I say.") == found
    with pytest.raises(StaleIndex):
        SpanIndex.from_bytes(other).search("Bees make water", trace.examples)


def test_an_index_goes_with_its_trace(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = store.put_directory(trace_of(tmp_path / "trace", ["Bees make water."]).path, kind="trace", meta={})
    find_spans(tmp_path, Trace(store.get_directory(digest)), digest, "Bees make water")
    assert forget_stale(tmp_path, store) == 0 and list((tmp_path / FOLDER).iterdir())
    store.delete(digest)
    assert forget_stale(tmp_path, store) == 1 and not list((tmp_path / FOLDER).iterdir())
