"""What a monitor remembers between runs, in a folder of its own: the last checkpoint and every leaf hash seen.

FOLDER/state.json   checkpoint, right edge of the tree, entries at fault; replaced whole
FOLDER/leaves.bin   32 bytes a leaf; what lies beyond the state's size is left from a run that did not end
"""

import json
from collections.abc import Iterable
from pathlib import Path

from attribution.log.merkle import HASH_BYTES, Frontier
from attribution.log.note import Checkpoint
from attribution.store import make_directory, write_atomically
from configs.errors import UserError

STATE_FILE, LEAVES_FILE = "state.json", "leaves.bin"
STATE_VERSION = 1


class Memory:
    """A monitor's memory; `append` and `remember` move it on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.origin, self.size, self.root, self.last_time_us = "", 0, b"", 0
        self.peaks: list[bytes] = []
        self.suspects: set[int] = set()
        self.standing: list[tuple[str, int | None, str]] = []  # (check, entry, detail) of what cannot be mended
        self._hashes: list[bytes] = []
        self._index: dict[bytes, int] = {}
        if (folder / STATE_FILE).is_file():
            self._read()

    def _read(self) -> None:
        path = self._folder / STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["version"] != STATE_VERSION:
                raise ValueError(f"version {state['version']}")
            self.origin, self.size = state["origin"], state["size"]
            self.root, self.peaks = bytes.fromhex(state["root"]), [bytes.fromhex(peak) for peak in state["peaks"]]
            self.last_time_us, self.suspects = state["last_time_us"], set(state["suspects"])
            self.standing = [(check, index, detail) for check, index, detail in state["standing"]]
            data = (self._folder / LEAVES_FILE).read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"monitor state {path}: cannot be read ({error}); remove the folder to start anew"
            ) from error
        frontier = Frontier()
        for index in range(self.size):
            leaf_hash = data[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            self.append(leaf_hash)
            frontier.append(leaf_hash)
        if frontier.root() != self.root:
            raise UserError(f"monitor state {path}: {LEAVES_FILE} does not match it; remove the folder to start anew")

    def append(self, leaf_hash: bytes) -> None:
        """Take on the next leaf hash, in memory."""
        self._index.setdefault(leaf_hash, len(self._hashes))
        self._hashes.append(leaf_hash)

    def leaf_hash(self, index: int) -> bytes:
        """Return the hash of a leaf as it was seen."""
        return self._hashes[index]

    def index_of(self, leaf_hash: str) -> int | None:
        """Return where a leaf hash was seen, None when it was not."""
        return self._index.get(bytes.fromhex(leaf_hash))

    def remember(self, checkpoint: Checkpoint, frontier: Frontier, suspects: Iterable[int]) -> None:
        """Write the new checkpoint down; durable on return."""
        make_directory(self._folder)
        write_atomically(self._folder / LEAVES_FILE, b"".join(self._hashes))
        self.origin, self.size, self.root = checkpoint.origin, checkpoint.size, checkpoint.root
        self.peaks, self.suspects = list(frontier.peaks), set(suspects)
        state = {
            "version": STATE_VERSION,
            "origin": self.origin,
            "size": self.size,
            "root": self.root.hex(),
            "peaks": [peak.hex() for peak in self.peaks],
            "last_time_us": self.last_time_us,
            "suspects": sorted(self.suspects),
            "standing": self.standing,
        }
        write_atomically(self._folder / STATE_FILE, json.dumps(state).encode() + b"\n")
