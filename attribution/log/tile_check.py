"""Static tiles against the log they were cut from: every tile, every entry bundle, each byte for byte.

Written from c2sp.org/tlog-tiles without the code that writes them. Yields what is wrong, file by file.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from attribution.log.merkle import Tree, hash_node

WIDTH = 256


def check_tiles(root: Path, tree: Tree, leaves: Callable[[], Iterable[bytes]]) -> Iterator[tuple[str, str]]:
    """Yield (path below `root`, what is wrong) for each file under ROOT/tile that is not what the log says."""
    files = {path.relative_to(root / "tile").as_posix(): path for path in (root / "tile").rglob("*") if path.is_file()}
    if not files:
        return
    levels = _levels([tree.leaf(index) for index in range(tree.size)])
    bundles = [len(leaf).to_bytes(2, "big") + leaf for leaf in leaves()]
    for name, path in sorted(files.items()):
        try:
            level, index, width = _parse(name)
            parts = bundles if level is None else levels[level]
        except (ValueError, IndexError):
            yield f"tile/{name}", "is no tile of this log"
            continue
        expected = parts[index * WIDTH : index * WIDTH + width]
        if len(expected) < width:
            yield f"tile/{name}", "holds more than the signed checkpoint covers"
        elif path.read_bytes() != b"".join(expected):
            yield f"tile/{name}", "is not what the log says"


def _levels(hashes: list[bytes]) -> list[list[bytes]]:
    """The hashes of each level of tiles: every 256 of one, whole, make one of the next."""
    levels = [hashes]
    while len(levels[-1]) >= WIDTH:
        whole = len(levels[-1]) // WIDTH * WIDTH
        levels.append([_root(levels[-1][start : start + WIDTH]) for start in range(0, whole, WIDTH)])
    return levels


def _root(hashes: list[bytes]) -> bytes:
    while len(hashes) > 1:
        hashes = [hash_node(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]


def _parse(name: str) -> tuple[int | None, int, int]:
    """The level (None for entries), index and width of `L/x001/234` or `L/001.p/17`; ValueError for any other name."""
    head, partial, width = name.partition(".p/")
    level, *groups = head.split("/")
    if not groups or not all(group.startswith("x") for group in groups[:-1]):
        raise ValueError(name)
    index = int("".join(group.removeprefix("x") for group in groups))
    return None if level == "entries" else int(level), index, int(width) if partial else WIDTH
