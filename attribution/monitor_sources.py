"""Where a monitor reads a log: the folder of a home, or any web server that has its tiles.

Source of the second: c2sp.org/tlog-tiles, `checkpoint` and entry bundles of 256 at `tile/entries/<N>[.p/<W>]`.
"""

import http.client
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attribution.log.sequencer import LENGTH_BYTES, LogError

if TYPE_CHECKING:
    from attribution.trail import Trail

BUNDLE_LEAVES = 256
TIMEOUT_S = 30.0
MAX_BUNDLE_BYTES = BUNDLE_LEAVES * (LENGTH_BYTES + 65_535)


class TrailSource:
    """The log of a home."""

    def __init__(self, trail: "Trail") -> None:
        self._log = trail.log

    def checkpoint(self) -> str:
        """Return the signed note over the leaves read so far."""
        self._log.refresh()
        return self._log.checkpoint

    def leaves(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of leaves [start, stop)."""
        yield from self._log.leaves(start, stop)


class UrlSource:
    """A log's tiles below a URL (http, https or file)."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._size = 0

    def checkpoint(self) -> str:
        """Return the signed note that the server has."""
        text = self._get("checkpoint").decode("utf-8", errors="replace")
        size = text.split("\n")[1:2]
        self._size = int(size[0]) if size and size[0].isdigit() else 0
        return text

    def leaves(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of leaves [start, stop); `checkpoint` was asked before."""
        for number in range(start // BUNDLE_LEAVES, -(-stop // BUNDLE_LEAVES)):
            first = number * BUNDLE_LEAVES
            for index, data in enumerate(self._bundle(number), start=first):
                if start <= index < stop:
                    yield data

    def _bundle(self, number: int) -> list[bytes]:
        width = min(BUNDLE_LEAVES, self._size - number * BUNDLE_LEAVES)
        path = f"tile/entries/{tile_path(number)}"
        data = self._get(path if width == BUNDLE_LEAVES else f"{path}.p/{width}")
        leaves, place = [], 0
        while place < len(data):
            length = int.from_bytes(data[place : place + LENGTH_BYTES], "big")
            leaves.append(data[place + LENGTH_BYTES : place + LENGTH_BYTES + length])
            place += LENGTH_BYTES + length
        if place != len(data) or len(leaves) != width:
            raise LogError(f"{self._url}/{path}: holds {len(leaves)} entries, not {width}")
        return leaves

    def _get(self, path: str) -> bytes:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=TIMEOUT_S) as response:
                data: bytes = response.read(MAX_BUNDLE_BYTES + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise LogError(f"{self._url}/{path}: {error}") from error
        return data


def tile_path(number: int) -> str:
    """Return a tile's number as tlog-tiles writes it: groups of three digits, all but the last with an x."""
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.append(f"x{number % 1000:03d}")
    return "/".join(reversed(groups))
