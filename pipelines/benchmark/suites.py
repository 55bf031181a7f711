"""A held-out suite: one question per line, with the answers that count as right and one full answer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError

FIELDS = ("id", "prompt", "expected", "reference")


class SuiteError(UserError):
    """A suite that cannot be used; the message names file, line and field."""


@dataclass(frozen=True)
class Item:
    """One question. `expected`: any of these, found in an answer, makes it right; `reference`: the full answer."""

    item_id: str
    prompt: str
    expected: tuple[str, ...]
    reference: str


def read_suite(path: Path) -> tuple[Item, ...]:
    """Return the items of a JSONL file, in its order; blank lines and further fields are passed over.

    Raises:
        SuiteError: no such file, no items, or a row whose field is missing, of the wrong type, empty or a repeated id.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"suite {path}: cannot be read: {error}") from error
    items = [_item(line, where=f"suite {path} line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise SuiteError(f"suite {path}: it has no rows; give one JSON object with {', '.join(FIELDS)} per line")
    _refuse_repeated_ids(items, path)
    return tuple(items)


def _item(line: str, *, where: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SuiteError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SuiteError(f"{where}: a {type(row).__name__}; give an object with {', '.join(FIELDS)}")
    expected = row.get("expected")
    if not isinstance(expected, list) or not expected:
        raise SuiteError(f"{where}: expected: {_shown(row, 'expected')}; give a list of one or more texts")
    return Item(
        item_id=_text(row, "id", where),
        prompt=_text(row, "prompt", where),
        expected=tuple(_text({"expected": text}, "expected", where) for text in expected),
        reference=_text(row, "reference", where),
    )


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise SuiteError(f"{where}: {field}: {_shown(row, field)}; give a text that is not empty")
    return value


def _shown(row: dict[str, Any], field: str) -> str:
    return f"is {row[field]!r}" if field in row else "is missing"


def _refuse_repeated_ids(items: list[Item], path: Path) -> None:
    seen: set[str] = set()
    for item in items:
        if item.item_id in seen:
            raise SuiteError(f"suite {path}: id: {item.item_id!r} stands twice; give each row its own")
        seen.add(item.item_id)
