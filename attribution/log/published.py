"""Proofs under the published checkpoint, which carries the witnesses' cosignatures."""

from collections.abc import Sequence
from pathlib import Path

from attribution.log.note import NoteError, open_checkpoint
from attribution.log.proof import format_proof
from attribution.log.sequencer import Log

TILES = "tiles"
"""The folder below a home where its publisher puts tiles and checkpoint."""


def published_proofs(tiles: Path, log: Log, indices: Sequence[int]) -> list[str]:
    """Return the tlog-proof text of each leaf, all under one checkpoint.

    That is the published one when it covers the leaves, else the log's newest, which no witness has seen yet.
    """
    published = published_note(tiles, log)
    if published is None or max(indices, default=0) >= published[1]:
        return log.proofs(indices)
    note, size = published
    return [format_proof(index, log.inclusion_path(index, size), checkpoint=note) for index in indices]


def published_note(tiles: Path, log: Log) -> tuple[str, int] | None:
    """Return the published checkpoint and its size, when there is one and it is of this very log's tree."""
    try:
        note = (tiles / "checkpoint").read_text(encoding="utf-8")
        checkpoint = open_checkpoint(note, log.key)
    except (OSError, NoteError, UnicodeDecodeError):
        return None
    if checkpoint.size > log.size or log.root(checkpoint.size) != checkpoint.root:
        return None
    return note, checkpoint.size
