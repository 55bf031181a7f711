"""A log as static files that any web server can serve, and a tree read back from them.

Source: c2sp.org/tlog-tiles. Below one folder:

tile/<L>/<N>          256 hashes of level L; N in groups of three digits, all but the last led by x: x001/x234/067
tile/<L>/<N>.p/<W>    the first W of them, while the tree ends there
tile/entries/<N>      the entries of tile 0/<N>, each led by its length in two bytes
checkpoint            the signed tree head, cosignatures included

Files are written first, made durable, and only then covered by the new checkpoint, so that what a reader finds under a
checkpoint is always whole. A full tile never changes; a partial one is deleted when the full one is there.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from attribution.disk import REAL
from attribution.log.merkle import EMPTY_ROOT, HASH_BYTES, PerfectNodes, Tree, hash_leaf
from attribution.log.note import Checkpoint, NoteError, split_note
from attribution.store import make_directory, write_atomically
from configs.errors import UserError

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT
ENTRIES = "entries"
LENGTH_BYTES = 2
_GROUPS = re.compile("...")


class TilesError(UserError):
    """Tiles that are missing, damaged, or of another tree than the checkpoint says."""


class Source(Protocol):
    """Where static files are read from."""

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a path below the prefix, None when there is no such file."""


class Folder:
    """Static files in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file, None when there is none."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def __str__(self) -> str:
        return str(self.root)


def tile_path(level: int | str, index: int, width: int = TILE_WIDTH) -> str:
    """Return the path of a tile, or of an entry bundle for the level `entries`; widths below 256 are partial."""
    digits = str(index)
    groups = _GROUPS.findall(digits.zfill(-(-len(digits) // 3) * 3))
    number = "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])
    return f"tile/{level}/{number}" + ("" if width == TILE_WIDTH else f".p/{width}")


class TileTree(PerfectNodes):
    """The tree of the first `size` leaves, its hashes read from tiles as they are needed and kept.

    Nothing read is trusted: whoever takes a proof from here checks it against a signed checkpoint.
    """

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size
        self._tiles: dict[tuple[int, int], Tree] = {}

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._size

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of leaves [index << level, (index + 1) << level). TilesError when its tile is not there."""
        tile_level, inner = divmod(level, TILE_HEIGHT)
        tile_index, within = divmod(index << inner, TILE_WIDTH)
        return self._tile(tile_level, tile_index).node(inner, within >> inner)

    def entries(self, tile_index: int) -> list[bytes]:
        """Return the entries of a bundle, each checked against its leaf hash in the tile beside it."""
        width = min(TILE_WIDTH, self._size - tile_index * TILE_WIDTH)
        entries = split_entries(self._read(ENTRIES, tile_index, width), width)
        tile = self._tile(0, tile_index)
        for offset, entry in enumerate(entries):
            if hash_leaf(entry) != tile.leaf(offset):
                raise TilesError(f"{self._source}: entry {tile_index * TILE_WIDTH + offset} is not the one in the tree")
        return entries

    def _tile(self, level: int, index: int) -> Tree:
        tile = self._tiles.get((level, index))
        if tile is None:
            width = min(TILE_WIDTH, (self._size >> TILE_HEIGHT * level) - index * TILE_WIDTH)
            data = self._read(level, index, width)
            if len(data) < width * HASH_BYTES or len(data) % HASH_BYTES:
                raise TilesError(f"{self._source}: {tile_path(level, index, width)} has {len(data)} bytes")
            hashes = (data[start : start + HASH_BYTES] for start in range(0, width * HASH_BYTES, HASH_BYTES))
            tile = self._tiles[level, index] = Tree(hashes)
        return tile

    def _read(self, level: int | str, index: int, width: int) -> bytes:
        """The partial file, or the full one that has taken its place."""
        for path in dict.fromkeys((tile_path(level, index, width), tile_path(level, index))):
            data = self._source.read(path)
            if data is not None:
                return data
        raise TilesError(f"{self._source}: {tile_path(level, index, width)} is missing; the log must serve it")


class TileWriter:
    """Extends the static files of one log; one writer at a time."""

    def __init__(self, root: Path) -> None:
        make_directory(root)
        self.root = root
        self.note = (Folder(root).read("checkpoint") or b"").decode()
        self.size, self.origin = 0, ""
        if self.note:
            try:
                checkpoint = Checkpoint.parse(split_note(self.note)[0])
            except NoteError as error:
                raise TilesError(f"tiles {root}: {error}; remove the folder and write it anew") from error
            self.size, self.origin = checkpoint.size, checkpoint.origin
        self._rows: list[list[bytes]] = []  # by level: the hashes of the rightmost tile, while it is partial
        self._bundle: list[bytes] = []  # the entries beside the rightmost tile of level 0, each with its length
        self._written: list[Path] = []
        self._load()

    def extend(self, entries: Iterable[bytes]) -> None:
        """Write the tiles that `entries` complete; partial tiles and the checkpoint come with `publish`."""
        for entry in entries:
            self._bundle.append(_framed(entry))
            if len(self._bundle) == TILE_WIDTH:
                self._write(tile_path(ENTRIES, self.size // TILE_WIDTH), b"".join(self._bundle))
                self._bundle.clear()
            self._push(0, hash_leaf(entry))
            self.size += 1

    def check(self, note: str) -> None:
        """Write the partial tiles. TilesError unless all tiles together lead to the checkpoint of `note`."""
        checkpoint = Checkpoint.parse(split_note(note)[0])
        if checkpoint.size != self.size or self.origin not in ("", checkpoint.origin):
            raise TilesError(
                f"tiles {self.root}: hold {self.size} leaves of {self.origin}, not what the checkpoint says"
            )
        self._write_partial()
        tree = TileTree(Folder(self.root), self.size)
        if (tree.root() if self.size else EMPTY_ROOT) != checkpoint.root:
            raise TilesError(
                f"tiles {self.root}: the log's {self.size} leaves do not continue the tree published before; "
                "the log was changed or rolled back: restore it, and let nobody rewrite the tiles"
            )

    def publish(self, note: str) -> None:
        """Check, make every file durable, then replace the checkpoint by `note`; it stays when the check fails."""
        self.check(note)
        self._make_durable()
        if note != self.note:
            write_atomically(self.root / "checkpoint", note.encode())
        self._delete_partial()
        self._written.clear()
        self.note, self.origin = note, note.partition("\n")[0]

    def _push(self, level: int, node: bytes) -> None:
        if level == len(self._rows):
            self._rows.append([])
        row = self._rows[level]
        row.append(node)
        if len(row) == TILE_WIDTH:
            index = (self.size >> TILE_HEIGHT * level) // TILE_WIDTH
            self._write(tile_path(level, index), b"".join(row))
            parent = Tree(row).root()
            row.clear()
            self._push(level + 1, parent)

    def _write_partial(self) -> None:
        for level, row in enumerate(self._rows):
            if row:
                index = (self.size >> TILE_HEIGHT * level) // TILE_WIDTH
                self._write(tile_path(level, index, len(row)), b"".join(row))
        if self._bundle:
            path = tile_path(ENTRIES, self.size // TILE_WIDTH, len(self._bundle))
            self._write(path, b"".join(self._bundle))

    def _write(self, path: str, data: bytes) -> None:
        """Put a whole file in place; it counts once a checkpoint covers it."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.new")
        temporary.write_bytes(data)
        temporary.replace(target)
        self._written.append(target)

    def _make_durable(self) -> None:
        folders: set[Path] = set()
        for path in self._written:
            _sync_file(path)
            folders.update(folder for folder in path.parents if folder.is_relative_to(self.root))
        for folder in sorted(folders, reverse=True):
            REAL.sync_directory(folder)

    def _delete_partial(self) -> None:
        """Delete the partial tiles that full ones have replaced."""
        for path in self._written:
            if not path.parent.name.endswith(".p"):
                shutil.rmtree(path.with_name(f"{path.name}.p"), ignore_errors=True)

    def _load(self) -> None:
        """Read the rightmost tiles, which the next entries go into."""
        published = TileTree(Folder(self.root), self.size)
        level = 0
        while self.size >> TILE_HEIGHT * level:
            index, width = divmod(self.size >> TILE_HEIGHT * level, TILE_WIDTH)
            self._rows.append([published.node(TILE_HEIGHT * level, index * TILE_WIDTH + i) for i in range(width)])
            level += 1
        index, width = divmod(self.size, TILE_WIDTH)
        if width:
            self._bundle = [_framed(entry) for entry in published.entries(index)]


@contextmanager
def rebuilt(root: Path) -> Iterator[Path]:
    """Yield an empty folder beside `root`; what was put there takes the place of root's tiles when the block ends."""
    fresh = root.with_name(f".{root.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    make_directory(fresh)
    yield fresh
    (root / "checkpoint").unlink(missing_ok=True)
    shutil.rmtree(root / "tile", ignore_errors=True)
    for name in ("tile", "checkpoint"):  # the checkpoint last: it covers what lies there already
        if (fresh / name).exists():
            (fresh / name).replace(root / name)
    REAL.sync_directory(root)
    shutil.rmtree(fresh)


def split_entries(data: bytes, count: int) -> list[bytes]:
    """Return the first `count` entries of a bundle. TilesError when it is cut short or overlong for a full bundle."""
    entries: list[bytes] = []
    start = 0
    for _ in range(count):
        end = start + LENGTH_BYTES + int.from_bytes(data[start : start + LENGTH_BYTES], "big")
        if end > len(data) or len(data) < start + LENGTH_BYTES:
            raise TilesError(f"entry bundle: ends after {len(entries)} of {count} entries")
        entries.append(data[start + LENGTH_BYTES : end])
        start = end
    if count == TILE_WIDTH and start != len(data):
        raise TilesError(f"entry bundle: {len(data) - start} bytes too long")
    return entries


def _framed(entry: bytes) -> bytes:
    return len(entry).to_bytes(LENGTH_BYTES, "big") + entry


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
