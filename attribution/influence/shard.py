"""Some rows of a gradient store, as they lie in a folder of their own (see gradient_store.py)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attribution.influence.quantise import Quantised


@dataclass(frozen=True)
class Shard:
    """Some rows of a store. `removed`: rows that were deleted and still lie there."""

    folder: Path
    num_rows: int
    removed: tuple[int, ...]
    files: Mapping[str, str]
    _opened: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_here(self) -> bool:
        """Whether this machine holds the shard."""
        return self.folder.is_dir()

    @property
    def num_live(self) -> int:
        return self.num_rows - len(self.removed)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Example ids of all rows, removed ones among them."""
        return tuple(json.loads((self.folder / "ids.json").read_text(encoding="utf-8")))

    @cached_property
    def live(self) -> NDArray[np.int64]:
        """Rows that were not deleted."""
        return np.setdiff1d(np.arange(self.num_rows), np.asarray(self.removed, dtype=np.int64))

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """Float32 [rows, views]."""
        loaded: NDArray[np.float32] = np.load(self.folder / "weights.npy")
        return loaded

    def rows(self, view: str) -> Quantised:
        """Return the memory-mapped codes and scales of a view; the files stay open."""
        return Quantised(self._map(view, "codes"), self._map(view, "scales"), self._sizes(view)[0])

    def lengths(self, view: str) -> NDArray[np.float32]:
        """Return float32 [rows]: what a cosine divides each row by, its Euclidean length unless it is a sum."""
        return self._sizes(view)[1]

    def _sizes(self, view: str) -> NDArray[np.float32]:
        """Return float32 [2, rows], contiguous: units and lengths."""
        name = f"{view}.sizes.npy"
        if name not in self._opened:
            self._opened[name] = np.ascontiguousarray(np.load(self.folder / name).T)
        sizes: NDArray[np.float32] = self._opened[name]
        return sizes

    def _map(self, view: str, kind: str) -> Any:
        name = f"{view}.{kind}.npy"
        if name not in self._opened:
            # Copy-on-write: read-only memory cannot become a torch tensor without a warning.
            self._opened[name] = np.asarray(np.load(self.folder / name, mmap_mode="c"))
        return self._opened[name]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "rows": self.num_rows, "removed": list(self.removed), "files": dict(self.files)}
