"""Offline verification: what holds is told, and every way of cheating fails at the check that is there for it."""

import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attribution.bodies import ApprovalBody, DatasetBody
from attribution.keys import SigningKey
from attribution.lineage import record_bundle
from attribution.log.note import NoteKey
from attribution.log.proved import VerifyError
from attribution.log.trust import trust_bytes
from attribution.log.verify import Trust, Verified, verify_bytes, verify_file
from attribution.receipts import receipt_bundle
from attribution.records import Artefact
from attribution.trail import Trail
from tests.attribution.story import GOLDEN, Story, tell

SEED = 7


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(Trail.open(tmp_path_factory.mktemp("verify") / "home"))


@pytest.fixture(scope="module")
def trust(story: Story) -> Trust:
    return Trust.load(story.trail.home / "trust.json")


@pytest.fixture
def bundle(story: Story) -> dict[str, Any]:
    return receipt_bundle(story.trail, story.adapter_receipt)


def verify(value: Any, trust: Trust) -> Verified:
    return verify_bytes(json.dumps(value).encode(), trust=trust)


def test_a_receipt_holds_and_says_who(story: Story, trust: Trust, bundle: dict[str, Any]) -> None:
    verified = verify(bundle, trust)
    assert verified.kind == "receipt"
    names = [check.partition(":")[0] for check in verified.checks]
    assert names == [
        "checkpoint",
        "inclusion",
        "commitments",
        "signatures",
        "receipt",
        "lineage",
        "adapter",
        "publication",
        "base model",
    ]
    facts = verified.facts
    assert (facts["receipt"], facts["adapter_name"], facts["tree_size"]) == (story.adapter_receipt, "support@1", 9)
    assert facts["adapter"] == story.adapter.record.outputs[0].digest  # type: ignore[union-attr]
    people = [(person["name"], person["num_rows"], person["num_kept"]) for person in facts["contributors"]]
    assert people == [("Amara", 4, 4), ("Noor", 4, 3)]
    assert set(facts["keys"].values()) == {"log", "operator", "contributor Amara", "contributor Noor"}


def test_a_receipt_of_the_base_alone_holds(story: Story, trust: Trust) -> None:
    verified = verify(receipt_bundle(story.trail, story.base_receipt), trust)
    assert "adapter: none; the base model answered alone" in verified.checks
    assert verified.facts["contributors"] == []


def test_every_record_holds_with_its_lineage(story: Story, trust: Trust) -> None:
    for entry in story.trail.entries():
        verified = verify(record_bundle(story.trail, entry.leaf_hash), trust)
        assert (verified.kind, verified.facts["leaf_hash"]) == (entry.leaf.kind, entry.leaf_hash)
    assert verify(story.trail.proof(story.adapter.leaf_hash), trust).kind == "adapter"
    assert verify(story.trail.proof(story.contributors[0].leaf_hash), trust).kind == "contributor"


def test_golden_bundles_still_verify() -> None:
    """Receipts handed out once must be readable for good."""
    trust = Trust.load(GOLDEN / "trust.json")
    for name in ("receipt_bundle.json", "base_receipt_bundle.json", "record_proof.json"):
        assert verify_file(GOLDEN / name, trust=trust).checks


def at(*path: str | int) -> Callable[[Any, Any], None]:
    def put(bundle: Any, value: Any) -> None:
        for step in path[:-1]:
            bundle = bundle[step]
        bundle[path[-1]] = value(bundle[path[-1]]) if callable(value) else value

    return put


def swap_digit(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


OTHER = "sha256:" + "0" * 64
# What is changed, how, and the check that must catch it.
FORGERIES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("receipt", "adapter"), OTHER, "inner path"),
    (("receipt", "model"), "other", "inner path"),
    (("receipt", "tenant"), "other", "inner path"),
    (("receipt", "output_digest"), OTHER, "inner path"),
    (("receipt", "adapter_record"), "0" * 64, "inner path"),
    (("receipt", "prompt_tokens"), 11, "inner path"),
    (("receipt", "time_us"), 1, "inner path"),
    (("receipt", "v"), 2, "receipt"),
    (("receipt", "prompt_tokens"), 12.0, "file"),
    (("salt",), swap_digit, "inner path"),
    (("salt",), "00", "receipt salt"),
    (("inner", "path", 0), swap_digit, "inner path"),
    (("inner", "index"), 3, "inner path"),
    (("inner", "index"), 99, "inner path"),
    (("inner", "size"), 6, "inner path"),
    (("inner", "path"), [], "inner path"),
    (("record", "salt"), swap_digit, "commitment"),
    (("record", "envelope", "signatures", 0, "sig"), lambda sig: swap_digit(sig), "commitment"),
    (("record", "leaf", "time_us"), 5, "inclusion proof"),
    (("record", "leaf", "commitment"), swap_digit, "inclusion proof"),
    (("record", "leaf", "parents"), [], "inclusion proof"),
    (("record", "leaf", "subjects"), [], "inclusion proof"),
    (("record", "leaf", "kind"), "adapter", "inclusion proof"),
    (("record", "leaf", "v"), 2, "leaf"),
    (("record", "proof"), lambda text: text.replace("index 8", "index 7"), "inclusion proof"),
    (("record", "proof"), lambda text: text.replace("\n9\n", "\n10\n"), "checkpoint"),
    (("record", "proof"), lambda text: text[:-3] + "A\n", "checkpoint"),
    (("record", "proof"), None, "inclusion proof"),
    (("lineage", 6, "salt"), swap_digit, "commitment"),
    (("lineage", 6, "leaf", "commitment"), swap_digit, "inclusion proof"),
    (("lineage", 6, "leaf", "parents"), [], "inclusion proof"),
    (("lineage", 0, "proof"), lambda text: text.replace("index 0", "index 1"), "inclusion proof"),
    (("type",), "https://trailmark.dev/receipt/v2", "file"),
    (("extra",), None, "file"),
]


@pytest.mark.parametrize(("path", "value", "check"), FORGERIES, ids=lambda part: str(part)[:40])
def test_a_forged_field_fails_its_check(
    trust: Trust, bundle: dict[str, Any], path: tuple[str | int, ...], value: Any, check: str
) -> None:
    if path == ("extra",):
        bundle["extra"] = 1
    else:
        at(*path)(bundle, value)
    with pytest.raises(VerifyError) as caught:
        verify(bundle, trust)
    assert caught.value.check == check, caught.value


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda lineage: lineage.pop(7), "publication"),
        (lambda lineage: lineage.pop(6), "lineage"),
        (lambda lineage: lineage.pop(5), "lineage"),
        (lambda lineage: lineage.pop(1), "signature"),
        (lambda lineage: lineage.pop(0), "lineage"),
        (lambda lineage: lineage.insert(2, lineage[1]), "lineage"),
        (lambda lineage: lineage.reverse(), "lineage"),
        (lambda lineage: lineage.clear(), "adapter"),
    ],
)
def test_an_incomplete_or_shuffled_lineage_fails(
    trust: Trust, bundle: dict[str, Any], change: Callable[[list[Any]], Any], check: str
) -> None:
    change(bundle["lineage"])
    with pytest.raises(VerifyError) as caught:
        verify(bundle, trust)
    assert caught.value.check == check, caught.value


def test_any_single_flipped_bit_is_refused(trust: Trust, bundle: dict[str, Any]) -> None:
    """Sampled over the compact file, where every byte means something; an equal JSON value is not a change."""
    data, chance = json.dumps(bundle, separators=(",", ":")).encode(), random.Random(SEED)
    assert verify_bytes(data, trust=trust)
    places = chance.sample(range(8 * len(data)), 1500)
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(VerifyError):
            verify_bytes(bytes(flipped), trust=trust)


def test_wrong_keys(story: Story, trust: Trust, bundle: dict[str, Any]) -> None:
    stranger = SigningKey.from_seed("stranger", bytes(32))
    with pytest.raises(VerifyError) as caught:
        verify(bundle, Trust(NoteKey(trust.log.name, stranger.public_bytes), trust.keys))
    assert caught.value.check == "checkpoint"
    with pytest.raises(VerifyError) as caught:
        verify(bundle, Trust(NoteKey("other.test/log", trust.log.public_bytes), trust.keys))
    assert caught.value.check == "checkpoint"
    with pytest.raises(VerifyError) as caught:
        verify(bundle, Trust(trust.log, {stranger.key_id: stranger.public_bytes}))
    assert caught.value.check == "signature"


def test_a_receipt_of_another_trail_is_refused(trust: Trust, tmp_path: Path) -> None:
    other = tell(Trail.open(tmp_path / "other"))
    with pytest.raises(VerifyError) as caught:
        verify(receipt_bundle(other.trail, other.adapter_receipt), trust)
    assert caught.value.check == "checkpoint"


def test_proofs_under_different_checkpoints_do_not_mix(tmp_path: Path) -> None:
    story = tell(Trail.open(tmp_path / "home"))
    trust = Trust.load(story.trail.home / "trust.json")
    bundle = receipt_bundle(story.trail, story.adapter_receipt)
    story.trail.record("approval", ApprovalBody(OTHER, "approved", ""))
    bundle["record"] = story.trail.proof(story.completions.leaf_hash)
    with pytest.raises(VerifyError) as caught:
        verify(bundle, trust)
    assert caught.value.check == "checkpoint"


def test_a_contributor_may_sign_only_contributions(tmp_path: Path) -> None:
    """A contributor's key is proven by its own record in the log; it must not pass for the operator's."""
    story = tell(Trail.open(tmp_path / "home"))
    trail, key = story.trail, story.trail.keys.get("Amara")
    trust = Trust.load(trail.home / "trust.json")
    made = story.adapter.record.outputs[0]  # type: ignore[union-attr]
    forged = trail.record("adapter", story.adapter.record.body, outputs=[made], signer=key)  # type: ignore[union-attr]
    with pytest.raises(VerifyError) as caught:
        verify(record_bundle(trail, forged.leaf_hash), trust)
    assert caught.value.check == "signature"


def test_a_key_is_not_proven_by_a_record_that_comes_later(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    unknown = SigningKey.generate("unknown")
    rows = trail.store.put_blob(b"rows")
    body = DatasetBody("d", "MIT", "jsonl", 1, 0, rows, "f")
    entry = trail.record("dataset", body, outputs=[Artefact("dataset", "d", rows)], signer=unknown)
    with pytest.raises(VerifyError) as caught:
        verify(trail.proof(entry.leaf_hash), Trust.load(trail.home / "trust.json"))
    assert caught.value.check == "signature"


def test_an_erased_ancestor_is_told_and_an_erased_batch_is_refused(tmp_path: Path) -> None:
    story = tell(Trail.open(tmp_path / "home"))
    trust = Trust.load(story.trail.home / "trust.json")
    bundle = receipt_bundle(story.trail, story.adapter_receipt)
    assert story.trail.delete_record(story.refinement.leaf_hash)
    erased = receipt_bundle(story.trail, story.adapter_receipt)
    assert any(check.startswith("erased: 1 records") for check in verify(erased, trust).checks)
    batch = copy.deepcopy(bundle)
    batch["record"]["envelope"] = batch["record"]["salt"] = None
    with pytest.raises(VerifyError) as caught:
        verify(batch, trust)
    assert caught.value.check == "receipt"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"\xff", b'{"a":1,"a":1}', b'{"a":NaN}', b"[" * 100_000])
def test_files_that_are_nothing(trust: Trust, data: bytes) -> None:
    with pytest.raises(VerifyError) as caught:
        verify_bytes(data, trust=trust)
    assert caught.value.check == "file"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"log": "nonsense"},
        {"keys": {"ab" * 32: "00" * 32}},
        {"keys": []},
        {"keys": {"x": "zz"}},
    ],
)
def test_bad_trust_files(story: Story, tmp_path: Path, change: dict[str, Any]) -> None:
    value = json.loads((story.trail.home / "trust.json").read_text())
    (tmp_path / "trust.json").write_bytes(trust_bytes({**value, **change}))
    with pytest.raises(VerifyError) as caught:
        Trust.load(tmp_path / "trust.json")
    assert caught.value.check == "keys"


def test_missing_files(trust: Trust, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="cannot be read"):
        verify_file(tmp_path / "absent.json", trust=trust)
    with pytest.raises(VerifyError, match="--keys"):
        Trust.load(tmp_path / "absent.json")


def test_it_takes_less_than_50_ms_of_cpu(trust: Trust, bundle: dict[str, Any]) -> None:
    """CPU time of the best of five, so that a busy machine does not decide."""
    data = json.dumps(bundle).encode()
    times = []
    for _ in range(5):
        start = time.process_time()
        verify_bytes(data, trust=trust)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_it_imports_nothing_heavy() -> None:
    heavy = [
        "torch",
        "ray",
        "pyarrow",
        "numpy",
        "pydantic",
        "sqlite3",
        "securesystemslib",
        "attribution.trail",
        "attribution.store",
        "socket",
    ]
    program = f"import sys, attribution.log.verify; print([m for m in {heavy!r} if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout.strip() == "[]"
