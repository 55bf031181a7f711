"""A base model is imported once, and again where the record of it counts for nothing."""

from pathlib import Path

import pytest

from attribution.key_changes import revoke, rotate
from attribution.trail import Trail
from configs.errors import UserError
from pipelines.base_model import known_base, resolve_base


def test_a_base_that_a_revoked_operator_imported_is_recorded_again(trail: Trail, tiny_base: Path) -> None:
    source = str(tiny_base)
    first = resolve_base(trail, source)
    rotate(trail, "operator")
    assert resolve_base(trail, source).entry.leaf_hash == first.entry.leaf_hash
    revoke(trail, "operator", reason="leaked", from_us=first.entry.leaf.time_us)
    assert known_base(trail, source) is None
    with pytest.raises(UserError, match=r"leaked.*--base naming where it comes from"):
        resolve_base(trail, first.digest)
    again = resolve_base(trail, source)
    assert again.digest == first.digest == known_base(trail, source)
    assert again.entry.index > first.entry.index
    assert resolve_base(trail, first.digest).entry == again.entry
