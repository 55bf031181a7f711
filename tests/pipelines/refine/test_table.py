"""The bytes of a written table depend on its rows alone, not on how they were cut."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.refine.table import DECISIONS, ROW_GROUP_ROWS, TableWriter, write_table


def decisions(num_rows: int) -> pa.Table:
    rows = [
        {
            "example_id": f"e{i}",
            "rule": "length",
            "rule_digest": "d",
            "score": i / 7,
            "keep": i % 3 > 0,
            "reason": "" if i % 3 else "too long",
            "see_also": "",
        }
        for i in range(num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=DECISIONS)


@pytest.mark.parametrize("num_rows", [0, 1, ROW_GROUP_ROWS, ROW_GROUP_ROWS * 2 + 5])
def test_cuts_do_not_show(tmp_path: Path, num_rows: int) -> None:
    table = decisions(num_rows)
    files = []
    for name, size in (("whole", max(1, num_rows)), ("odd", 777), ("large", ROW_GROUP_ROWS + 1)):
        pieces = [table.slice(start, size) for start in range(0, num_rows, size)]
        assert write_table(tmp_path / name, DECISIONS, pieces) == num_rows
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] == files[2]
    assert pq.read_table(tmp_path / "whole").equals(table)
    assert pq.ParquetFile(tmp_path / "whole").num_row_groups == -(-num_rows // ROW_GROUP_ROWS)


def test_wrong_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema"), TableWriter(tmp_path / "a", DECISIONS) as writer:
        writer.write(pa.table({"example_id": ["a"]}))
