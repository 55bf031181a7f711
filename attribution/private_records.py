"""The private halves of the records: envelope and salt, one file each, erasable one by one."""

from collections.abc import Callable, Sequence
from pathlib import Path


class PrivateRecords:
    """HOME/records."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def append(self, start: int, items: Sequence[tuple[str, bytes]], *, is_logged: Callable[[str], bool]) -> None:
        """Write the private halves (leaf hash, bytes) of entries `start` and on, which the log does not have yet."""
        for leaf_hash, data in items:
            (self._directory / f"{leaf_hash}.json").write_bytes(data)

    def read(self, index: int, leaf_hash: str) -> bytes | None:
        """Return the private half of entry `index`, None when it was erased."""
        try:
            return (self._directory / f"{leaf_hash}.json").read_bytes()
        except FileNotFoundError:
            return None

    def erase(self, index: int, leaf_hash: str) -> bool:
        """Remove the private half of entry `index` for good; return whether it was there."""
        path = self._directory / f"{leaf_hash}.json"
        was_there = path.exists()
        path.unlink(missing_ok=True)
        return was_there
