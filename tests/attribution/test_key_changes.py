"""Keys that change: rotated ones vouch for the next, revoked ones sign nothing more, old receipts still hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from attribution.bodies import ApprovalBody, DatasetBody, KeyRevocationBody
from attribution.key_changes import revoke, rotate
from attribution.keys import SigningKey, SigningKeyError
from attribution.lineage import record_bundle
from attribution.log.proved import VerifyError
from attribution.log.sequencer import OutcomeUnknown
from attribution.log.trust import Trust
from attribution.log.verify import Verified, verify_bytes
from attribution.receipts import receipt_bundle
from attribution.records import Artefact
from attribution.trail import Draft, Entry, Trail, now_us
from tests.attribution.story import Story, tell

OTHER = "sha256:" + "0" * 64


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return tell(Trail.open(tmp_path / "home"))


def trust_of(trail: Trail) -> Trust:
    return Trust.load(trail.home / "trust.json")


def verify(value: Any, trust: Trust) -> Verified:
    return verify_bytes(json.dumps(value).encode(), trust=trust)


def give_rows(trail: Trail, name: str) -> Entry:
    rows = trail.store.put_blob(f"more rows of {name}".encode())
    body = DatasetBody("more", "MIT", "jsonl", 1, 0, rows, "more.jsonl")
    return trail.record("dataset", body, outputs=[Artefact("dataset", "more", rows)], signer=trail.keys.get(name))


def check_of(value: Any, trust: Trust) -> str:
    with pytest.raises(VerifyError) as caught:
        verify(value, trust)
    return caught.value.check


def test_a_contributor_rotates_and_both_keys_records_verify(story: Story) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    old = trail.keys.get("Amara")
    before = receipt_bundle(trail, story.adapter_receipt)
    assert "notices" not in before
    entry = rotate(trail, "Amara")
    new = trail.keys.get("Amara")
    assert new.key_id != old.key_id
    given = give_rows(trail, "Amara")
    assert given.leaf.parents == (story.contributors[0].leaf_hash,)
    verified = verify(record_bundle(trail, given.leaf_hash), trust)
    assert "contributor Amara" in verified.facts["keys"].values()
    told = f"rotated: key {old.key_id[:16]} of Amara gave way to {new.key_id[:16]} on"
    assert any(check.startswith(told) for check in verified.checks)
    (person,) = verified.facts["contributors"]
    assert (person["name"], person["num_rows"]) == ("Amara", 1)
    after = verify(receipt_bundle(trail, story.adapter_receipt), trust)
    assert any(check.startswith(told) for check in after.checks)
    assert verify(before, trust).checks and verify(record_bundle(trail, entry.leaf_hash), trust).kind == "key_rotation"


def test_the_old_key_signs_nothing_more(story: Story) -> None:
    trail = story.trail
    old = trail.keys.get("Amara")
    rotate(trail, "Amara")
    size = trail.log.size
    with pytest.raises(SigningKeyError, match="has taken its place"):
        trail.record("approval", ApprovalBody(OTHER, "approved", ""), signer=old)
    assert trail.log.size == size
    former = trail.home / "keys" / "former" / f"Amara-{old.key_id[:16]}.key"
    assert SigningKey.load(former).key_id == old.key_id
    assert not (trail.home / "keys" / "next").exists()


@pytest.mark.parametrize("name", ["operator", "log"])
def test_receipts_hold_across_a_rotation_whichever_trust_file_is_read(story: Story, name: str) -> None:
    trail = story.trail
    trust_before = trust_of(trail)
    receipt_before = receipt_bundle(trail, story.adapter_receipt)
    rotate(trail, name)
    trail.record("approval", ApprovalBody(OTHER, "approved", "after"))
    receipt_after = receipt_bundle(trail, story.adapter_receipt)
    late = record_bundle(trail, trail.entry(trail.log.size - 1).leaf_hash)
    for trust in (trust_before, trust_of(trail)):
        for value in (receipt_before, receipt_after, late):
            assert verify(value, trust).checks
    told = verify(receipt_before, trust_of(trail)).checks
    assert name != "log" or any("in use up to 10 entries and rotated since" in check for check in told), told


def test_a_second_rotation_and_a_fresh_process(story: Story) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    for name in ("log", "operator", "log", "operator", "Noor", "Noor"):
        rotate(trail, name)
    again = Trail.open(trail.home)
    entry = again.record("approval", ApprovalBody(OTHER, "approved", ""))
    for reader in (trust, trust_of(trail)):
        assert verify(record_bundle(again, entry.leaf_hash), reader).kind == "approval"
        assert verify(receipt_bundle(again, story.adapter_receipt), reader).kind == "receipt"


def test_a_process_that_was_open_before_signs_with_the_new_keys(story: Story) -> None:
    other = Trail.open(story.trail.home)
    for name in ("operator", "log"):
        rotate(story.trail, name)
    entry = other.record("approval", ApprovalBody(OTHER, "approved", ""))
    trust = trust_of(other)
    verified = verify(record_bundle(other, entry.leaf_hash), trust)
    assert str(trust.log) in verified.facts["keys"]
    assert set(trust.keys) == set(verified.facts["signed_by"])


def test_a_revoked_key_is_refused_from_its_time_and_older_records_hold(story: Story) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    held = receipt_bundle(trail, story.adapter_receipt)
    key = trail.keys.get("Amara")
    revoke(trail, "Amara", reason="laptop stolen")
    with pytest.raises(SigningKeyError, match="laptop stolen"):
        give_rows(trail, "Amara")
    verified = verify(receipt_bundle(trail, story.adapter_receipt), trust)
    assert any("laptop stolen" in check and "all here is older" in check for check in verified.checks)
    assert verify(held, trust_of(trail)).checks
    with pytest.raises(SigningKeyError, match="laptop stolen"):
        rotate(trail, "Amara")
    rotate(trail, "Amara", lost=True)
    assert trail.keys.get("Amara").key_id != key.key_id
    given = give_rows(trail, "Amara")
    for reader in (trust, trust_of(trail)):
        assert verify(record_bundle(trail, given.leaf_hash), reader).kind == "dataset"


def test_a_revocation_that_reaches_back_condemns_what_was_signed_since(story: Story) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    held = receipt_bundle(trail, story.adapter_receipt)
    revoke(trail, "Amara", reason="stolen", from_us=story.datasets[0].leaf.time_us)
    assert check_of(receipt_bundle(trail, story.adapter_receipt), trust) == "revoked key"
    assert check_of(held, trust_of(trail)) == "revoked key"
    assert verify(held, trust).checks, "who knows of no revocation cannot see one"
    assert verify(record_bundle(trail, story.contributors[0].leaf_hash), trust).checks, "signed before that time"


@pytest.mark.parametrize("name", ["operator", "log"])
def test_the_operator_and_the_log_get_a_new_key_when_theirs_is_revoked(story: Story, name: str) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    held = receipt_bundle(trail, story.adapter_receipt)
    rotation, revocation = revoke(trail, name, reason="leaked")
    assert (rotation.leaf.kind, revocation.leaf.kind) == ("key_rotation", "key_revocation")
    fresh = receipt_bundle(Trail.open(trail.home), story.adapter_receipt)
    for reader in (trust, trust_of(trail)):
        assert verify(fresh, reader).checks
    if name == "log":
        assert check_of(held, trust_of(trail)) == "revoked key", "its time cannot be told: ask for the proof anew"
    else:
        assert verify(held, trust_of(trail)).checks


def forged(trail: Trail, draft: Draft) -> Entry:
    """Append what the trail refuses, as a program without that check would."""
    with mock.patch.object(trail._makers.key_changes, "require_usable"):
        return trail.record_many([draft])[0]


def test_what_slips_past_the_append_is_flagged_by_verify(story: Story) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    old, operator = trail.keys.get("Noor"), trail.keys.get("operator")
    body = story.datasets[1].record.body  # type: ignore[union-attr]
    rotate(trail, "Noor")
    late = forged(trail, Draft("dataset", body, outputs=story.datasets[1].record.outputs, signer=old))  # type: ignore[union-attr]
    assert check_of(record_bundle(trail, late.leaf_hash), trust) == "rotated key"
    rotate(trail, "operator")
    late = forged(trail, Draft("approval", ApprovalBody(OTHER, "approved", ""), signer=operator))
    for reader in (trust, trust_of(trail)):
        assert check_of(record_bundle(trail, late.leaf_hash), reader) == "rotated key"
    revoke(trail, "Amara", reason="stolen")
    late = forged(trail, Draft("dataset", body, signer=trail.keys.get("Amara")))
    for reader in (trust, trust_of(trail)):
        assert check_of(record_bundle(trail, late.leaf_hash), reader) == "revoked key"


def test_nobody_can_take_over_anothers_key(story: Story) -> None:
    """A rotation counts only with the new key's signature and the old one's, or the operator's."""
    trail, trust = story.trail, trust_of(story.trail)
    thief = SigningKey.generate("thief")
    rotation: Any = rotate(trail, "Amara").record.body  # type: ignore[union-attr]
    stolen = [
        Draft("key_rotation", replace(rotation, key_id=thief.key_id, public_key=thief.public_hex), signer=thief),
        Draft("key_rotation", replace(rotation, key_id=thief.key_id), signer=thief),
        Draft("key_rotation", rotation, signer=trail.keys.get("operator")),
        Draft(
            "key_rotation",
            replace(rotation, role="operator", key_id=thief.key_id, public_key=thief.public_hex),
            signer=trail.keys.get("Amara"),
            cosigners=[thief],
        ),
    ]
    for draft in stolen:
        entry = forged(trail, draft)
        assert check_of(record_bundle(trail, entry.leaf_hash), trust) in ("key rotation", "signature")


@pytest.mark.parametrize("name", ["Amara", "operator", "log"])
@pytest.mark.parametrize("step", ["trust", "files"])
def test_a_rotation_cut_off_after_its_record_is_finished_by_the_next_to_open(
    story: Story, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    trail = story.trail
    old = trail.keys.get(name)

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(f"attribution.key_changes.{'_install' if step == 'trust' else '_move_files'}", power_cut)
        with pytest.raises(OutcomeUnknown, match="power cut"):
            rotate(trail, name)
    again = Trail.open(trail.home)
    assert again.keys.get(name).key_id != old.key_id
    assert not (trail.home / "keys" / "next").exists()
    entry = again.record("approval", ApprovalBody(OTHER, "approved", ""))
    assert verify(record_bundle(again, entry.leaf_hash), trust_of(again)).checks
    assert verify(receipt_bundle(again, story.adapter_receipt), trust_of(again)).checks


def test_a_rotation_cut_off_before_its_record_takes_up_the_same_key(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = story.trail

    def power_cut(*_: object, **__: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(trail, "record_many", power_cut)
        with pytest.raises(OSError, match="power cut"):
            rotate(trail, "Amara")
    waiting = (trail.home / "keys" / "next" / "Amara.pub").read_text().strip()
    assert Trail.open(trail.home).keys.get("Amara").public_hex != waiting
    rotate(trail, "Amara")
    assert trail.keys.get("Amara").public_hex == waiting


def test_refusals(story: Story) -> None:
    trail = story.trail
    with pytest.raises(SigningKeyError, match="no contributor of that name"):
        rotate(trail, "Nobody")
    with pytest.raises(SigningKeyError, match="lies ahead"):
        revoke(trail, "Amara", reason="x", from_us=2**52)
    with pytest.raises(SigningKeyError, match="not one of 'Amara'"):
        revoke(trail, "Amara", reason="x", key_id="ab" * 32)
    with pytest.raises(SigningKeyError, match="nobody stands above it"):
        rotate(trail, "operator", lost=True)
    shutil.rmtree(trail.home / "keys")
    with pytest.raises(SigningKeyError, match="known keys: none"):
        rotate(trail, "Amara")


def test_a_revocation_reaches_every_key_in_force_since_and_a_new_one_goes_on(story: Story) -> None:
    """Rotated after the theft, revoked from the theft on: neither key counts since, not even to pass trust on."""
    trail, trust, stolen_us = story.trail, trust_of(story.trail), now_us()
    by_old = give_rows(trail, "Amara")
    old = trail.keys.get("Amara").key_id
    rotate(trail, "Amara")
    new = trail.keys.get("Amara").key_id
    by_new = give_rows(trail, "Amara")
    revoked = revoke(trail, "Amara", reason="stolen", from_us=stolen_us)
    assert [entry.record.body.key_id for entry in revoked] == [old, new]  # type: ignore[union-attr]
    rotation = rotate(trail, "Amara", lost=True)
    again = give_rows(trail, "Amara")
    for reader in (trust, trust_of(trail)):
        assert check_of(record_bundle(trail, by_old.leaf_hash), reader) == "revoked key"
        assert check_of(record_bundle(trail, by_new.leaf_hash), reader) == "revoked key"
        for entry in (story.datasets[0], rotation, again):
            assert verify(record_bundle(trail, entry.leaf_hash), reader).checks


def test_a_key_that_a_revoked_one_vouched_for_is_revoked_with_it(story: Story) -> None:
    trail, trust, stolen_us = story.trail, trust_of(story.trail), now_us()
    old = trail.keys.get("Amara").key_id
    rotation = rotate(trail, "Amara")
    given = give_rows(trail, "Amara")
    body = KeyRevocationBody("Amara", "contributor", old, stolen_us, "as older programs recorded it")
    trail.record("key_revocation", body)
    for entry in (rotation, given):
        assert check_of(record_bundle(trail, entry.leaf_hash), trust) == "revoked key"
    rotate(trail, "Amara", lost=True)
    assert verify(record_bundle(trail, give_rows(trail, "Amara").leaf_hash), trust).checks


def test_who_was_revoked_from_before_joining_goes_on_under_a_new_key(story: Story) -> None:
    trail, trust = story.trail, trust_of(story.trail)
    revoke(trail, "Amara", reason="stolen", from_us=1)
    rotate(trail, "Amara", lost=True)
    given = give_rows(trail, "Amara")
    for reader in (trust, trust_of(trail)):
        assert verify(record_bundle(trail, given.leaf_hash), reader).facts["signed_by"] == [
            trail.keys.get("Amara").key_id
        ]
        for entry in (story.contributors[0], story.datasets[0]):
            assert check_of(record_bundle(trail, entry.leaf_hash), reader) == "revoked key"


@pytest.mark.parametrize(("lost", "num_reached"), [(False, 2), (True, 1)])
def test_one_key_takes_along_only_what_it_vouched_for(story: Story, lost: bool, num_reached: int) -> None:
    trail, trust, stolen_us = story.trail, trust_of(story.trail), now_us()
    old = trail.keys.get("Amara").key_id
    rotate(trail, "Amara", lost=lost)
    assert len(revoke(trail, "Amara", reason="stolen", from_us=stolen_us, key_id=old)) == num_reached
    if lost:
        assert verify(record_bundle(trail, give_rows(trail, "Amara").leaf_hash), trust).checks
    else:
        with pytest.raises(SigningKeyError, match="stolen"):
            give_rows(trail, "Amara")


def test_an_operators_revocation_that_reaches_back_over_a_rotation(story: Story) -> None:
    trail, trust, stolen_us = story.trail, trust_of(story.trail), now_us()
    keys = [trail.keys.get("operator").key_id]
    rotate(trail, "operator")
    keys.append(trail.keys.get("operator").key_id)
    _, *revoked = revoke(trail, "operator", reason="stolen", from_us=stolen_us)
    assert [entry.record.body.key_id for entry in revoked] == keys  # type: ignore[union-attr]
    entry = trail.record("approval", ApprovalBody(OTHER, "approved", ""))
    assert verify(record_bundle(trail, entry.leaf_hash), trust_of(trail)).checks
    assert verify(receipt_bundle(trail, story.adapter_receipt), trust_of(trail)).checks, "signed before the theft"
    assert check_of(record_bundle(trail, entry.leaf_hash), trust) == "revoked key", "needs the new trust.json"
