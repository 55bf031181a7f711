"""The facade: what a record says of its making, who its parents are, what is refused."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest

from attribution import provenance
from attribution.bodies import ApprovalBody, ContributorBody, PublicationBody
from attribution.records import Artefact, Leaf, RecordError
from attribution.trail import Draft, Trail, TrailError
from configs.schema import Settings
from tests.attribution.story import START_US, tell

DIGEST = "sha256:" + "ab" * 32


def test_the_first_open_makes_a_home_only_its_owner_can_read(tmp_path: Path) -> None:
    with pytest.raises(TrailError, match="holds no trail"):
        Trail.open(tmp_path / "home", create=False)
    trail = Trail.open(tmp_path / "home")
    assert trail.keys.list() == ["log", "operator"]
    assert trail.home.stat().st_mode & 0o077 == 0
    assert list(trail.entries()) == []
    assert Trail.open(tmp_path / "home").log.key == trail.log.key


def test_default_parents(trail: Trail) -> None:
    story = tell(trail)
    assert story.datasets[0].leaf.parents == (story.contributors[0].leaf_hash,)
    assert story.refinement.leaf.parents == tuple(entry.leaf_hash for entry in story.datasets)
    assert story.adapter.leaf.parents == (story.base.leaf_hash, story.refinement.leaf_hash)
    assert story.publication.leaf.parents == (story.adapter.leaf_hash,)
    assert story.completions.leaf.parents == (story.adapter.leaf_hash, story.base.leaf_hash)


def test_a_group_finds_parents_in_itself(trail: Trail) -> None:
    key = trail.keys.create("Chen")
    made = Artefact("prompt", "greeting", DIGEST)
    first, second, third = trail.record_many(
        [
            Draft("contributor", ContributorBody("Chen", key.key_id, key.public_hex), signer=key),
            Draft("approval", ApprovalBody(DIGEST, "approved", "a"), outputs=[made]),
            Draft("approval", ApprovalBody(DIGEST, "approved", "b"), inputs=[made]),
        ]
    )
    assert third.leaf.parents == (second.leaf_hash,)
    assert (first.index, second.index, third.index) == (0, 1, 2)


def test_find_gives_the_newest_maker_and_not_a_publication(trail: Trail) -> None:
    story = tell(trail)
    made = story.adapter.record.outputs[0]  # type: ignore[union-attr]
    assert trail.find(made.digest) == story.adapter
    again = trail.record("adapter", story.adapter.record.body, outputs=[made])  # type: ignore[union-attr]
    assert trail.find(made.digest) == again
    assert Trail.open(trail.home).find(made.digest) == again
    assert trail.find(DIGEST) is None


def test_a_record_says_how_it_was_made(trail: Trail) -> None:
    config = trail.run_config(Settings())
    entry = trail.record("approval", ApprovalBody(DIGEST, "refused", "no"), config=config, seed=3, attempt=2)
    record = entry.record
    assert record is not None
    assert (record.config, record.seed, record.attempt) == (config, 3, 2)
    assert record.code == provenance.code_identity()
    assert record.environment == provenance.environment_digest()
    assert ["pytest", pytest.__version__] in trail.get_json(record.environment)["packages"]
    assert trail.get_json(config)["train"]["learning_rate"] == "0.001"


def test_time_never_runs_backwards(trail: Trail) -> None:
    body = ApprovalBody(DIGEST, "approved", "")
    times = [trail.record("approval", body, time_us=time_us).leaf.time_us for time_us in (START_US, START_US - 5)]
    assert times == [START_US, START_US]
    assert trail.record("approval", body).record.time_us >= START_US  # type: ignore[union-attr]


def test_entries_by_kind_start_and_position(trail: Trail) -> None:
    story = tell(trail)
    assert [entry.index for entry in trail.entries(kind="dataset")] == [2, 4]
    assert next(trail.entries(start=6)) == story.adapter
    assert trail.entry(6) == trail.entry(story.adapter.leaf_hash) == story.adapter
    for text in ("6", story.adapter.leaf_hash[:8], story.adapter.leaf_hash):
        assert trail.leaf_hash(text) == story.adapter.leaf_hash
    for position in (99, -1, "ab" * 32):
        with pytest.raises(TrailError, match="not in the log"):
            trail.entry(position)
    with pytest.raises(TrailError, match="no such leaf"):
        trail.leaf_hash("zzzzzzz")


def test_an_altered_record_is_refused_and_an_erased_one_leaves_its_proof(trail: Trail) -> None:
    story = tell(trail)
    (path,) = (trail.home / "records").iterdir()
    original = path.read_bytes()
    start = original.index(story.adapter.leaf_hash.encode()) + 65
    for position in range(start, original.index(b"\n", start), 97):
        altered = bytearray(original)
        altered[position] ^= 1
        path.write_bytes(bytes(altered))
        with pytest.raises(TrailError, match="altered on disk"):
            trail.entry(story.adapter.leaf_hash)
    path.write_bytes(original)
    assert trail.delete_record(story.adapter.leaf_hash) and not trail.delete_record(story.adapter.leaf_hash)
    erased = trail.entry(story.adapter.leaf_hash)
    assert (erased.record, erased.envelope, erased.salt) == (None, None, None)
    assert trail.proof(story.adapter.leaf_hash)["envelope"] is None
    assert Trail.open(trail.home).find(story.adapter.record.outputs[0].digest) is None  # type: ignore[union-attr]


def test_refusals_leave_the_log_as_it_was(trail: Trail) -> None:
    tell(trail)
    size = trail.log.size
    with pytest.raises(RecordError, match="put the table in the store"):
        trail.record("approval", ApprovalBody(DIGEST, "approved", "x" * 70_000))
    with pytest.raises(TrailError, match="recorded before its child"):
        trail.record("approval", ApprovalBody(DIGEST, "approved", ""), parents=["cd" * 32])
    with pytest.raises(RecordError, match="micro-units"):
        trail.record("publication", PublicationBody("a", 1.5, "adapter", DIGEST))  # type: ignore[arg-type]
    assert trail.log.size == Trail.open(trail.home).log.size == size


def test_threads_of_one_process_append_together(trail: Trail) -> None:
    def append(number: int) -> str:
        return trail.record("approval", ApprovalBody(DIGEST, "approved", str(number))).leaf_hash

    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(append, range(24)))
    assert {entry.leaf_hash for entry in Trail.open(trail.home).entries()} == set(hashes)


def test_private_things_stay_out_of_the_log_directory(trail: Trail) -> None:
    """Neither a digest of rows, prompts or answers nor a key id of a contributor stands in what the log publishes."""
    story = tell(trail)
    public = b"".join(path.read_bytes() for path in (trail.home / "log").iterdir())
    for entry in trail.entries():
        assert entry.record is not None
        for artefact in (*entry.record.inputs, *entry.record.outputs):
            is_public = artefact.kind in ("adapter", "base_model")
            assert (artefact.digest.removeprefix("sha256:").encode() in public) == is_public, artefact
    assert story.contributors[0].record.body.key_id.encode() not in public  # type: ignore[union-attr]
    assert all(
        set(entry.leaf.to_json()) == set(Leaf.from_json(entry.leaf.to_json()).to_json()) for entry in trail.entries()
    )


def test_json_and_tables(trail: Trail) -> None:
    assert trail.get_json(trail.put_json({"b": 1, "a": [0.5]})) == {"a": [0.5], "b": 1}
    table = pyarrow.table({"x": [1, 2], "y": ["a", "b"]})
    assert trail.get_table(trail.put_table(table)).equals(table)
    with pytest.raises(RecordError, match="no canonical JSON"):
        trail.put_json({"x": float("nan")})


def test_provenance_is_stable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    provenance.environment_manifest.cache_clear()  # an earlier test may have put a folder of packages on the path
    manifest = provenance.environment_manifest()
    assert manifest == provenance.environment_manifest.__wrapped__()
    (tmp_path / "New_Package-1.2.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    changed = provenance.environment_manifest.__wrapped__()
    assert changed != manifest and b'["new-package","1.2"]' in changed
    identity = provenance.code_identity.__wrapped__()
    assert len(identity.commit) in (0, 40)
