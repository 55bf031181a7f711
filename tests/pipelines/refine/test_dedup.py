"""The earliest registered of equal rows stays, whatever the order of arrival: against a dictionary."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.refine.dedup import Registered, keepers

rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9)), unique_by=lambda row: row[1:])


def registered(rows: list[tuple[int, int, int]]) -> Registered:
    keys = b"".join(hashlib.sha256(bytes([key])).digest() for key, _, _ in rows)
    columns = [np.array([row[column] for row in rows], np.int64) for column in (1, 2)]
    return Registered(keys, *columns)


@given(rows)
def test_against_a_dictionary(rows: list[tuple[int, int, int]]) -> None:
    earliest: dict[int, tuple[int, int]] = {}
    for key, leaf, line in rows:
        earliest[key] = min(earliest.get(key, (leaf, line)), (leaf, line))
    expected = [next(i for i, row in enumerate(rows) if row[1:] == earliest[key]) for key, _, _ in rows]
    assert keepers(registered(rows)).tolist() == expected


def test_keys_that_share_a_half_differ() -> None:
    keys = bytes(31) + b"a" + bytes(31) + b"b" + b"c" + bytes(31)
    assert keepers(Registered(keys, np.arange(3), np.arange(3))).tolist() == [0, 1, 2]
