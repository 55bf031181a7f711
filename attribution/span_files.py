"""Where the indexes of training rows' words lie, and taking away those whose rows were erased. Imports no NumPy."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attribution.store import Store

FOLDER = Path("views") / "spans"


def index_file(home: Path, trace: str) -> Path:
    """Return the file of the index of a trace (digest)."""
    return home / FOLDER / f"{trace.removeprefix('sha256:')}.npz"


def forget_stale(home: Path, store: "Store") -> int:
    """Remove the indexes of traces that are gone from the store: they hold words of erased rows. Return how many."""
    stale = [path for path in (home / FOLDER).glob("*.npz") if not store.has(f"sha256:{path.stem}")]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)
