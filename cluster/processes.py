"""Which processes belong to a cluster of ours, and how to stop exactly those.

Everything `trailmark up` starts carries its cluster id in `MARKER`. A process belongs when it carries the marker, or
descends from one that does: Ray's workers write their title over the memory that holds their environment.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.errors import UserError

MARKER = "TRAILMARK_CLUSTER"


@dataclass(frozen=True)
class ProcessId:
    """A process for good: a pid alone may be given to another process later."""

    pid: int
    started_s: float

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """Return the identity of a living process."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """Return the living process, or None when it ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started_s and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def cluster_processes(cluster_id: str) -> list[psutil.Process]:
    """Return the living processes of the cluster, but for this process and its ancestors."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if _is_marked(process, cluster_id):
            for member in _with_descendants(process):
                found[member.pid] = member
    return [process for pid, process in found.items() if pid not in ours and _is_alive(process)]


def ray_orphans(folder: Path) -> list[psutil.Process]:
    """Return what Ray left behind of sessions below `folder` whose raylet is gone: their driver was killed.

    Ray 2.60's dashboard agent outlives both, and its title has overwritten the environment that would mark it.
    """
    return [process for process in psutil.process_iter() if _is_orphan_below(process, f"{folder}/")]


def _is_orphan_below(process: psutil.Process, prefix: str) -> bool:
    try:
        if not process.name().startswith("ray::") or any(parent.name() == "raylet" for parent in process.parents()):
            return False
        return any(file.path.startswith(prefix) for file in process.open_files())
    except (psutil.Error, OSError):  # another user's, or one that ended meanwhile
        return False


def tree_memory_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and its descendants; pages they share count once for each."""
    total = 0
    for member in _with_descendants(process):
        with contextlib.suppress(psutil.Error):
            total += member.memory_info().rss
    return total


def stop_processes(processes: Iterable[psutil.Process], *, grace_s: float = 10.0) -> list[psutil.Process]:
    """Terminate, wait `grace_s`, kill what is left; return what even then lives."""
    waiting = list(processes)
    for process in waiting:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    waiting = _wait_gone(waiting, timeout_s=grace_s)
    for process in waiting:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return _wait_gone(waiting, timeout_s=5.0)


def wait_until(condition: Callable[[], bool], *, timeout_s: float, interval_s: float = 0.1) -> bool:
    """Poll `condition` until it holds; return whether it did within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def require_free_port(setting: str, port: int, *, host: str = "127.0.0.1") -> None:
    """Raise a `UserError` naming the setting when something already listens on `host:port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{setting} = {port}: cannot listen on {host}:{port} ({error.strerror}); stop what uses it, "
                f"or set another {setting} in a file and pass it with --config"
            ) from error


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_marked(process: psutil.Process, cluster_id: str) -> bool:
    try:
        return process.environ().get(MARKER) == cluster_id
    except (psutil.Error, OSError):  # another user's process, or one that ended meanwhile
        return False


def _with_descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_gone(processes: list[psutil.Process], *, timeout_s: float) -> list[psutil.Process]:
    """Return those still living after `timeout_s`; a zombie counts as gone (its parent may never collect it)."""
    wait_until(lambda: not any(_is_alive(process) for process in processes), timeout_s=timeout_s)
    return [process for process in processes if _is_alive(process)]
