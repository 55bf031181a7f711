"""What stands on a record that counts for nothing is named, with the key and what to do; a rotated key counts."""

from pathlib import Path

import pytest

from attribution.approvals import Request, decide
from attribution.erasure import erase
from attribution.key_changes import revoke, rotate
from attribution.people import People
from attribution.records import Artefact, Party
from attribution.trail import Trail, now_us
from attribution.void_records import VoidRecordError, require_counting, void_behind, void_record
from tests.attribution.story import Story, tell


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return tell(Trail.open(tmp_path / "home"))


def adapter_of(story: Story) -> Artefact:
    assert story.adapter.record is not None
    return story.adapter.record.outputs[0]


def refusal(story: Story) -> str:
    with pytest.raises(VoidRecordError) as caught:
        require_counting(story.trail, adapter_of(story).digest, to="publish")
    return str(caught.value)


def test_rotated_keys_count(story: Story) -> None:
    for name in ("Amara", "Noor", "operator", "log"):
        rotate(story.trail, name)
    require_counting(story.trail, adapter_of(story).digest, to="publish")
    revoke(story.trail, "Amara", reason="left")
    require_counting(story.trail, adapter_of(story).digest, to="publish")
    people = People(story.trail)
    assert all(void_record(people, entry) is None for entry in story.trail.entries())


def test_rows_of_a_revoked_key_are_named_with_key_and_remedy(story: Story) -> None:
    key_id, dataset = story.trail.keys.get("Amara").key_id, story.datasets[0]
    revoke(story.trail, "Amara", reason="laptop stolen", from_us=dataset.leaf.time_us)
    told = refusal(story)
    assert f"dataset 'Amara-rows' ({dataset.leaf_hash[:12]}) of Amara: signed with key {key_id[:16]}, revoked" in told
    assert "laptop stolen" in told and "rotate 'Amara' --lost" in told and told.endswith("then refine and train again")
    assert "Noor" not in told
    rotate(story.trail, "Amara", lost=True)
    assert "--lost" not in refusal(story), "they have a new key already"


def test_what_a_revoked_operator_signed_is_named_but_not_what_came_before(story: Story) -> None:
    revoke(story.trail, "operator", reason="leaked", from_us=story.adapter.leaf.time_us)
    told = refusal(story)
    assert f"adapter 'support' ({story.adapter.leaf_hash[:12]}) of operator: signed with key" in told
    assert "train again" in told and "refinement" not in told
    base = void_behind(story.trail, [story.base.leaf_hash], People(story.trail))
    assert base == []


def test_an_approval_of_a_revoked_key_is_in_the_way_until_given_again_or_erased(story: Story) -> None:
    trail, request = story.trail, Request("w", "sign-off", (adapter_of(story),))
    stolen_us = now_us()
    given = decide(trail, request, name="Noor", approve=True)
    require_counting(trail, adapter_of(story).digest, to="publish")
    revoke(trail, "Noor", reason="phone lost", from_us=stolen_us)
    told = refusal(story)
    assert f"approval ({given.leaf_hash[:12]}) of Noor" in told and "trailmark approve" in told
    assert "train again" not in told
    rotate(trail, "Noor", lost=True)
    assert "approval" in refusal(story)
    decide(trail, request, name="Noor", approve=True)
    require_counting(trail, adapter_of(story).digest, to="publish")


def test_an_erased_approval_is_not_in_the_way(story: Story) -> None:
    trail, stolen_us = story.trail, now_us()
    given = decide(trail, Request("w", "sign-off", (adapter_of(story),)), name="Noor", approve=True)
    revoke(trail, "Noor", reason="phone lost", from_us=stolen_us)
    party = Party(trail.keys.get("operator").key_id, "operator")
    erase(trail, [given.leaf_hash], reason="stolen", requester=party)
    require_counting(trail, adapter_of(story).digest, to="publish")
