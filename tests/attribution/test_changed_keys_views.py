"""What reads the log beside its trail goes on after a key was rotated: lineage, fsck, signatures, tiles, appends."""

import json
import threading
from pathlib import Path

import pytest

from attribution import fsck
from attribution.bodies import ApprovalBody
from attribution.key_changes import revoke, rotate
from attribution.keys import SigningKey
from attribution.lineage import Lineage, record_bundle
from attribution.lineage_index import LineageIndex
from attribution.lineage_queries import LineageQueries
from attribution.log.note import open_checkpoint, sign_checkpoint
from attribution.log.publisher import Publisher
from attribution.log.tile_client import TileLog
from attribution.log.tiles import Folder, TilesError
from attribution.log.trust import Trust
from attribution.log.verify import verify_bytes
from attribution.model_signature import ModelSignatureError
from attribution.monitor import watch
from attribution.monitor_sources import TrailSource
from attribution.monitor_state import Memory
from attribution.signed_models import SignedModels, sign
from attribution.trail import Trail
from cluster.processes import wait_until
from serve_apps.adapters import signature_check
from tests.attribution.records_example import add_adapter_directory
from tests.attribution.story import tell

DIGEST = "sha256:" + "ab" * 32


def test_lineage_and_fsck_go_on_after_every_key_was_rotated(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    story = tell(trail)
    lineage, queries = Lineage(trail), LineageQueries.of(trail)
    before = lineage.contributor_names()
    for name in ("Amara", "operator", "log"):
        rotate(trail, name)
    names = lineage.contributor_names()
    assert before.items() <= names.items() and names[trail.keys.get("Amara").key_id] == "Amara"
    assert queries.resolve("Amara").role == "contributor"
    assert lineage.descendants(story.base.leaf_hash)
    assert LineageIndex(trail.home, trail.log.key).check() == []
    report = fsck.check(trail.home)
    assert report.is_sound and report.checked["records"] == trail.log.size


def test_model_signatures_count_across_an_operators_rotation_and_not_after_its_revocation(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    digest = add_adapter_directory(trail, tmp_path / "before", "before")
    sign(trail, digest)
    old_trust = Trust.load(trail.home / "trust.json")
    open_before = SignedModels(trail, old_trust)
    first = open_before.of(digest)
    assert first is not None
    rotate(trail, "operator")
    later = add_adapter_directory(trail, tmp_path / "after", "after")
    sign(trail, later)
    new_trust = Trust.load(trail.home / "trust.json")
    for models in (open_before, SignedModels(trail, old_trust), SignedModels(trail, new_trust)):
        assert models.check(digest, is_required=True) == first
        assert models.check(later, is_required=True) is not None
    (old_key,) = old_trust.keys
    replica = signature_check(trail, "required")
    replica(digest)
    revoke(trail, "operator", reason="leaked", from_us=1, key_id=old_key)
    by_now = SignedModels(trail, Trust.load(trail.home / "trust.json"))
    for models in (open_before, by_now):
        assert models.of(digest) is None, "the revoked key's signature counts no more"
    assert open_before.of(later) is None, "only the revoked key vouches for the next"
    assert by_now.check(later, is_required=True) is not None, "trust.json does"
    replica(later)
    with pytest.raises(ModelSignatureError):
        replica(digest)


def test_static_tiles_are_read_with_the_keys_of_before_and_after(tmp_path: Path) -> None:
    """A reader of files has only trust.json: a tree signed by the former key counts up to its last size."""
    trail = Trail.open(tmp_path / "home")
    tell(trail)
    former = trail.log.key
    Publisher(trail.log, home=trail.home, out=tmp_path / "then").publish()
    rotate(trail, "log")
    trust = Trust.load(trail.home / "trust.json")
    then = TileLog(Folder(tmp_path / "then"), trust.log, former=trust.former_logs)
    assert then.checkpoint.size == 9 and then.entry(8).entry == trail.log.leaf(8)
    with pytest.raises(TilesError, match="no signature by"):
        TileLog(Folder(tmp_path / "then"), trust.log)
    Publisher(trail.log, home=trail.home, out=tmp_path / "now").publish()
    now = TileLog(Folder(tmp_path / "now"), trust.log, former=trust.former_logs)
    assert now.consistency(then.note) and now.entry(9).entry == trail.log.leaf(9)
    trail.record("approval", ApprovalBody(DIGEST, "approved", ""))
    Publisher(trail.log, home=trail.home, out=tmp_path / "now").publish()
    checkpoint = open_checkpoint((tmp_path / "now" / "checkpoint").read_text(), trust.log)
    stolen = SigningKey.load(next((trail.keys.directory / "former").glob("log-*.key")))
    (tmp_path / "now" / "checkpoint").write_text(sign_checkpoint(checkpoint, stolen))
    with pytest.raises(TilesError, match=f"log key {stolen.key_id[:16]} signed checkpoints up to 10 entries, not 11"):
        TileLog(Folder(tmp_path / "now"), trust.log, former=trust.former_logs)
    assert former.public_bytes == stolen.public_bytes


def test_rotations_race_group_commits_and_every_record_verifies(tmp_path: Path) -> None:
    """Threads that append meanwhile share commits; none is signed by a key after its rotation, none is lost."""
    trail = Trail.open(tmp_path / "home")
    stop = threading.Event()
    acknowledged: list[str] = []
    failed: list[Exception] = []

    def append(number: int) -> None:
        opened = trail if number % 2 else Trail.open(trail.home)  # another process's, as far as the log can tell
        try:
            while not stop.is_set():
                acknowledged.append(opened.record("approval", ApprovalBody(DIGEST, "approved", "")).leaf_hash)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name in ("log", "operator", "log"):
            target = len(acknowledged) + 8
            assert wait_until(lambda target=target: len(acknowledged) >= target, timeout_s=60)  # type: ignore[misc]
            rotate(trail, name)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    again = Trail.open(trail.home)
    assert all(again.log.index_of(leaf) is not None for leaf in acknowledged)
    assert len(set(acknowledged)) == len(acknowledged) == again.log.size - 3
    trust = Trust.load(trail.home / "trust.json")
    for leaf in (acknowledged[0], acknowledged[-1]):
        assert verify_bytes(json.dumps(record_bundle(again, leaf)).encode(), trust=trust).kind == "approval"
    assert fsck.check(trail.home).is_sound
    seen = watch(TrailSource(again), Memory(tmp_path / "memory"), trust.history(), trail=again)
    assert seen.violations == [] and seen.size == again.log.size
