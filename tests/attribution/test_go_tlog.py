"""Go's golang.org/x/mod/sumdb/{note,tlog} verifies our checkpoints, proofs and tiles, and refuses changed ones."""

import shutil
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from attribution.log.note import Checkpoint, sign_checkpoint
from attribution.log.publisher import Publisher
from attribution.trail import Trail
from configs import env
from tests.attribution.story import tell

GOPATH = Path("/usr/share/gocode")
PROGRAM = Path(__file__).with_name("tlog_check.go")

pytestmark = pytest.mark.skipif(
    shutil.which("go") is None or not (GOPATH / "src" / "golang.org" / "x" / "mod").is_dir(),
    reason="needs Debian's golang-go and golang-golang-x-mod-dev",
)


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program, compiled from Debian's sources without a network."""
    folder = tmp_path_factory.mktemp("go")
    go = {
        "GOPATH": str(GOPATH),
        "GO111MODULE": "off",
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
    }
    command = ["go", "build", "-o", str(folder / "check"), str(PROGRAM)]
    subprocess.run(command, check=True, env=env.child_environment(go), timeout=300)
    return folder / "check"


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stranger is handed of a log of 9 entries that had 5 before: keys, checkpoints, proofs, entries, tiles."""
    folder = tmp_path_factory.mktemp("public")
    trail = tell(Trail.open(folder / "home")).trail
    old_size, log = 5, trail.log
    Publisher(log, home=trail.home, out=folder / "tiles").publish()
    texts = log.proofs(range(log.size))
    (folder / "log.vkey").write_text(str(log.key))
    (folder / "checkpoint").write_text(log.checkpoint)
    (folder / "consistency").write_text("\n".join(b64encode(node).decode() for node in log.consistency_path(old_size)))
    for index, text in enumerate(texts):
        (folder / f"proof.{index}").write_text(text)
        (folder / f"entry.{index}").write_text(b64encode(log.leaf(index)).decode())
    older = Checkpoint(log.key.name, old_size, log.root(old_size))
    (folder / "old.checkpoint").write_text(sign_checkpoint(older, trail.keys.get("log")))
    return folder


def check(checker: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(checker), str(folder)], capture_output=True, text=True, check=False, timeout=60)


def test_go_verifies_all_of_it(checker: Path, public: Path) -> None:
    done = check(checker, public)
    assert done.returncode == 0, done.stderr
    assert "9 entries of trailmark.local/" in done.stdout


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("checkpoint", 60, "checkpoint: "),  # in the root
        ("old.checkpoint", 60, "old.checkpoint: "),
        ("consistency", 8, "consistency: "),
        ("proof.4", 40, "inclusion of 4: "),  # in the first hash of the path
        ("entry.2", 30, "inclusion of 2: "),
        ("tiles/tile/0/000.p/9", 30, "tiles: "),
    ],
)
def test_go_refuses_what_was_changed(
    checker: Path, public: Path, tmp_path: Path, name: str, place: int, reason: str
) -> None:
    shutil.copytree(public, tmp_path / "changed")
    path = tmp_path / "changed" / name
    data = path.read_bytes()
    other = b"B" if data[place : place + 1] != b"B" else b"C"  # another base64 digit, so that it still decodes
    path.write_bytes(data[:place] + other + data[place + 1 :])
    done = check(checker, tmp_path / "changed")
    assert done.returncode == 1
    assert done.stderr.startswith(reason), done.stderr
