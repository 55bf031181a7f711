"""fsck finds whatever is damaged, says where, and repairs nothing but what a crash left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attribution import fsck
from attribution.bodies import RedactionBody
from attribution.log.merkle import hash_leaf, hash_node
from attribution.trail import Trail
from cluster.cli import app
from configs import env
from tests.attribution.story import Story, tell
from tests.attribution.test_sequencer import append, corrupt


@pytest.fixture
def story(trail: Trail) -> Story:
    return tell(trail)


def findings(home: Path) -> list[str]:
    return [f"{Path(item.where).name}: {item.what}" for item in fsck.check(home).damage]


def test_a_sound_home_says_what_was_checked(story: Story) -> None:
    report = fsck.check(story.trail.home)
    assert (report.damage, report.leftovers) == ([], [])
    assert report.checked["entries"] == report.checked["records"] == story.trail.log.size
    assert report.checked["blobs"] == len(list((story.trail.home / "store" / "blobs").glob("??/*")))
    assert fsck.repair(story.trail.home) == []


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "leaf": (lambda home: corrupt(home / "log" / "entries.bin", 40), "do not lead to the root"),
    "short": (lambda home: os.truncate(home / "log" / "entries.bin", 900), "but the checkpoint covers"),
    "signature": (lambda home: rewrite(home / "log" / "checkpoint", lambda b: b[:-9] + b"AAAAAAA=\n"), "checkpoint: "),
    "gone": (lambda home: (home / "log" / "checkpoint").unlink(), "checkpoint: No such file"),
    "record": (lambda home: corrupt(next((home / "records").iterdir()), 300), "the record of leaf"),
    "lost record": (
        lambda home: rewrite(next((home / "records").iterdir()), lambda b: b.partition(b"\n")[2]),
        "is gone, and no redaction says why",
    ),
    "stray record": (
        lambda home: rewrite(next((home / "records").iterdir()), lambda b: b"ef" * 32 + b" {}\n" + b),
        "line 1 belongs to no entry",
    ),
    "blob": (lambda home: corrupt(next((home / "store" / "blobs").glob("??/*")), 0), "its bytes have the digest"),
    "writer": (lambda home: (home / "log" / "writer.json").write_text("[]") and None, "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_never_touched(story: Story, name: str) -> None:
    home, (do_damage, expected) = story.trail.home, DAMAGE[name]
    do_damage(home)
    found = findings(home)
    assert any(expected in finding for finding in found), found
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    done = CliRunner().invoke(app, ["fsck", "--repair"], env={"TRAILMARK_HOME": str(home)})
    assert done.exit_code == 1 and "DAMAGE" in done.stdout, done.output
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_every_damaged_byte_of_the_log_is_noticed(trail: Trail, tmp_path: Path) -> None:
    for number in range(2):
        append(trail, number)
    for path in ("log/entries.bin", "log/checkpoint"):
        for position in range(0, (trail.home / path).stat().st_size, 7):
            copy = tmp_path / "copy"
            shutil.copytree(trail.home, copy)
            corrupt(copy / path, position)
            assert fsck.check(copy, with_store=False).damage, f"{path}, byte {position}"
            shutil.rmtree(copy)


def test_a_record_whose_redaction_is_logged_is_no_damage(story: Story) -> None:
    trail, leaf_hash = story.trail, story.datasets[0].leaf_hash
    trail.delete_record(leaf_hash)
    assert "no redaction" in findings(trail.home)[0]
    trail.record("redaction", RedactionBody(leaf_hash, "asked for"))
    assert findings(trail.home) == []


def test_what_a_crash_left_is_told_and_repaired(story: Story) -> None:
    home = story.trail.home
    old = (home / "log" / "checkpoint").read_bytes()
    append(story.trail, "durable, but its checkpoint was lost")
    (home / "log" / "checkpoint").write_bytes(old)
    with (home / "log" / "entries.bin").open("ab") as file:
        file.write(b"\x01\x09torn")
    with next((home / "records").iterdir()).open("ab") as file:
        file.write(b"ef" * 32 + b' {"never":"logged"}\n')
    (home / "log" / ".checkpoint-0123").write_bytes(bytes(4096))
    report = fsck.check(home)
    assert report.is_sound and len(report.leftovers) == 3
    assert len(fsck.repair(home)) == 4
    report = fsck.check(home)
    assert (report.damage, report.leftovers) == ([], [])
    assert report.checked["entries"] == story.trail.log.size
    assert fsck.repair(home) == []


def test_tiles_are_checked_against_the_log(trail: Trail) -> None:
    for number in range(3):
        append(trail, number)
    leaves = list(trail.log.leaves(0, 3))
    hashes = [hash_leaf(leaf) for leaf in leaves]
    bundle = b"".join(len(leaf).to_bytes(2, "big") + leaf for leaf in leaves)
    for name, data in (
        ("0/000.p/3", b"".join(hashes)),
        ("0/000.p/2", b"".join(hashes[:2])),
        ("entries/000.p/3", bundle),
    ):
        path = trail.home / "tiles" / "tile" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert findings(trail.home) == []
    corrupt(trail.home / "tiles" / "tile" / "0/000.p/3", 40)
    corrupt(trail.home / "tiles" / "tile" / "entries/000.p/3", 9)
    (trail.home / "tiles" / "tile" / "0" / "000.p" / "4").write_bytes(b"".join(hashes) + hash_node(*hashes[:2]))
    assert findings(trail.home) == [
        "3: is not what the log says",
        "4: holds more than the signed checkpoint covers",
        "3: is not what the log says",
    ]


def test_the_command_says_it_in_words_and_in_json(
    story: Story, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(env, "home", lambda: story.trail.home)
    done = CliRunner().invoke(app, ["fsck"])
    assert done.exit_code == 0 and f"SOUND  {story.trail.log.size} entries" in done.stdout
    done = CliRunner().invoke(app, ["fsck", "--json", "--no-store"])
    assert json.loads(done.stdout)["sound"] is True and "blobs" not in json.loads(done.stdout)["checked"]
    monkeypatch.setattr(env, "home", lambda: tmp_path / "nothing")
    with pytest.raises(fsck.FsckError, match="holds no trail"):
        CliRunner().invoke(app, ["fsck"], catch_exceptions=False)
