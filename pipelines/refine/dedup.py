"""Exact duplicates over all rows: of those that say the same, the earliest registered stays.

The rule comes last. Only rows that passed every other rule compete, so a dropped row never takes a good one with it,
and no row is dropped in favour of one that is itself absent from the refined dataset.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.refine.rules import rule_digest

NAME = "exact_duplicates"
VERSION = 1
DUPLICATE_REASON = "same content as an example registered earlier"
KEY_BYTES = 32


def digest() -> str:
    """Return the rule's digest: the key is `canonical.duplicate_key`, the order is (leaf index, line number)."""
    return rule_digest(NAME, version=VERSION, params={})


@dataclass(frozen=True)
class Registered:
    """What the rule needs of the competing rows, in any order; never their text.

    keys: bytes [num_rows * 32]; leaf_index, line_number: int64 [num_rows].
    """

    keys: bytes
    leaf_index: npt.NDArray[np.int64]
    line_number: npt.NDArray[np.int64]


def keepers(rows: Registered) -> npt.NDArray[np.int64]:
    """Return for each row the position of the row that stands for its content; a row that stays points at itself.

    Semantics: keeper[i] = argmin over j with key[j] = key[i] of (leaf_index[j], line_number[j]).
    Exact, and the same whatever the order of arrival, since registration orders are distinct.
    """
    num_rows = len(rows.leaf_index)
    assert len(rows.keys) == num_rows * KEY_BYTES, "one key per row"
    if not num_rows:
        return np.zeros(0, np.int64)
    keys = np.frombuffer(rows.keys, dtype=f"V{KEY_BYTES}")
    by_registration = np.lexsort((rows.line_number, rows.leaf_index))
    # np.unique returns the first occurrence, which after the sort is the earliest registered.
    _, first, group = np.unique(_sortable(keys[by_registration]), return_index=True, return_inverse=True)
    keeper = np.empty(num_rows, np.int64)
    keeper[by_registration] = by_registration[first[group.reshape(-1)]]
    return keeper


def _sortable(keys: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """View 32 opaque bytes as four integers, which numpy can sort."""
    return keys.view([("a", ">u8"), ("b", ">u8"), ("c", ">u8"), ("d", ">u8")])
