"""The small receipt: it says what it must, fits in 4 kB, and joins its ancestry, which may be of another day."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attribution.bodies import ApprovalBody
from attribution.log.proved import VerifyError
from attribution.log.verify import Trust, Verified, verify_bytes, verify_file
from attribution.receipt_file import ancestry_file, receipt_file
from attribution.receipts import append_once, find_receipt
from attribution.trail import Trail
from benchmarks.log_verify import MAX_RECEIPT_BYTES, grown, small_json
from tests.attribution.story import GOLDEN, START_US, Story, receipt_row, tell

SEED = 11
OTHER = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(Trail.open(tmp_path_factory.mktemp("receipt") / "home"))


@pytest.fixture(scope="module")
def trust(story: Story) -> Trust:
    return Trust.load(story.trail.home / "trust.json")


@pytest.fixture
def file(story: Story) -> dict[str, Any]:
    return receipt_file(story.trail, story.adapter_receipt)


def verify(value: Any, trust: Trust, ancestry: Any = None) -> Verified:
    return verify_bytes(small_json(value), trust=trust, ancestry=None if ancestry is None else small_json(ancestry))


def names(verified: Verified) -> list[str]:
    return [check.partition(":")[0] for check in verified.checks]


def test_alone_it_shows_which_adapter_answered(story: Story, trust: Trust, file: dict[str, Any]) -> None:
    verified = verify(file, trust)
    assert verified.kind == "receipt"
    shown = ["checkpoint", "inclusion", "commitments", "signatures", "receipt", "base model", "adapter"]
    assert names(verified) == shown
    assert verified.facts["adapter"] == story.adapter.record.outputs[0].digest  # type: ignore[union-attr]
    assert "--ancestry" in verified.facts["ancestry"] and verified.facts["contributors"] == []
    base = verify(receipt_file(story.trail, story.base_receipt), trust)
    assert "adapter: none; the base model answered alone" in base.checks


def test_with_its_ancestry_it_shows_what_a_bundle_shows(tmp_path: Path) -> None:
    """The ancestry was taken later, so it stands under another checkpoint."""
    story = tell(Trail.open(tmp_path / "home"))
    trust = Trust.load(story.trail.home / "trust.json")
    file = receipt_file(story.trail, story.adapter_receipt)
    story.trail.record("approval", ApprovalBody(OTHER, "approved", ""))
    ancestry = ancestry_file(story.trail, story.adapter_receipt)
    verified = verify(file, trust, ancestry)
    assert "ancestry: checkpoint: signed by log" in " ".join(verified.checks)
    assert names(verified)[-4:] == ["lineage", "adapter", "publication", "base model"]
    people = [(person["name"], person["num_rows"], person["num_kept"]) for person in verified.facts["contributors"]]
    assert people == [("Amara", 4, 4), ("Noor", 4, 3)]
    assert verified.facts["tree_size"] == 9 and "ancestry" not in verified.facts
    alone = verify(ancestry, trust)
    assert (alone.kind, alone.facts["contributors"]) == ("ancestry", verified.facts["contributors"])
    assert list(alone.facts["adapters"]) == ["support"] and list(alone.facts["base_models"]) == ["tiny"]


def put(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for step in path[:-1]:
            value = value[step]
        value[path[-1]] = to(value[path[-1]]) if callable(to) else to

    return change


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (put("receipt", "adapter", to=OTHER), "inclusion proof"),
        (put("receipt", "replica", to="other"), "inclusion proof"),
        (put("receipt", "v", to=2), "receipt"),
        (put("receipt", "prompt_tokens", to="1"), "receipt"),
        (put("inner", "index", to=3), "inclusion proof"),
        (put("inner", "index", to=99), "receipt"),
        (put("inner", "path", to=[]), "receipt"),
        (put("inner", "salt", to="AA=="), "receipt"),
        (put("batch", "inputs", to=[]), "inclusion proof"),
        (put("batch", "parents", to=[]), "inclusion proof"),
        (put("batch", "table", to=OTHER), "inclusion proof"),
        (put("batch", "signatures", to=[]), "inclusion proof"),
        (put("batch", "time_us", to=5), "inclusion proof"),
        (put("batch", "extra", to=1), "receipt"),
        (put("proof", to=lambda text: text.replace("\n9\n", "\n10\n")), "checkpoint"),
        (put("type", to="https://trailmark.dev/receipt/v1"), "file"),
        (put("extra", to=1), "file"),
        (lambda value: value.pop("inner"), "file"),
    ],
)
def test_what_was_changed_is_refused(trust: Trust, file: dict[str, Any], change: Any, check: str) -> None:
    change(file)
    with pytest.raises(VerifyError) as caught:
        verify(file, trust)
    assert caught.value.check == check, caught.value


def test_an_ancestry_of_something_else_does_not_serve(story: Story, trust: Trust, file: dict[str, Any]) -> None:
    of_base = ancestry_file(story.trail, story.base_receipt)
    with pytest.raises(VerifyError) as caught:
        verify(file, trust, of_base)
    assert caught.value.check == "adapter"
    with pytest.raises(VerifyError) as caught:
        verify(file, trust, file)
    assert caught.value.check == "ancestry"
    with pytest.raises(VerifyError) as caught:
        verify(of_base, trust, of_base)
    assert caught.value.check == "ancestry"
    of_adapter = ancestry_file(story.trail, story.adapter_receipt)
    del of_adapter["lineage"][5]
    for value, ancestry in ((file, of_adapter), (of_adapter, None)):
        with pytest.raises(VerifyError) as caught:
            verify(value, trust, ancestry)
        assert caught.value.check == "lineage"


def test_any_single_flipped_bit_is_refused(trust: Trust, file: dict[str, Any]) -> None:
    """Sampled here; benchmarks/bitflip.py tries every bit."""
    data, chance = small_json(file), random.Random(SEED)
    for place in chance.sample(range(8 * len(data)), 500):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(VerifyError):
            verify_bytes(bytes(flipped), trust=trust)


def test_it_fits_in_4_kb_with_two_cosignatures(story: Story, file: dict[str, Any], tmp_path: Path) -> None:
    data, trust = grown(file, size=5000, batch=256, folder=tmp_path)
    verified = verify_bytes(data, trust=trust)
    assert verified.facts["tree_size"] == 5000 and len(verified.facts["witnesses"]) == 2
    assert "receipt: number 3 of 256 in the batch of replica replica-0" in verified.checks
    num_more_hashes = 20 - 13  # a path in a log of a million entries has 20
    assert len(data) + num_more_hashes * 46 < MAX_RECEIPT_BYTES


def test_a_batch_names_one_adapter(tmp_path: Path) -> None:
    """Else a receipt would grow with, and tell of, what others asked at the same time."""
    story = tell(Trail.open(tmp_path / "home"))
    rows = [receipt_row(story.trail, 20 + n, story.base, story.adapter, START_US + 10**10 + n) for n in range(6)]
    assert append_once(story.trail, rows, replica="replica-0") == story.trail.log.leaf_hash(story.trail.log.size - 1)
    assert story.trail.log.size == 11
    for row in rows:
        stored = find_receipt(story.trail, row.receipt["id"])
        assert stored is not None and stored.inner_size == 3
        value = receipt_file(story.trail, row.receipt["id"])
        adapters = [item["digest"] for item in value["batch"]["inputs"] if item["kind"] == "adapter"]
        assert adapters == ([row.receipt["adapter"]] if row.receipt["adapter"] else [])
        assert verify(value, Trust.load(story.trail.home / "trust.json")).kind == "receipt"


def test_golden_files_still_verify() -> None:
    """A receipt and an ancestry handed out once must be readable for good."""
    trust = Trust.load(GOLDEN / "trust.json")
    assert verify_file(GOLDEN / "receipt.json", trust=trust).kind == "receipt"
    joined = verify_file(GOLDEN / "receipt.json", trust=trust, ancestry=GOLDEN / "ancestry.json")
    assert joined.facts["contributors"] and verify_file(GOLDEN / "ancestry.json", trust=trust).kind == "ancestry"
    assert json.loads((GOLDEN / "receipt.json").read_text())["type"].endswith("/receipt/v2")
