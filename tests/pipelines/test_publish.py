"""Names are given to what this trail made, once and for good."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attribution.bodies import AdapterBody, PublicationBody
from attribution.key_changes import revoke, rotate
from attribution.records import Artefact
from attribution.store import StoreError
from attribution.trail import Trail
from attribution.void_records import VoidRecordError
from cluster.cli import app
from pipelines.contribute import add_contributor, contribute
from pipelines.publish import PublishError, newest_adapter, publish
from tests.pipelines.train.refined import add_refined


def test_versions_count_up_and_resolve(trail: Trail, tmp_path: Path) -> None:
    first = add_refined(trail, tmp_path / "a")
    second = add_refined(trail, tmp_path / "b", [("What is fog?", "Low cloud.")])
    entry = publish(trail, "facts.v-1_x", first, kind="refined")
    publish(trail, "facts.v-1_x", second, kind="refined")
    assert entry.record is not None
    assert entry.record.body == PublicationBody("facts.v-1_x", 1, "refined", first)
    assert trail.registry.resolve("facts.v-1_x").digest == second
    assert trail.registry.resolve("facts.v-1_x@1").digest == first
    made_by = trail.find(first)
    assert made_by is not None and entry.leaf.parents == (made_by.leaf_hash,)


@pytest.mark.parametrize("name", ["Facts", "a b", "a@1", "", ".hidden", "a/b", "-a", "a" * 129, "caf\u00e9"])
def test_bad_names_are_refused(trail: Trail, tmp_path: Path, name: str) -> None:
    digest = add_refined(trail, tmp_path / "a")
    with pytest.raises(PublishError, match="use a-z, 0-9"):
        publish(trail, name, digest, kind="refined")


def test_unknown_digest_and_wrong_kind_are_refused(trail: Trail, tmp_path: Path) -> None:
    digest = add_refined(trail, tmp_path / "a")
    with pytest.raises(PublishError, match="no record of this trail made it"):
        publish(trail, "facts", "sha256:" + "0" * 64)
    with pytest.raises(PublishError, match="write sha256:"):
        publish(trail, "facts", "facts")
    with pytest.raises(PublishError, match="it is of kind 'refined', not 'adapter'; pass --kind refined"):
        publish(trail, "facts", digest)
    assert trail.registry.list() == []


def test_altered_artefact_is_not_published(trail: Trail, tmp_path: Path) -> None:
    digest = add_refined(trail, tmp_path / "a")
    rows = trail.store.path_of(digest) / "rows.parquet"
    rows.write_bytes(rows.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreError, match=r"rows\.parquet"):
        publish(trail, "facts", digest, kind="refined")


def test_two_homes_handles_never_share_a_version(trail: Trail, tmp_path: Path) -> None:
    digest = add_refined(trail, tmp_path / "a")
    other = Trail.open(trail.home)
    assert other.registry.next_version("facts") == trail.registry.next_version("facts") == 1
    publish(trail, "facts", digest, kind="refined")
    entry = publish(other, "facts", digest, kind="refined")
    assert entry.record is not None and isinstance(entry.record.body, PublicationBody)
    assert entry.record.body.version == 2
    assert entry.record.outputs == (Artefact("refined", "facts", digest),)


def add_adapter(trail: Trail, name: str, weights: bytes, *, inputs: Sequence[Artefact] = ()) -> str:
    """Record a blob as the adapter that training under `name` made; return its digest."""
    digest = trail.store.put_blob(weights)
    body = AdapterBody(name, digest, digest, 8, 16, ("q_proj",), 1, 1, 0, 0, digest)
    trail.record("adapter", body, inputs=inputs, outputs=(Artefact("adapter", name, digest),))
    return digest


def test_without_digest_the_newest_adapter_of_that_name_is_published(
    trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PublishError, match="no adapter was trained under it; trained: none yet"):
        newest_adapter(trail, "facts")
    add_adapter(trail, "facts", b"first")
    second = add_adapter(trail, "facts", b"second")
    add_adapter(trail, "manners", b"third")
    monkeypatch.setenv("TRAILMARK_HOME", str(trail.home))
    outcome = CliRunner().invoke(app, ["publish", "facts"], catch_exceptions=False)
    assert outcome.exit_code == 0 and f"facts@1 is {second}" in outcome.output
    assert trail.registry.resolve("facts").digest == second
    with pytest.raises(PublishError, match="'fatcs': no adapter was trained under it; trained: facts, manners"):
        CliRunner().invoke(app, ["publish", "fatcs"], catch_exceptions=False)
    with pytest.raises(PublishError, match="only an adapter's digest is found by NAME"):
        CliRunner().invoke(app, ["publish", "facts", "--kind", "refined"], catch_exceptions=False)


def test_an_adapter_of_revoked_rows_is_not_published_until_trained_again(trail: Trail, tmp_path: Path) -> None:
    add_contributor(trail, "ana")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who is Ana?", "completion": "Ana is a contributor."}\n')
    given = contribute(trail, tmp_path / "rows.jsonl", contributor="ana", licence="MIT").entry
    refined = Artefact("refined", "facts", add_refined(trail, tmp_path / "refined", parents=[given.leaf_hash]))
    first = add_adapter(trail, "facts", b"first", inputs=[refined])
    publish(trail, "facts", first)
    rotate(trail, "ana")
    publish(trail, "facts", first)
    revoke(trail, "ana", reason="laptop stolen", from_us=given.leaf.time_us)
    size = trail.log.size
    with pytest.raises(VoidRecordError, match=r"cannot publish sha256:.*\ndataset .* of ana: .* \(laptop stolen\)"):
        publish(trail, "facts", first)
    with pytest.raises(VoidRecordError):
        publish(trail, "rows", refined.digest, kind="refined")
    assert trail.log.size == size
    second = add_adapter(trail, "facts", b"second")
    assert trail.registry.resolve("facts").version == 2
    publish(trail, "facts", second)
    assert trail.registry.resolve("facts").digest == second
