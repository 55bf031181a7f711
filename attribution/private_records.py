"""The private halves of the records: envelope and salt, one file each, erasable one by one."""

from pathlib import Path


class PrivateRecords:
    """HOME/records."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, index: int, leaf_hash: str) -> bytes | None:
        """Return the private half of entry `index`, None when it was erased."""
        try:
            return (self._directory / f"{leaf_hash}.json").read_bytes()
        except FileNotFoundError:
            return None
