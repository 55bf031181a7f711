"""Who may append: the newest process that took the log over, and any other on the same machine.

LOG/writer.json   {"attempt": 7, "host": ..., "machine": ..., "pid": ..., "since_us": ..., "released": false}

The log writer of a cluster takes over when it starts, one attempt after the other; one that wakes up after a later one
took over is fenced off. A process that took nothing over (a command) may append beside it on the same machine, where
flock keeps the two apart, and on no other: whether flock holds between machines depends on the file system. Everything
here happens under the log's lock.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from attribution.disk import REAL, Disk, write_atomically
from configs.errors import UserError

WRITER = "writer.json"
MACHINE_ID = Path("/etc/machine-id")


class FencedError(UserError):
    """Another writer holds this log."""


@dataclass(frozen=True)
class Claim:
    """One take-over: its number, and the process that took over."""

    attempt: int
    host: str
    machine: str
    pid: int
    since_us: int
    released: bool

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since_us / 1e6))
        return f"take-over {self.attempt}, by process {self.pid} on {self.host} at {when}"


class Fence:
    """One process's view of LOG/writer.json."""

    def __init__(self, directory: Path, *, disk: Disk = REAL) -> None:
        self._path, self._disk = directory / WRITER, disk
        self._held: int | None = None

    def check(self) -> None:
        """Raise FencedError unless this process may append now."""
        claim = self.read()
        if self._held is not None and (claim is None or claim.attempt != self._held):
            raise FencedError(
                f"log {self._path.parent}: this writer is take-over {self._held} and was fenced off by "
                f"{claim or 'whoever removed ' + WRITER}; send records to the writer that runs now"
            )
        if self._held is None and claim is not None and not claim.released and claim.machine != machine():
            raise FencedError(
                f"log {self._path.parent}: held by {claim}; send records through its log writer, or, when that "
                "machine is gone for good, run `trailmark log take-over` here"
            )

    def take_over(self) -> int:
        """Write the next claim, this process's, and return its number."""
        before = self.read()
        attempt = 1 if before is None else before.attempt + 1
        self._write(Claim(attempt, socket.gethostname(), machine(), os.getpid(), time.time_ns() // 1000, False))
        self._held = attempt
        return attempt

    def release(self) -> None:
        """Mark this process's claim as given up; it may append on as a command does. FencedError when it was lost."""
        if self._held is None:
            return
        self.check()
        claim = self.read()
        assert claim is not None
        self._write(replace(claim, released=True))
        self._held = None

    def read(self) -> Claim | None:
        """Return the newest claim, None when nobody ever took over. FencedError when the file is damaged."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Claim(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise FencedError(f"{self._path}: damaged ({error}); restore it from a copy") from error

    def _write(self, claim: Claim) -> None:
        write_atomically(self._path, json.dumps(asdict(claim)).encode() + b"\n", disk=self._disk)


@lru_cache(maxsize=1)
def machine() -> str:
    """Return what tells this machine (or container) from others and outlives a reboot: host name and machine id."""
    try:
        identity = MACHINE_ID.read_text(encoding="ascii").strip()
    except OSError:
        identity = ""
    return f"{socket.gethostname()}/{identity}"
