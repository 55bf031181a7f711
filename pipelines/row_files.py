"""Reads a contributor's file row by row: JSON lines, a JSON array or Parquet. A bad row is a value, not an error.

Accepted shapes of a row:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "..." (optional), "output": "..."}
"""

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from pipelines.json_array import elements
from pipelines.refine.rules import conversation_problem

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
MAX_ARRAY_BYTES = 1 << 30
"""A JSON array is read whole; above this JSON lines is the format."""

BATCH_ROWS = 1024
SHAPES = "'messages', 'prompt' with 'completion', or 'instruction' with 'output'"


class RowFileError(UserError):
    """A file that cannot be read as rows at all."""


@dataclass(frozen=True)
class ReadRow:
    """One row of a file. `messages` is None when the row is bad, and then `reason` says why.

    line_number counts lines from 1 in JSON and JSON lines (where the row begins), rows from 1 in Parquet.
    """

    line_number: int
    messages: list[dict[str, str]] | None
    reason: str = ""


class _BadRow(Exception):
    """Why one row is bad."""


def format_of(path: Path) -> str:
    """Return `jsonl`, `json` or `parquet` by the file's ending. Raises RowFileError naming the endings that work."""
    if not path.is_file():
        raise RowFileError(f"file {path}: not found" if not path.exists() else f"file {path}: not a file")
    if path.suffix.lower() not in FORMATS:
        raise RowFileError(f"file {path.name}: ending {path.suffix!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def read_rows(path: Path, *, max_row_bytes: int) -> Iterator[ReadRow]:
    """Yield every row of a file, good or bad, in order; empty lines are no rows.

    Raises:
        RowFileError: missing file, unknown ending, UTF-16 or UTF-32 text, an array over 1 GiB, a broken Parquet file.
    """
    kind = format_of(path)
    if kind == "parquet":
        yield from _read_parquet(path, max_row_bytes)
        return
    with path.open("rb") as file:
        _skip_byte_order_mark(file, path)
        array = kind == "json" and _starts_an_array(file)
        pieces = _array_elements(file, path) if array else _lines(file, max_row_bytes)
        for line_number, data in pieces:
            yield _json_row(line_number, data, max_row_bytes)


def conversation(row: Any) -> list[dict[str, str]]:
    """Return the messages of a row in any accepted shape; raises _BadRow with the reason."""
    if not isinstance(row, Mapping):
        raise _BadRow(f"a row is a JSON object, this is {_json_type(row)}")
    if row.get("messages") is not None:
        messages = _messages(row["messages"])
    elif "prompt" in row or "completion" in row:
        messages = _turns(_text(row, "prompt"), _text(row, "completion"))
    elif "instruction" in row or "output" in row:
        instruction, output = _text(row, "instruction"), _text(row, "output")
        extra = _text(row, "input") if row.get("input") is not None else ""
        messages = _turns(f"{instruction}\n\n{extra}" if extra.strip() else instruction, output)
    else:
        found = ", ".join(repr(str(name)) for name in list(row)[:6]) or "none"
        raise _BadRow(f"missing field: expected {SHAPES}; found {found}")
    if problem := conversation_problem(messages):
        raise _BadRow(problem)
    return messages


def _turns(prompt: str, completion: str) -> list[dict[str, str]]:
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            raise _BadRow(f"empty {name}")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise _BadRow(f"field 'messages' is {_json_type(value)}, not a list")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise _BadRow(f"message {number} is {_json_type(message)}, not an object with 'role' and 'content'")
        extra = [name for name, content in message.items() if name not in ("role", "content") and content is not None]
        if extra:
            raise _BadRow(
                f"message {number} has field {extra[0]!r}, which would be lost; only 'role' and 'content' are read"
            )
        messages.append({name: _text(message, name, f"message {number}: ") for name in ("role", "content")})
    return messages


def _text(row: Mapping[str, Any], name: str, where: str = "") -> str:
    value = row.get(name)
    if value is None:
        raise _BadRow(f"{where}missing field {name!r}")
    if not isinstance(value, str):
        raise _BadRow(f"{where}field {name!r} is {_json_type(value)}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"{where}field {name!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _json_row(line_number: int, data: bytes | None, max_row_bytes: int) -> ReadRow:
    try:
        if data is None or len(data) > max_row_bytes:
            raise _BadRow(f"row too large: over {max_row_bytes} bytes (contribute.max_row_bytes)")
        return ReadRow(line_number, conversation(_parse(data)))
    except _BadRow as error:
        return ReadRow(line_number, None, str(error))


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except UnicodeDecodeError as error:
        raise _BadRow(f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise _BadRow(f"bad JSON: {error.msg} at position {error.pos + 1}") from error
    except (RecursionError, ValueError) as error:
        raise _BadRow(f"bad JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}") from error


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _BadRow(f"field {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return row


def _skip_byte_order_mark(file: BinaryIO, path: Path) -> None:
    start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise RowFileError(f"file {path.name}: UTF-16 or UTF-32 text; save it as UTF-8")
    file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)


def _starts_an_array(file: BinaryIO) -> bool:
    position = file.tell()
    while (character := file.read(1)) and character.isspace():
        pass
    file.seek(position)
    return character == b"["


def _lines(file: BinaryIO, max_row_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes); None for a line over the limit, of which no more than the limit is held in memory."""
    line_number = 0
    while piece := file.readline(max_row_bytes + 2):
        line_number += 1
        too_large = False
        while not piece.endswith(b"\n") and (rest := file.readline(max_row_bytes + 2)):
            too_large, piece = True, rest
        if too_large or piece.strip():
            yield line_number, None if too_large else piece.strip()


def _array_elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise RowFileError(f"file {path.name}: a JSON array over 1 GiB; write one object a line (.jsonl) instead")
    yield from elements(file.read())


def _read_parquet(path: Path, max_row_bytes: int) -> Iterator[ReadRow]:
    try:
        with pq.ParquetFile(path) as file:
            row_number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for index in range(batch.num_rows):
                    row_number += 1
                    yield _parquet_row(row_number, batch, index, max_row_bytes)
    except (pa.ArrowException, OSError) as error:
        raise RowFileError(f"file {path.name}: not a readable Parquet file: {error}") from error


def _parquet_row(row_number: int, batch: pa.RecordBatch, index: int, max_row_bytes: int) -> ReadRow:
    try:
        row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        messages = conversation(row)
        if sum(len(message["content"].encode()) for message in messages) > max_row_bytes:
            raise _BadRow(f"row too large: over {max_row_bytes} bytes (contribute.max_row_bytes)")
        return ReadRow(row_number, messages)
    except UnicodeDecodeError as error:
        return ReadRow(
            row_number, None, f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
        )
    except _BadRow as error:
        return ReadRow(row_number, None, str(error))
