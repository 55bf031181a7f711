"""Receipts: the inner tree, the index that can be lost, and what is refused."""

import os
import secrets
import time
from dataclasses import replace
from pathlib import Path

import pytest

from attribution.log.merkle import Tree, hash_leaf, verify_inclusion
from attribution.receipts import (
    ID_ALPHABET,
    ReceiptError,
    append_completions,
    completion_rows,
    find_receipt,
    new_receipt_id,
    parse_receipt,
    rebuild_receipt_index,
    receipt_bundle,
    receipt_commitment,
    receipt_content,
    recent_receipts,
)
from attribution.store import StoreError
from attribution.trail import Trail
from tests.attribution.story import Story, receipt_row, tell


@pytest.fixture
def story(trail: Trail) -> Story:
    return tell(trail)


def test_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = [new_receipt_id(time_us) for time_us in range(0, 10**9, 10**6)]
    assert ids == sorted(ids)
    assert len({new_receipt_id(5) for _ in range(1000)}) == 1000
    assert all(len(i) == 31 and i.startswith("rcpt_") and set(i[5:]) <= set(ID_ALPHABET) for i in ids)
    assert new_receipt_id()[:12] <= new_receipt_id(time.time_ns() // 1000 + 10**6)[:12]


@pytest.mark.parametrize("num_receipts", [1, 2, 3, 7, 16])
def test_inner_tree(trail: Trail, num_receipts: int) -> None:
    story = tell(trail, num_receipts=num_receipts)
    rows = completion_rows(trail, story.completions)
    body = story.completions.record.body  # type: ignore[union-attr]
    assert body.root == Tree(hash_leaf(receipt_commitment(row.receipt, row.salt)) for row in rows).root().hex()
    for number, receipt_id in enumerate(story.receipt_ids):
        inner = receipt_bundle(trail, receipt_id)["inner"]
        row = rows[number]
        verify_inclusion(
            hash_leaf(receipt_commitment(row.receipt, row.salt)),
            inner["index"],
            size=inner["size"],
            root=bytes.fromhex(body.root),
            path=[bytes.fromhex(node) for node in inner["path"]],
        )


def test_find_by_id_and_by_beginning(story: Story) -> None:
    trail = story.trail
    found = find_receipt(trail, story.receipt_ids[3])
    assert found is not None
    assert (found.inner_index, found.inner_size, found.leaf_hash) == (3, 5, story.completions.leaf_hash)
    assert receipt_content(trail, story.receipt_ids[3]) == {"prompt": "question 3", "output_text": "answer 3"}
    assert find_receipt(trail, story.receipt_ids[3][:-1] + "9") is None
    with pytest.raises(ReceiptError, match="several ids begin so"):
        find_receipt(trail, "rcpt_0")
    single = receipt_row(trail, 100, story.base, story.adapter, 1)
    append_completions(trail, [single], replica="replica-0")
    assert find_receipt(trail, single.receipt["id"][:-1]).row == single  # type: ignore[union-attr]
    assert recent_receipts(trail, 2) == [story.receipt_ids[4], story.receipt_ids[3]]
    with pytest.raises(ReceiptError, match="not in the log"):
        receipt_content(trail, "rcpt_nothing")


def test_the_index_is_a_view(story: Story) -> None:
    trail = story.trail
    path = trail.home / "views" / "receipts.sqlite"
    assert find_receipt(trail, story.receipt_ids[0]) is not None
    for damage in (lambda: path.unlink(), lambda: path.write_bytes(os.urandom(8192))):
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        damage()
        assert find_receipt(trail, story.receipt_ids[0]) is not None
    assert rebuild_receipt_index(trail) == 5


def test_an_index_of_another_log_is_thrown_away(story: Story, tmp_path: Path) -> None:
    assert find_receipt(story.trail, story.receipt_ids[0]) is not None
    other = tell(Trail.open(tmp_path / "other"), num_receipts=2)
    index = other.trail.home / "views" / "receipts.sqlite"
    index.write_bytes((story.trail.home / "views" / "receipts.sqlite").read_bytes())
    assert find_receipt(other.trail, story.receipt_ids[4]) is None
    assert find_receipt(other.trail, other.receipt_ids[1]).leaf_hash == other.completions.leaf_hash  # type: ignore[union-attr]


def test_refusals(story: Story) -> None:
    trail = story.trail
    row = receipt_row(trail, 50, story.base, story.adapter, 1)
    size = trail.log.size
    for rows, message in (
        ([], "empty"),
        ([row, row], "occurs twice"),
        ([replace(row, salt=b"short")], "every salt has 32 bytes"),
        ([replace(row, receipt={**row.receipt, "v": 2})], "version 1"),
        ([replace(row, receipt={**row.receipt, "extra": 1})], "extra"),
        ([replace(row, receipt={**row.receipt, "prompt_tokens": 1.0})], "prompt_tokens"),
        ([replace(row, receipt={**row.receipt, "adapter": "support"})], r"receipt\.adapter = 'support'"),
    ):
        with pytest.raises(ReceiptError, match=message):
            append_completions(trail, rows, replica="replica-0")
    assert trail.log.size == size
    assert parse_receipt({**row.receipt, "retrieved": ("doc",)}).retrieved == ("doc",)


def test_an_altered_table_is_refused(story: Story) -> None:
    table = story.completions.record.body.table  # type: ignore[union-attr]
    path = story.trail.store.path_of(table)
    path.write_bytes(path.read_bytes().replace(b"replica-0", b"replica-1"))
    with pytest.raises(StoreError, match="altered"):
        find_receipt(story.trail, story.receipt_ids[0])


def test_a_bundle_reveals_no_other_receipt(story: Story) -> None:
    text = str(receipt_bundle(story.trail, story.adapter_receipt))
    others = [receipt_id for receipt_id in story.receipt_ids if receipt_id != story.adapter_receipt]
    assert not any(receipt_id in text for receipt_id in others)
    assert "question" not in text and "answer 2" not in text


def test_a_batch_of_the_base_alone(trail: Trail) -> None:
    story = tell(trail)
    row = receipt_row(trail, 51, story.base, story.adapter, 1)
    entry = append_completions(trail, [replace(row, salt=secrets.token_bytes(32))], replica="replica-0")
    assert entry.leaf.parents == (story.base.leaf_hash,)
    assert [subject.kind for subject in entry.leaf.subjects] == ["base_model"]
