"""Fee tables: what is read, what is refused with line, field and remedy, and what is listed."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.fees import Answered, Fee, FeeError, parse_fees, read_fees, sort_fees

ROWS = [{"request_id": "r1", "payer": "a", "fee": 5}, {"request_id": "r2", "payer": "b, c", "fee": 0}]
FEES = (Fee(2, "r1", "a", 5), Fee(3, "r2", "b, c", 0))


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "fees.csv").write_text('\ufefffee,request_id,payer\r\n5,r1,a\r\n0,r2,"b, c"\r\n', encoding="utf-8")
    (tmp_path / "fees.jsonl").write_text("\n" + "\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "fees.parquet")
    assert read_fees(tmp_path / "fees.csv") == read_fees(tmp_path / "fees.jsonl") == FEES
    assert [(fee.line, fee.fee) for fee in read_fees(tmp_path / "fees.parquet")] == [(1, 5), (2, 0)]


HEADING = b"request_id,payer,fee\n"
BAD = [
    (
        "x.csv",
        HEADING + b"r1,a,1.5\n",
        r"x\.csv: line 2: field 'fee' = '1\.5': must be a whole number.*use a smaller unit",
    ),
    ("x.csv", HEADING + b"r1,a,-1\n", "line 2: field 'fee' = '-1'"),
    (
        "x.csv",
        HEADING + b"r1,a,99999999999999999999\n",
        "field 'fee' = '9+': must be a whole number from 0 to 9007199254740991",
    ),
    ("x.csv", HEADING + b"r1,,1\n", "line 2: field 'payer' = '': must be text of 1 to 200 printable"),
    ("x.csv", HEADING + b"r1,a\n", "line 2: 2 fields, not 3; quote a comma"),
    ("x.csv", HEADING + b'r1,"a,1\n', "not CSV"),
    ("x.csv", b"request,payer,fee\nr1,a,1\n", "line 1: heading request,payer,fee; it must be request_id,payer,fee"),
    ("x.csv", b"", "line 1: heading -;"),
    ("x.csv", HEADING + b"r1,\xff,1\n", "not UTF-8 at byte 24"),
    (
        "x.jsonl",
        b'{"request_id": "r1", "payer": "a"}\n',
        "line 1: field 'fee' is missing; a row has request_id, payer, fee",
    ),
    ("x.jsonl", b'\n{"request_id": "r1", "payer": "a", "fee": 1, "note": 2}\n', "line 2: field 'note' is unknown"),
    ("x.jsonl", b'{"request_id": "r1", "payer": "a", "fee": true}\n', "field 'fee' = True"),
    ("x.jsonl", b"[1]\n{\n", "line 1: not an object.*\n.*line 2: not JSON"),
    ("x.parquet", b"PAR1", "not a readable Parquet file"),
    ("x.xlsx", b"", r"ending '\.xlsx' is not one of \.csv, \.jsonl, \.ndjson, \.parquet"),
]


@pytest.mark.parametrize(("name", "data", "reason"), BAD)
def test_a_bad_row_is_named_with_its_remedy(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(FeeError, match=reason):
        parse_fees(data, name)


def test_bad_rows_are_told_together_but_not_without_end(tmp_path: Path) -> None:
    with pytest.raises(FeeError) as caught:
        parse_fees(HEADING + b"r,a,x\n" * 50, "x.csv")
    assert len(str(caught.value).splitlines()) == 21 and "and 30 more" in str(caught.value)
    with pytest.raises(FeeError, match="no such file"):
        read_fees(tmp_path / "none.csv")


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"), st.integers(1, 3)), max_size=12),
    st.sets(st.sampled_from("abcdef")),
    st.randoms(use_true_random=False),
)
def test_nothing_is_dropped_nothing_paid_twice_in_any_order(
    rows: list[tuple[str, str, int]], before: set[str], shuffler: random.Random
) -> None:
    known = {name: Answered(name, 10 * place, "sha256:a", "sha256:b", "") for place, name in enumerate("abcde")}
    fees = [Fee(line, *row) for line, row in enumerate(rows)]
    found = sort_fees(fees, known, start_us=10, end_us=40, paid_before=before)
    assert sorted([fee.line for fee in found.paid] + [one.fee.line for one in found.listed]) == list(range(len(rows)))
    paid = [fee.request_id for fee in found.paid]
    assert len(set(paid)) == len(paid) and not before & set(paid) and set(paid) <= set("bcd")
    shuffler.shuffle(rows)
    again = sort_fees(
        [Fee(line, *row) for line, row in enumerate(rows)], known, start_us=10, end_us=40, paid_before=before
    )
    assert [(fee.request_id, fee.payer, fee.fee) for fee in again.paid] == [
        (fee.request_id, fee.payer, fee.fee) for fee in found.paid
    ]
