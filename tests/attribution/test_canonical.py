"""The fast canonical JSON writes what the package rfc8785 writes, and refuses what it refuses."""

from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from attribution.canonical import canonical_json

SCALARS = st.none() | st.booleans() | st.integers(-(2**54), 2**54) | st.text() | st.floats(-1e300, 1e300)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def outcome(work: Any, value: Any) -> Any:
    try:
        return work(value)
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        return type(error)


@given(VALUES)
@example({"\ue000": 1, "\U0001f600": 2, "a": '\x00\x1f\x7f"\\/\b\f\n\r\t'})
@example({"b": (1, [True, None]), "a": -(2**53) + 1})
@example(["\ud800"])
@example(2**53)
@example({"x": 1.0})
def test_it_equals_the_oracle(value: Any) -> None:
    assert outcome(canonical_json, value) == outcome(rfc8785.dumps, value)


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {2}}, object()])
def test_it_refuses_what_is_no_json(value: Any) -> None:
    with pytest.raises(rfc8785.CanonicalizationError):
        canonical_json(value)
