"""Coalitions measured before, kept in HOME/run/settle: a run that was killed goes on, and two runs share what is equal.

A cell file is named by the digest of all that decides a coalition's utilities: base, rows, settings, suite, utility.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from attribution.canonical import canonical_json
from attribution.disk import write_atomically
from pipelines.settle.game import Bits, Game
from pipelines.settle.retrain import Measured

FOLDER = Path("run") / "settle"
VERSION = 1


class Cells:
    """The cells of one game under one way of measuring; `setting` is what else decides a utility, as plain values."""

    def __init__(self, home: Path, game: Game, setting: dict[str, Any]) -> None:
        self._folder = home / FOLDER
        self._setting = {"v": VERSION, "game": game.digest, **setting}

    def digest(self, chosen: Bits) -> str:
        """Return the digest of the coalition that brings in these rows (or adapters), bool [N]."""
        value = {**self._setting, "chosen": np.packbits(chosen).tobytes().hex(), "num": len(chosen)}
        return f"sha256:{hashlib.sha256(canonical_json(value)).hexdigest()}"

    def get(self, digest: str) -> Measured | None:
        """Return what was measured under a digest; None when nothing was, or the file is damaged."""
        try:
            value = json.loads(self._file(digest).read_text(encoding="utf-8"))
            return Measured(tuple(map(float, value["utilities"])), str(value["weights"]), float(value["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, digest: str, measured: Measured) -> None:
        """Keep what was measured; whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(digest), json.dumps(asdict(measured)).encode())

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.json"
