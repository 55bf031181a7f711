"""Splits the text of a JSON array into its elements without parsing them, so that one bad element costs only itself."""

import re
from collections.abc import Iterator

# A string ends at its quote or, when that is missing, at the end of its line: a raw line break is not legal in one.
TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"?|[\[\]{},]', re.DOTALL)


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (line number where it begins, bytes) of each element of the array in `data`; lines count from 1.

    Semantics: elements are what commas at depth one part. Brackets are counted but not matched by kind; inside strings
    they do not count. An element left open at the end is yielded as it stands, and so is text after the array's end.
    """
    start = data.index(b"[") + 1
    depth, lines = 1, _LineCounter(data)
    for match in TOKEN.finditer(data, start):
        token = match.group()
        depth += (token in (b"[", b"{")) - (token in (b"]", b"}"))
        if (token == b"," and depth == 1) or depth == 0:
            yield from _element(data, start, match.start(), lines)
            start = match.end()
        if depth == 0:
            break
    yield from _element(data, start, len(data), lines)


class _LineCounter:
    """Line numbers of growing positions, each line break counted once."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._line = 1

    def at(self, position: int) -> int:
        self._line += self._data.count(b"\n", self._position, position)
        self._position = position
        return self._line


def _element(data: bytes, start: int, end: int, lines: _LineCounter) -> Iterator[tuple[int, bytes]]:
    text = data[start:end]
    if stripped := text.strip():
        yield lines.at(start + text.index(stripped[:1])), stripped
