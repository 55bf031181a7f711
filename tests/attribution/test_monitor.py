"""The monitor: a sound log holds; each promise broken is caught under its own name."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from attribution.bodies import ApprovalBody, KeyRevocationBody, PublicationBody
from attribution.erasure import erase, redactions
from attribution.key_changes import revoke, rotate
from attribution.keys import SigningKey
from attribution.lineage import Lineage
from attribution.log.trust import Trust, trust_bytes
from attribution.monitor import Report, watch
from attribution.monitor_sources import TrailSource, UrlSource, tile_path
from attribution.monitor_state import Memory
from attribution.monitor_views import check_views
from attribution.private_records import segments
from attribution.receipt_index import ReceiptIndex
from attribution.receipts import recent_receipts
from attribution.records import Leaf, Party
from attribution.registry import Registry
from attribution.search_index import SearchIndex
from attribution.trail import Draft, Trail, now_us
from cluster import cli
from cluster.state import ClusterState, save_state
from configs.errors import UserError
from tests.attribution.story import Story, tell

OTHER = "sha256:" + "0" * 64


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return tell(Trail.open(tmp_path / "home"))


def look(trail: Trail, folder: Path, *, full: bool = False) -> Report:
    """One run over a home, opened anew as a monitor opens it, views included."""
    trail = Trail.open(trail.home)
    trust = Trust.load(trail.home / "trust.json")
    report = watch(TrailSource(trail), Memory(folder), trust.history(), trail=trail, full=full)
    if report.size:
        check_views(trail, report)
    return report


def checks(report: Report) -> set[str]:
    return {item.check for item in report.violations}


def approve(trail: Trail, **fields: Any) -> Draft:
    return Draft("approval", ApprovalBody(OTHER, "approved", ""), **fields)


def bypass(trail: Trail, *drafts: Draft) -> None:
    """Append what the trail would refuse, as a program without its checks would."""
    with (
        mock.patch.object(trail._makers.key_changes, "require_usable"),
        mock.patch.object(Registry, "require_free"),
    ):
        trail.record_many(drafts)


def append_leaf(trail: Trail, change: Callable[[Leaf], Leaf]) -> None:
    """Append the newest entry again with an altered header."""
    entry = trail.entry(trail.log.size - 1)
    leaf = change(entry.leaf)
    private = trail.private.read(entry.index, entry.leaf_hash)
    assert private is not None
    with trail.log.exclusive() as appender:
        known = [trail.log.leaf_hash(index) for index in range(trail.log.size)]
        trail.private.append(trail.log.size, [(leaf.leaf_hash, private)], is_logged=known.__contains__)
        appender.append([leaf.to_bytes()])


def test_a_sound_log_holds_and_only_what_is_new_is_read_again(story: Story, tmp_path: Path) -> None:
    trail = story.trail
    recent_receipts(trail)
    first = look(trail, tmp_path / "state")
    assert first.violations == [] and first.first == 0
    assert (first.checked["leaf"], first.checked["signature"], first.checked["view receipts"]) == (9, 9, 5)
    trail.record_many([approve(trail)])
    second = look(trail, tmp_path / "state")
    assert (second.first, second.size, second.checked["leaf"], second.checked["signature"]) == (9, 10, 1, 1)
    assert look(trail, tmp_path / "state", full=True).checked["signature"] == 10
    assert second.violations == []


def test_changed_keys_and_explained_holes_hold_too(story: Story, tmp_path: Path) -> None:
    trail = story.trail
    for name in ("Amara", "operator", "log"):
        rotate(trail, name)
    revoke(trail, "Noor", reason="left")
    revoke(trail, "log", reason="leaked")
    rotate(trail, "Noor", lost=True)
    erase(trail, [story.datasets[0].leaf_hash], reason="x", requester=Party(trail.keys.get("operator").key_id, "r"))
    for _ in range(2):
        report = look(trail, tmp_path / "state")
        assert report.violations == [], report.violations
    assert look(trail, tmp_path / "other").violations == []


@pytest.mark.parametrize(("name", "num_void"), [("operator", 2), ("Amara", 1)])
def test_a_rotation_that_a_revocation_reaches_back_over_is_void_and_no_fault(
    story: Story, tmp_path: Path, name: str, num_void: int
) -> None:
    """`verify` takes such a rotation as void too; what its new key signed stays a fault."""
    trail, stolen_us = story.trail, now_us()
    rotate(trail, name)
    revoke(trail, name, reason="stolen", from_us=stolen_us)
    for _ in range(2):
        report = look(trail, tmp_path / "state", full=True)
        assert report.violations == []
        assert [(item.check, item.index) for item in report.void] == [("key_rotation", 9 + n) for n in range(num_void)]
        assert all("at or after its revocation: stolen" in item.detail for item in report.void)
    arguments = ["monitor", "--dir", str(trail.home), "--state", str(tmp_path / "state"), "--no-views"]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 0 and "HOLDS" in told.output
    assert told.output.count("void  entry") == num_void and "; it counts for nothing" in told.output


def test_what_the_key_of_a_void_rotation_signed_is_at_fault(story: Story, tmp_path: Path) -> None:
    trail, stolen_us = story.trail, now_us()
    rotate(trail, "operator")
    late = trail.record_many([approve(trail)])[0]
    revoke(trail, "operator", reason="stolen", from_us=stolen_us)
    found = look(trail, tmp_path / "state").violations
    assert [(item.check, item.index) for item in found] == [("revoked key", late.index)]


def test_a_key_revoked_from_before_its_person_joined_is_void_with_its_record(story: Story, tmp_path: Path) -> None:
    trail = story.trail
    revoke(trail, "Amara", reason="stolen", from_us=1)
    report = look(trail, tmp_path / "state")
    assert [(item.check, item.index) for item in report.void] == [("contributor", story.contributors[0].index)]
    assert {item.index for item in report.violations} == {story.datasets[0].index}, "her rows are at fault"


def _time(story: Story) -> None:
    append_leaf(story.trail, lambda leaf: replace(leaf, time_us=leaf.time_us - 1))


def _unknown_parent(story: Story) -> None:
    append_leaf(story.trail, lambda leaf: replace(leaf, parents=("ab" * 32,)))


def _from_nothing(story: Story) -> None:
    bypass(story.trail, Draft("adapter", story.adapter.record.body, parents=[]))  # type: ignore[union-attr]


def _unjoined_input(story: Story) -> None:
    record = story.adapter.record
    assert record is not None
    bypass(story.trail, Draft("adapter", record.body, inputs=record.inputs, parents=[story.base.leaf_hash]))


def _unknown_signer(story: Story) -> None:
    bypass(story.trail, approve(story.trail, signer=SigningKey.generate("stranger")))


def _contributor_as_operator(story: Story) -> None:
    body = PublicationBody("taken", 1, "adapter", OTHER)
    bypass(story.trail, Draft("publication", body, signer=story.trail.keys.get("Amara")))


def _rotated_signer(story: Story) -> None:
    old = story.trail.keys.get("operator")
    rotate(story.trail, "operator")
    bypass(story.trail, approve(story.trail, signer=old))


def _revoked_signer(story: Story) -> None:
    key = story.trail.keys.get("Amara")
    revoke(story.trail, "Amara", reason="stolen")
    bypass(story.trail, Draft("dataset", story.datasets[0].record.body, signer=key))  # type: ignore[union-attr]


def _reaching_back(story: Story) -> None:
    revoke(story.trail, "Amara", reason="stolen", from_us=story.datasets[0].leaf.time_us)


def _stolen_rotation(story: Story) -> None:
    thief, rotation = SigningKey.generate("thief"), rotate(story.trail, "Amara").record
    body: Any = replace(rotation.body, key_id=thief.key_id, public_key=thief.public_hex)  # type: ignore[union-attr]
    bypass(story.trail, Draft("key_rotation", body, signer=thief))


def _altered_record(story: Story) -> None:
    (path,) = segments(story.trail.home / "records")
    data = bytearray(path.read_bytes())
    digit = data.index(b'"salt":"', data.index(story.adapter.leaf_hash.encode())) + len(b'"salt":"')
    data[digit : digit + 1] = b"1" if data[digit : digit + 1] == b"0" else b"0"
    path.write_bytes(data)


def _unexplained_hole(story: Story) -> None:
    story.trail.delete_record(story.refinement.leaf_hash)


def _lost_redaction(story: Story) -> None:
    trail = story.trail
    party = Party(trail.keys.get("operator").key_id, "r")
    (redaction,) = erase(trail, [story.datasets[0].leaf_hash], reason="x", requester=party)
    trail.delete_record(redaction.leaf_hash)


def _unfinished_erasure(story: Story) -> None:
    trail = story.trail
    trail.record_many(redactions(trail, [story.datasets[0].leaf_hash], reason="x", parties=[]))


def _name_taken_twice(story: Story) -> None:
    body = PublicationBody("support", 1, "adapter", OTHER)
    bypass(story.trail, Draft("publication", body, parents=[story.adapter.leaf_hash]))


def _garbage_leaf(story: Story) -> None:
    with story.trail.log.exclusive() as appender:
        appender.append([b'{"kind":"nothing"}'])


def _forgotten_revocation(story: Story) -> None:
    key = story.trail.keys.get("Amara")
    body = KeyRevocationBody("Amara", "contributor", key.key_id, 2**52, "not in trust.json")
    story.trail.record("key_revocation", body)


def _lost_receipt(story: Story) -> None:
    with ReceiptIndex(story.trail)._view.open() as database:
        database.execute("DELETE FROM receipts WHERE inner_index = 0")


def _moved_receipt(story: Story) -> None:
    with ReceiptIndex(story.trail)._view.open() as database:
        database.execute("UPDATE receipts SET inner_index = 3 WHERE inner_index = 4")


def _search(story: Story) -> SearchIndex:
    return SearchIndex(story.trail, Lineage(story.trail))


def _lost_search_rows(story: Story) -> None:
    with _search(story)._view.open() as database:
        database.execute("DELETE FROM record WHERE log_index > 3")


def _other_words(story: Story) -> None:
    with _search(story)._view.open() as database:
        database.execute("UPDATE content SET text = 'nothing' WHERE rowid = 4")


def _unfound_words(story: Story) -> None:
    """The text stands, but the index of its words does not have it."""
    with _search(story)._view.open() as database:
        database.execute("DELETE FROM content_data WHERE id = (SELECT max(id) FROM content_data)")


def _invented_revocation(story: Story) -> None:
    path = story.trail.home / "trust.json"
    entry = {"key_id": "ab" * 32, "from_us": 5, "reason": "nobody said so"}
    path.write_bytes(trust_bytes({**json.loads(path.read_text()), "revoked": [entry]}))


def _longer_log_key(story: Story) -> None:
    rotate(story.trail, "log")
    path = story.trail.home / "trust.json"
    value = json.loads(path.read_text())
    value["former"][0]["last_size"] += 1
    path.write_bytes(trust_bytes(value))


TAMPERINGS = [
    (_time, "time"),
    (_unknown_parent, "parents"),
    (_from_nothing, "inputs"),
    (_unjoined_input, "inputs"),
    (_unknown_signer, "signature"),
    (_contributor_as_operator, "signature"),
    (_rotated_signer, "rotated key"),
    (_revoked_signer, "revoked key"),
    (_reaching_back, "revoked key"),
    (_stolen_rotation, "key rotation"),
    (_altered_record, "commitment"),
    (_unexplained_hole, "missing"),
    (_lost_redaction, "missing"),
    (_unfinished_erasure, "erasure"),
    (_name_taken_twice, "registry"),
    (_forgotten_revocation, "view trust"),
    (_lost_receipt, "view receipts"),
    (_moved_receipt, "view receipts"),
    (_lost_search_rows, "view search"),
    (_other_words, "view search"),
    (_unfound_words, "view search"),
    (_invented_revocation, "view trust"),
    (_longer_log_key, "view trust"),
]


@pytest.mark.parametrize(("tamper", "check"), TAMPERINGS, ids=lambda part: getattr(part, "__name__", part))
def test_each_broken_promise_is_caught_by_name(
    story: Story, tmp_path: Path, tamper: Callable[[Story], None], check: str
) -> None:
    before = look(story.trail, tmp_path / "state")
    assert before.violations == []
    tamper(story)
    caught = look(story.trail, tmp_path / "state", full=True)
    assert check in checks(caught), caught.violations
    again = look(story.trail, tmp_path / "state")
    assert check in checks(again), "what is at fault stays at fault in later runs"


def test_each_view_is_said_to_be_compared_or_not(story: Story, tmp_path: Path) -> None:
    trail = story.trail
    views = look(trail, tmp_path / "state").views
    assert list(views) == ["registry", "trust", "receipts", "lineage", "search", "mlflow"]
    assert {name for name, told in views.items() if told == "equals the log"} == {"registry", "trust"}
    assert all(told.startswith("not compared: ") for name, told in views.items() if name not in ("registry", "trust"))
    recent_receipts(trail)
    assert _search(story).find("Amara")
    views = look(trail, tmp_path / "state").views
    assert [name for name, told in views.items() if told != "equals the log"] == ["mlflow"]
    _lost_search_rows(story)
    assert look(trail, tmp_path / "state").views["search"].startswith("differs from the log")


def test_a_name_that_was_erased_leaves_the_search_index(story: Story, tmp_path: Path) -> None:
    trail = story.trail
    assert len(_search(story).find("Amara")) > 1
    party = Party(trail.keys.get("operator").key_id, "r")
    erase(trail, [story.contributors[0].leaf_hash], reason="x", requester=party)
    report = look(trail, tmp_path / "state")
    assert report.views["search"] == "equals the log", report.violations


def test_a_mlflow_that_does_not_answer_is_told(story: Story, tmp_path: Path) -> None:
    save_state(story.trail.home, ClusterState("none", mlflow_url="http://127.0.0.1:9"))
    arguments = ["monitor", "--dir", str(story.trail.home), "--state", str(tmp_path / "state")]
    told = CliRunner().invoke(cli.app, arguments).output
    assert "HOLDS" in told and "??  view mlflow    not compared: http://127.0.0.1:9 does not answer" in told, told
    assert "ok  view registry  equals the log" in told
    assert (
        "??  view all       not compared: --no-views" in CliRunner().invoke(cli.app, [*arguments, "--no-views"]).output
    )


def test_a_leaf_that_is_none_is_caught(story: Story, tmp_path: Path) -> None:
    trust = Trust.load(story.trail.home / "trust.json")
    _garbage_leaf(story)
    report = watch(TrailSource(story.trail), Memory(tmp_path / "state"), trust.history())
    assert [(item.check, item.index) for item in report.violations] == [("leaf", 9)]


def test_a_rollback_and_a_fork_are_caught_though_the_log_key_signed_both(story: Story, tmp_path: Path) -> None:
    trail, state = story.trail, tmp_path / "state"
    saved = tmp_path / "saved"
    shutil.copytree(trail.home, saved)
    trail.record_many([approve(trail)])
    assert look(trail, state).violations == []
    older = Trail.open(saved)
    assert checks(look(older, state)) == {"rollback"}
    older.record_many([approve(older, seed=7)])
    assert checks(look(older, state)) == {"fork"}
    older.record_many([approve(older, seed=8)])
    forked = look(older, state)
    assert checks(forked) == {"fork"}
    assert any(item.index == 9 for item in forked.violations), "it names the entry that was another one"
    assert look(trail, state).violations == [], "the memory did not move"


def test_another_log_and_a_damaged_memory_are_refused(story: Story, tmp_path: Path) -> None:
    look(story.trail, tmp_path / "state")
    other = Trail.open(tmp_path / "other")
    other.record_many([approve(other)])
    assert checks(look(other, tmp_path / "state")) == {"consistency"}
    (tmp_path / "state" / "leaves.bin").write_bytes(bytes(32 * 9))
    with pytest.raises(UserError, match="does not match"):
        Memory(tmp_path / "state")


@pytest.fixture
def tiles(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which a plain web server shows it."""
    folder = tmp_path / "tiles"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def publish_tiles(trail: Trail, folder: Path) -> None:
    """Write checkpoint and entry bundles as tlog-tiles names them."""
    leaves = list(trail.log.leaves(0, trail.log.size))
    for first in range(0, len(leaves), 256):
        bundle = leaves[first : first + 256]
        name = tile_path(first // 256) + ("" if len(bundle) == 256 else f".p/{len(bundle)}")
        path = folder / "tile" / "entries" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(len(leaf).to_bytes(2, "big") + leaf for leaf in bundle))
    (folder / "checkpoint").write_text(trail.log.checkpoint)


def test_a_log_is_watched_over_http_by_its_tiles(story: Story, tmp_path: Path, tiles: tuple[Path, str]) -> None:
    trail, (folder, url) = story.trail, tiles
    trust, state = Trust.load(trail.home / "trust.json"), tmp_path / "state"
    publish_tiles(trail, folder)
    assert watch(UrlSource(url), Memory(state), trust.history()).violations == []
    trail.record_many([approve(trail, seed=number) for number in range(260)])
    publish_tiles(trail, folder)
    report = watch(UrlSource(url), Memory(state), trust.history())
    assert (report.violations, report.checked["leaf"], report.size) == ([], 260, 269)
    bundle = folder / "tile" / "entries" / "001.p" / "13"
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[:-1])
    assert checks(watch(UrlSource(url), Memory(tmp_path / "new"), trust.history())) == {"hashes"}
    bundle.write_bytes(whole.replace(b'"kind":"approval"', b'"kind":"approvaL"', 1))
    assert "hashes" in checks(watch(UrlSource(url), Memory(tmp_path / "new"), trust.history()))
    (folder / "checkpoint").write_text((folder / "checkpoint").read_text().replace("269", "270", 1))
    assert checks(watch(UrlSource(url), Memory(tmp_path / "new"), trust.history())) == {"checkpoint"}
    (folder / "checkpoint").unlink()
    assert checks(watch(UrlSource(url), Memory(state), trust.history())) == {"checkpoint"}


def test_tile_paths() -> None:
    assert [tile_path(number) for number in (0, 67, 1000, 1_234_067)] == ["000", "067", "x001/000", "x001/x234/067"]


def test_the_memory_is_json_and_hashes(story: Story, tmp_path: Path) -> None:
    look(story.trail, tmp_path / "state")
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    assert state["size"] == 9 and (tmp_path / "state" / "leaves.bin").stat().st_size == 9 * 32
