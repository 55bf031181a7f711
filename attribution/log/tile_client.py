"""Proofs from static files alone: whoever has a folder or an address of tiles and the log's key needs nothing else.

Source: c2sp.org/tlog-tiles. Every proof is checked against the signed checkpoint before it is returned.
"""

import gzip
import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.log.key_history import KeyHistory, LogKey
from attribution.log.merkle import MerkleError, verify_consistency, verify_inclusion
from attribution.log.note import Checkpoint, NoteError, NoteKey
from attribution.log.proof import format_proof
from attribution.log.proved import VerifyError
from attribution.log.tiles import TILE_WIDTH, Folder, Source, TilesError, TileTree

TIMEOUT_S = 10.0
MAX_FILE_BYTES = TILE_WIDTH * (2 + 65_535)
"""The longest entry bundle there can be: 16.8 MB."""


@dataclass(frozen=True)
class FetchedEntry:
    """An entry's bytes and its offline proof (a tlog-proof text), which holds."""

    entry: bytes
    proof: str


class Address:
    """Static files below an http or https prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.rstrip("/")

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a path, None for 404 and 410. TilesError when the server does not answer."""
        request = urllib.request.Request(f"{self.prefix}/{path}", headers={"Accept-Encoding": "gzip, identity"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                data: bytes = response.read(MAX_FILE_BYTES + 1)
                is_packed = response.headers.get("Content-Encoding") == "gzip"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                return None
            raise TilesError(f"{self.prefix}/{path}: answers {error.code}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise TilesError(f"{self.prefix}/{path}: {error}; is the address right?") from error
        try:
            return gzip.decompress(data) if is_packed else data
        except (OSError, EOFError) as error:
            raise TilesError(f"{self.prefix}/{path}: not gzip as it claims") from error

    def __str__(self) -> str:
        return self.prefix


def source_of(text: str) -> Source:
    """Return the source of a folder's path or an http(s) address."""
    return Address(text) if text.startswith(("http://", "https://")) else Folder(Path(text))


class TileLog:
    """A log as its static files show it; `key` is the log's, `former` are those it had before, each up to its time."""

    def __init__(self, source: Source, key: NoteKey, *, former: Sequence[LogKey] = ()) -> None:
        self._source = source
        data = source.read("checkpoint")
        if data is None:
            raise TilesError(f"{source}: no checkpoint here; give the folder or address that holds `checkpoint`")
        try:
            self.note = data.decode()
            self._keys = KeyHistory((), (LogKey(key), *former))
            self.checkpoint: Checkpoint = self._keys.open_checkpoint(self.note)[0]
        except (NoteError, VerifyError, UnicodeDecodeError) as error:
            raise TilesError(f"{source}: {error}") from error
        self._tree = TileTree(source, self.checkpoint.size)

    def entry(self, index: int) -> FetchedEntry:
        """Return entry `index` with its proof. TilesError when it is not there or does not lead to the checkpoint."""
        if not 0 <= index < self.checkpoint.size:
            raise TilesError(f"{self._source}: entry {index} is not among the {self.checkpoint.size} of the checkpoint")
        entry = self._tree.entries(index // TILE_WIDTH)[index % TILE_WIDTH]
        path = self._tree.inclusion_path(index)
        try:
            verify_inclusion(
                self._tree.leaf(index), index, size=self.checkpoint.size, root=self.checkpoint.root, path=path
            )
        except MerkleError as error:
            raise TilesError(f"{self._source}: the tiles contradict the checkpoint: {error}") from error
        return FetchedEntry(entry, format_proof(index, path, checkpoint=self.note))

    def consistency(self, older: str) -> list[bytes]:
        """Return the proof that an older checkpoint (a signed note) is a prefix of this one, having checked it.

        Raises:
            TilesError: it is not: the log has forked or was rolled back.
        """
        try:
            old = self._keys.open_checkpoint(older)[0]
        except (NoteError, VerifyError) as error:
            raise TilesError(f"older checkpoint: {error}") from error
        new = self.checkpoint
        if old.size > new.size:
            raise TilesError(f"{self._source}: rolled back: signed {old.size} leaves once and shows {new.size}")
        if old.size == 0:
            return []
        path = self._tree.consistency_path(old.size)
        try:
            verify_consistency(old.size, new.size, old_root=old.root, root=new.root, path=path)
        except MerkleError as error:
            raise TilesError(
                f"{self._source}: the {new.size} leaves do not continue the {old.size} signed before; the log has "
                f"forked, or the tiles are damaged ({error})"
            ) from error
        return path
