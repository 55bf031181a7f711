"""Every accepted format and shape gives the same messages; every bad row its line number and reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.json_array import elements
from pipelines.row_files import ReadRow, RowFileError, read_rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = b'{"prompt": "Hi", "completion": "Hello"}'
LIMIT = 1000


def read(path: Path, data: bytes, *, limit: int = LIMIT) -> list[ReadRow]:
    path.write_bytes(data)
    return list(read_rows(path, max_row_bytes=limit))


def test_shapes_become_messages(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "completion": "Hello", "source": "x"},
        {"messages": TURNS},
        {"messages": [{**TURNS[0], "name": None}, TURNS[1]]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    ]
    read_back = read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert [row.messages for row in read_back] == [TURNS] * 5
    assert [row.line_number for row in read_back] == [1, 2, 3, 4, 5]


def test_instruction_and_input_are_joined(tmp_path: Path) -> None:
    row = {"instruction": "Translate", "input": "chat", "output": "cat"}
    (read_back,) = read(tmp_path / "a.jsonl", json.dumps(row).encode())
    assert read_back.messages == [
        {"role": "user", "content": "Translate\n\nchat"},
        {"role": "assistant", "content": "cat"},
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
def test_line_endings_mark_and_empty_lines(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD + b"\n\n"
    assert [(row.line_number, row.messages) for row in read(tmp_path / name, data)] == [(1, TURNS), (4, TURNS)]


BAD_LINES = [
    (b"{not json}", "bad JSON: Expecting property name enclosed in double quotes at position 2"),
    (b'{"prompt": "a", "completion": "b"', "bad JSON: Expecting ',' delimiter at position 34"),
    (b'"text"', "a row is a JSON object, this is text"),
    (b"[1]", "a row is a JSON object, this is a list"),
    (b'{"prompt": "a"}', "missing field 'completion'"),
    (b'{"prompt": null, "completion": "b"}', "missing field 'prompt'"),
    (b'{"question": "a"}', "missing field: expected 'messages'"),
    (b"{}", "found none"),
    (b'{"prompt": " \\n", "completion": "b"}', "empty prompt"),
    (b'{"prompt": "a", "completion": ""}', "empty completion"),
    (b'{"prompt": 3, "completion": "b"}', "field 'prompt' is a number, not text"),
    (b'{"prompt": "a", "completion": ["b"]}', "field 'completion' is a list, not text"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "field 'prompt' stands twice in one object"),
    (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8: byte 0xff at position 13"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "half a surrogate pair"),
    (b'{"messages": "hi"}', "field 'messages' is text, not a list"),
    (b'{"messages": []}', "no messages"),
    (b'{"messages": ["hi"]}', "message 1 is text, not an object"),
    (b'{"messages": [{"role": "user"}]}', "message 1: missing field 'content'"),
    (b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "message 1 has field 'tool_calls'"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
    (b'{"messages": [{"role": "bot", "content": "a"}]}', "unknown role 'bot'"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "wrong order of roles"),
    (b"[" * 100_000, "row too large"),
    (b'{"prompt": "' + b"a" * LIMIT + b'", "completion": "b"}', f"row too large: over {LIMIT} bytes"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_named_and_stops_no_good_one(tmp_path: Path, line: bytes, reason: str) -> None:
    rows = read(tmp_path / "a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    assert [row.line_number for row in rows] == [1, 2, 3]
    assert [row.messages for row in rows] == [TURNS, None, TURNS]
    assert reason in rows[1].reason


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.jsonl", b"[" * 200_000, limit=1_000_000)
    assert row.reason == "bad JSON: nested too deeply"


@pytest.mark.parametrize(("extra", "is_good"), [(0, True), (1, False)])
def test_size_limit_is_exact(tmp_path: Path, extra: int, is_good: bool) -> None:
    padding = LIMIT - len(GOOD) + extra
    line = b'{"prompt": "Hi' + b"x" * padding + b'", "completion": "Hello"}'
    for data in (line, line + b"\n", line + b"\r\n"):
        assert [row.messages is not None for row in read(tmp_path / "a.jsonl", data)] == [is_good]


def test_array_with_one_broken_element_keeps_the_others(tmp_path: Path) -> None:
    data = (
        b'[\n  {"prompt": "Hi", "completion": "Hello"},\n  {"prompt": "a" "completion": "b,]}"},\n'
        + b"  "
        + GOOD
        + b"\n]\n"
    )
    rows = read(tmp_path / "a.json", data)
    assert [(row.line_number, row.messages) for row in rows] == [(2, TURNS), (3, None), (4, TURNS)]
    assert rows[1].reason.startswith("bad JSON: Expecting ',' delimiter")


def test_array_cut_short_reports_what_is_left(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.json", b"[" + GOOD + b',\n{"prompt": "a", "comp')
    assert [(row.line_number, row.messages) for row in rows] == [(1, TURNS), (2, None)]


def test_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    assert [row.messages for row in read(tmp_path / "a.json", GOOD + b"\n" + GOOD)] == [TURNS, TURNS]


texts = st.text(alphabet=st.sampled_from('ab"\\\\[]{},:\n\u00e9\u2028 '), max_size=6)
json_values = st.recursive(
    st.none() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=6), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_elements_of_any_array_are_those_of_the_json_module(
    values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    assert [json.loads(piece) for _, piece in elements(data)] == values


def test_parquet_shapes_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["Hi", None, "Hi"], "completion": ["Hello", "b", " "]}), path)
    rows = list(read_rows(path, max_row_bytes=LIMIT))
    assert [(row.line_number, row.messages is None) for row in rows] == [(1, False), (2, True), (3, True)]
    assert [row.reason for row in rows] == ["", "missing field 'prompt'", "empty completion"]
    pq.write_table(pa.table({"messages": [TURNS], "tag": [1]}), path)
    assert [row.messages for row in read_rows(path, max_row_bytes=LIMIT)] == [TURNS]


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.array([b"\xff", b"Hi"]).view(pa.string())
    pq.write_table(pa.table({"prompt": broken, "completion": ["b", "Hello"]}), path)
    rows = list(read_rows(path, max_row_bytes=LIMIT))
    assert [row.messages for row in rows] == [None, TURNS]
    assert rows[0].reason == "not UTF-8: byte 0xff at position 1"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"a,b", "ending '.csv' is not one of"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "save it as UTF-8"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
    ],
)
def test_file_that_cannot_be_read_at_all(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(RowFileError, match=message):
        read(tmp_path / name, data)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RowFileError, match="not found"):
        list(read_rows(tmp_path / "none.jsonl", max_row_bytes=LIMIT))
