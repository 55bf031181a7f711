"""Static tiles: the specification's paths and examples, any growth against the tree in memory, damage, and crashes."""

import gzip
import random
import shutil
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from attribution.log.merkle import Tree, hash_leaf
from attribution.log.note import Checkpoint, sign_checkpoint
from attribution.log.proof import parse_proof
from attribution.log.tile_client import Address, TileLog, source_of
from attribution.log.tiles import Folder, TilesError, TileWriter, rebuilt, tile_path
from tests.attribution.witnessed import LOG, LOG_KEY, ORIGIN

STEPS = (1, 3, 251, 1, 0, 256, 300, 65_200, 1, 700)


def entry(index: int) -> bytes:
    return b"entry %d" % index * (index % 3 + 1)


def checkpoint_of(tree: Tree) -> str:
    return sign_checkpoint(Checkpoint(ORIGIN, tree.size, tree.root()), LOG)


def grow(root: Path, tree: Tree, size: int) -> str:
    """Extend tree and tiles to `size` leaves with a fresh writer, and return the checkpoint published."""
    writer, new = TileWriter(root), [entry(index) for index in range(tree.size, size)]
    for data in new:
        tree.append(hash_leaf(data))
    writer.extend(new)
    note = checkpoint_of(tree)
    writer.publish(note)
    return note


def files(root: Path) -> dict[str, str]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree, list[str]]:
    """A log that grew in uneven steps past 65,536 leaves, and every checkpoint on the way."""
    root, tree = tmp_path_factory.mktemp("tiles") / "t", Tree()
    notes = [grow(root, tree, tree.size + step) for step in STEPS]
    return root, tree, notes


def test_the_specifications_paths() -> None:
    assert tile_path(0, 1_234_067) == "tile/0/x001/x234/067"
    assert tile_path(63, 7, 255) == "tile/63/007.p/255"
    assert tile_path("entries", 1000) == "tile/entries/x001/000"
    assert [tile_path(1, index) for index in (0, 999)] == ["tile/1/000", "tile/1/999"]


def test_the_specifications_example_of_70_000_leaves(tmp_path: Path) -> None:
    grow(tmp_path, Tree(), 70_000)
    names = files(tmp_path)
    assert len([name for name in names if name.startswith("tile/0/") and ".p/" not in name]) == 273
    assert {name for name in names if ".p/" in name} == {
        "tile/0/273.p/112",
        "tile/1/001.p/17",
        "tile/2/000.p/1",
        "tile/entries/273.p/112",
    }
    assert "tile/1/000" in names
    assert {(tmp_path / name).stat().st_size for name in names if name.startswith("tile/0/0")} == {8192}


def test_256_leaves_fill_one_tile(tmp_path: Path) -> None:
    grow(tmp_path, Tree(), 256)
    assert set(files(tmp_path)) == {"checkpoint", "tile/0/000", "tile/entries/000", "tile/1/000.p/1"}


def test_growth_in_steps_is_the_tree_in_memory(grown: tuple[Path, Tree, list[str]], tmp_path: Path) -> None:
    root, tree, notes = grown
    log, chance = TileLog(Folder(root), LOG_KEY), random.Random(3)
    assert (log.checkpoint.size, log.checkpoint.root) == (tree.size, tree.root())
    for index in [0, 255, 256, 65_535, 65_536, tree.size - 1, *chance.sample(range(tree.size), 40)]:
        found = log.entry(index)
        assert found.entry == entry(index)
        proof = parse_proof(found.proof)
        assert list(proof.path) == tree.inclusion_path(index)
        proof.include(hash_leaf(found.entry), proof.open(LOG_KEY))
    for note in notes:
        log.consistency(note)
    once = tmp_path / "once"
    grow(once, Tree(), tree.size)
    wanted = files(once)
    kept = {name: digest for name, digest in files(root).items() if name in wanted}
    assert kept == wanted, "one step or ten: the same files, but for partial tiles of checkpoints in between"


def test_every_published_checkpoint_keeps_its_tiles(tmp_path: Path) -> None:
    """Somebody who holds an older checkpoint can still read the tree under it."""
    tree, notes = Tree(), []
    for step in (3, 4, 200, 60, 300):
        notes.append(grow(tmp_path, tree, tree.size + step))
    current = (tmp_path / "checkpoint").read_text()
    for note in notes:
        (tmp_path / "checkpoint").write_text(note)
        log = TileLog(Folder(tmp_path), LOG_KEY)
        assert log.entry(log.checkpoint.size - 1).entry == entry(log.checkpoint.size - 1)
    (tmp_path / "checkpoint").write_text(current)


def test_a_crash_before_the_checkpoint_shows_the_tree_before(tmp_path: Path) -> None:
    tree = Tree()
    grow(tmp_path, tree, 300)
    before = (tmp_path / "checkpoint").read_text()
    writer = TileWriter(tmp_path)
    writer.extend([entry(index) for index in range(300, 900)])  # and the process ends here
    (tmp_path / "tile" / "0" / "002").write_bytes(b"torn")  # what a power cut may leave of a file nobody was told of
    log = TileLog(Folder(tmp_path), LOG_KEY)
    assert log.note == before
    assert log.entry(299).entry == entry(299)
    grow(tmp_path, tree, 900)
    log = TileLog(Folder(tmp_path), LOG_KEY)
    assert [log.entry(index).entry for index in (299, 600, 899)] == [entry(index) for index in (299, 600, 899)]


def test_a_forked_or_shrunken_log_is_not_published(tmp_path: Path) -> None:
    tree = Tree()
    grow(tmp_path, tree, 300)
    forked = Tree(hash_leaf(entry(index) if index != 7 else b"other") for index in range(310))
    writer = TileWriter(tmp_path)
    writer.extend([entry(index) for index in range(300, 310)])
    with pytest.raises(TilesError, match="do not continue the tree published before"):
        writer.publish(checkpoint_of(forked))
    with pytest.raises(TilesError, match="hold 300 leaves"):
        TileWriter(tmp_path).publish(checkpoint_of(Tree(hash_leaf(entry(index)) for index in range(299))))
    elsewhere = sign_checkpoint(Checkpoint("other.test", 300, tree.root()), LOG)
    with pytest.raises(TilesError, match="not what the checkpoint says"):
        TileWriter(tmp_path).publish(elsewhere)
    assert TileLog(Folder(tmp_path), LOG_KEY).checkpoint.size == 300


def test_the_reader_notices_another_history(tmp_path: Path) -> None:
    tree, other = Tree(), tmp_path / "other"
    old = grow(tmp_path / "a", tree, 300)
    forked = Tree(hash_leaf(entry(index)) for index in range(299))
    forked.append(hash_leaf(b"fork"))
    grow(other, Tree(), 400)
    with pytest.raises(TilesError, match="do not continue"):
        TileLog(Folder(other), LOG_KEY).consistency(checkpoint_of(forked))
    TileLog(Folder(other), LOG_KEY).consistency(old)
    newer = grow(tmp_path / "a", tree, 500)
    with pytest.raises(TilesError, match="rolled back: signed 500 leaves once and shows 400"):
        TileLog(Folder(other), LOG_KEY).consistency(newer)


@pytest.mark.parametrize("name", ["tile/0/000", "tile/1/000.p/2", "tile/0/002.p/88", "tile/entries/000"])
def test_any_flipped_bit_of_a_tile_is_noticed(tmp_path: Path, name: str) -> None:
    grow(tmp_path, Tree(), 600)
    path, chance = tmp_path / name, random.Random(5)
    good = path.read_bytes()
    for place in chance.sample(range(8 * len(good)), 25):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(TilesError):
            TileLog(Folder(tmp_path), LOG_KEY).entry(5)
            TileLog(Folder(tmp_path), LOG_KEY).entry(590)
    path.unlink()
    with pytest.raises(TilesError, match="missing"):
        TileLog(Folder(tmp_path), LOG_KEY).entry(5)
        TileLog(Folder(tmp_path), LOG_KEY).entry(590)


def test_rebuilding_keeps_the_old_files_until_the_new_ones_are_whole(tmp_path: Path) -> None:
    root = tmp_path / "t"
    grow(root, Tree(), 600)
    before = files(root)
    with pytest.raises(RuntimeError), rebuilt(root) as fresh:
        TileWriter(fresh)
        raise RuntimeError
    assert files(root) == before
    with rebuilt(root) as fresh:
        grow(fresh, Tree(), 600)
    assert files(root) == before


class Packs(SimpleHTTPRequestHandler):
    """Serves a folder as any web server does, entries gzipped without asking, as the specification allows."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if "entries" not in self.path or not path.is_file():
            super().do_GET()
            return
        data = gzip.compress(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def served(grown: tuple[Path, Tree, list[str]]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Packs, directory=str(grown[0]))) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_from_a_web_server(served: str, grown: tuple[Path, Tree, list[str]]) -> None:
    log = TileLog(source_of(served), LOG_KEY)
    assert log.entry(65_537).entry == entry(65_537)
    assert log.consistency(grown[2][1])
    with pytest.raises(TilesError, match="is not among"):
        log.entry(10**9)
    with pytest.raises(TilesError, match="no checkpoint here"):
        TileLog(Address(served + "nowhere"), LOG_KEY)
    with pytest.raises(TilesError, match="is the address right"):
        TileLog(Address("http://127.0.0.1:1"), LOG_KEY)


def test_a_folder_of_a_stranger(tmp_path: Path) -> None:
    grow(tmp_path, Tree(), 3)
    with pytest.raises(TilesError, match="no signature by a trusted key"):
        TileLog(Folder(tmp_path), type(LOG_KEY)("other.test", LOG.public_bytes))
    (tmp_path / "checkpoint").write_text("garbage")
    with pytest.raises(TilesError, match="write it anew"):
        TileWriter(tmp_path)
    shutil.rmtree(tmp_path)
