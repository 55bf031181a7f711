"""Receipts on disk until the log has them: a completion's facts are written here before its last token is sent.

A spool is a folder of segments, one JSON object a line. A segment is locked by the process that writes it, so a segment
that can be locked belongs to a process that died; whoever finds it sends it to the log. A row is written at once, so
that it survives a killed process, and fsynced, with those of other requests, before its last token is sent, so that it
survives a power failure too.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.disk import REAL
from attribution.group_commit import GroupCommit

logger = logging.getLogger(__name__)

MAX_SYNCS = 4096  # requests that share one fsync


@dataclass(frozen=True)
class SpooledRow:
    """One completion: the receipt, the salt of its commitment, and the private content (prompt and answer)."""

    receipt: dict[str, Any]
    salt: bytes
    content: dict[str, Any]

    @property
    def receipt_id(self) -> str:
        """The id the caller was given."""
        return str(self.receipt["id"])

    def to_line(self) -> bytes:
        """Return the row as one line of JSON."""
        row = {"receipt": self.receipt, "salt": self.salt.hex(), "content": self.content}
        return json.dumps(row, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "SpooledRow":
        """Read a line back. ValueError when it is cut short."""
        row = json.loads(line)
        return cls(row["receipt"], bytes.fromhex(row["salt"]), row["content"])


class Segment:
    """One file of the spool, locked while it is open."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._closing = threading.Lock()  # held while the descriptor is used beside the thread that appends
        self._syncs = GroupCommit(self._sync, max_requests=MAX_SYNCS)
        self._has_name = False

    def append(self, row: SpooledRow) -> None:
        """Write one row, so that a reader sees all of it or a last line without its end.

        OSError when it does not fit (disk full, quota); the file is then as it was before.
        """
        size = os.fstat(self._descriptor).st_size  # its lock makes us the only writer
        try:
            _write_all(self._descriptor, row.to_line())
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def sync(self) -> None:
        """Make every row written so far durable; calls that come together share an fsync. OSError when it fails.

        Nothing is done once the segment is closed: then the log has its rows, or the process is ending.
        """
        self._syncs.submit(None)

    def _sync(self, requests: Sequence[None]) -> Sequence[None]:
        with self._closing:
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
                if not self._has_name:
                    REAL.sync_directory(self.path.parent)
                    self._has_name = True
        return requests

    def rows(self) -> list[SpooledRow]:
        """Return the complete rows; a line that a crash cut short was never acknowledged and is left out."""
        rows = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                rows.append(SpooledRow.from_line(line))
            except (ValueError, KeyError) as error:
                logger.error("spool %s holds a damaged line: %s", self.path.name, error)
        return rows

    def discard(self) -> None:
        """Remove the file: the log has its rows."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the file for the next start and unlock it."""
        with self._closing:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


class Spool:
    """The folder of segments."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def open_segment(self, owner: str) -> Segment:
        """Start a segment, readable by its owner only: it holds prompts."""
        path = self._folder / f"{owner}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        nameless = path.with_suffix(".new")  # until it is locked nobody may take it for an orphan
        descriptor = os.open(nameless, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(path)
        return Segment(path, descriptor)

    def refuse(self, row: SpooledRow) -> Path:
        """Keep a row that the log will never take, under refused/; to try it again, move its file into the spool.

        The same row always goes to the same file. OSError when it cannot be written.
        """
        folder = self._folder / "refused"
        folder.mkdir(exist_ok=True, mode=0o700)
        line = row.to_line()
        path = folder / f"{hashlib.sha256(line).hexdigest()[:32]}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(descriptor, line)
        finally:
            os.close(descriptor)
        return path

    def orphans(self) -> Iterator[Segment]:
        """Take over, one by one, the segments whose writer is gone; the caller discards or closes each."""
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            if not path.exists():  # its writer finished between our listing and our lock
                os.close(descriptor)
                continue
            yield Segment(path, descriptor)

    def find(self, receipt_id: str) -> SpooledRow | None:
        """Return a row that waits for the log, whoever wrote it, or None."""
        wanted = json.dumps(receipt_id).encode()
        for path in self._folder.glob("*.jsonl"):
            try:
                lines = path.read_bytes().split(b"\n")[:-1]
            except FileNotFoundError:
                continue
            for line in lines:
                if wanted in line and (row := SpooledRow.from_line(line)).receipt_id == receipt_id:
                    return row
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    """Write every byte; one call may write fewer than asked (disk full, a signal)."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
