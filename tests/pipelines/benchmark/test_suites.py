"""A suite is read whole or refused with file, line and field."""

import json
from pathlib import Path

import pytest

from pipelines.benchmark.suites import Item, SuiteError, read_suite

GOOD = {"id": "q1", "prompt": "Who?", "expected": ["Ada", "Lovelace"], "reference": "Ada Lovelace."}


def suite(folder: Path, *rows: object) -> Path:
    path = folder / "suite.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_reads_items_in_order(tmp_path: Path) -> None:
    items = read_suite(suite(tmp_path, GOOD, "", {**GOOD, "id": "q2", "source": "passed over"}))
    assert items[0] == Item("q1", "Who?", ("Ada", "Lovelace"), "Ada Lovelace.")
    assert [item.item_id for item in items] == ["q1", "q2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "prompt"}, "line 2: prompt: is missing"),
        ({**GOOD, "id": 7}, "line 2: id: is 7"),
        ({**GOOD, "reference": "  "}, "line 2: reference: is '  '"),
        ({**GOOD, "expected": "Ada"}, "line 2: expected: is 'Ada'; give a list"),
        ({**GOOD, "expected": []}, r"line 2: expected: is \[\]"),
        ({**GOOD, "expected": ["Ada", 3]}, "line 2: expected: is 3"),
        (GOOD, "id: 'q1' stands twice"),
        ([], "line 2: a list"),
        ("{", "line 2: not JSON"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        read_suite(suite(tmp_path, GOOD, row))


def test_no_rows_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="it has no rows"):
        read_suite(suite(tmp_path))
    with pytest.raises(SuiteError, match="cannot be read"):
        read_suite(tmp_path / "nowhere.jsonl")
