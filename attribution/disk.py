"""The calls that change a disk, in one place, so that a test or program can fail each of them or crash between two.

A write is durable once its file was fsynced, a new, renamed or removed name once its directory was. Everything that an
acknowledgement rests on goes through a `Disk`; reading does not.
"""

import os
from collections.abc import Iterable
from pathlib import Path


class Disk:
    """The file system as it is. Every method may raise OSError."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open a file, made when `flags` say so, and return its descriptor."""
        return os.open(path, flags, mode)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def write(self, descriptor: int, data: bytes, *, offset: int) -> None:
        """Write every byte at `offset`; one system call may write fewer than asked (disk full, a signal)."""
        left = memoryview(data)
        while left:
            num_written = os.pwrite(descriptor, left, offset)
            left, offset = left[num_written:], offset + num_written

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        os.ftruncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        """Make a file's bytes durable."""
        os.fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name, taking the place of what has it."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name; nothing when it has none."""
        path.unlink(missing_ok=True)

    def make_directory(self, path: Path, mode: int = 0o777) -> None:
        """Make one directory unless it is there."""
        path.mkdir(mode, exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Make a directory's entries durable (POSIX: a new name needs its own fsync)."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


REAL = Disk()


class NewFile:
    """A file that gets its name when it is whole: room first, then bytes, then the name; gone unless it was named."""

    def __init__(self, path: Path, *, disk: Disk = REAL) -> None:
        self._path, self._disk = path, disk
        self._temporary: Path | None = path.with_name(f".{path.name}-{os.urandom(6).hex()}")
        self._descriptor = disk.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(self, pieces: Iterable[bytes]) -> int:
        """Write the file from its beginning, fsync it, and return its size."""
        size = 0
        for piece in pieces:
            self._disk.write(self._descriptor, piece, offset=size)
            size += len(piece)
        self._disk.truncate(self._descriptor, size)
        self._disk.fsync(self._descriptor)
        return size

    def reserve(self, num_bytes: int) -> None:
        """Take the room that `write` will need, so that a full disk shows now."""
        self._disk.write(self._descriptor, bytes(num_bytes), offset=0)

    def name(self, path: Path | None = None) -> None:
        """Give the written file its name (or another), durable on return."""
        target = path or self._path
        assert self._temporary is not None
        self._disk.replace(self._temporary, target)
        self._temporary = None
        self._disk.sync_directory(target.parent)

    def close(self) -> None:
        """Close the file, and remove it when it was not named."""
        self._disk.close(self._descriptor)
        if self._temporary is not None:
            self._disk.unlink(self._temporary)
            self._temporary = None

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_atomically(path: Path, data: bytes, *, disk: Disk = REAL) -> None:
    """Replace a file by `data`, whole or not at all, durable on return."""
    with NewFile(path, disk=disk) as file:
        file.write([data])
        file.name()


def make_directory(path: Path, mode: int = 0o777, *, disk: Disk = REAL) -> None:
    """Make a directory and what is missing above it, each durable; one that is there stays as it is."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        disk.make_directory(folder, mode)
        disk.sync_directory(folder.parent)
