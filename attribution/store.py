"""Content-addressed blobs and directories, verified on read.

ROOT/blobs/ab/<64 hex>        a blob, named by the SHA-256 of its bytes
ROOT/dirs/<64 hex>/           a directory, named by the SHA-256 of its manifest.json, which is written last

A directory is a real folder, so that libraries that want a path (transformers, peft) load from it as it lies.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import rfc8785

from attribution.disk import REAL, Disk, NewFile, make_directory
from attribution.disk import write_atomically as write_atomically
from configs.errors import UserError

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
COPY_BYTES = 1 << 20


class StoreError(UserError):
    """A blob or directory that is missing, altered or cannot be stored."""


def digest_of(data: bytes) -> str:
    """Return `sha256:<64 hex>` of `data`."""
    return f"sha256:{sha256(data).hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """What a stored directory holds; `meta` is JSON without floats."""

    kind: str
    meta: Mapping[str, Any]
    files: tuple["ManifestFile", ...]

    def canonical(self) -> bytes:
        """Return the RFC 8785 bytes whose digest names the directory."""
        files: Any = [{"path": file.path, "sha256": file.sha256, "bytes": file.num_bytes} for file in self.files]
        return rfc8785.dumps({"v": MANIFEST_VERSION, "kind": self.kind, "meta": dict(self.meta), "files": files})


@dataclass(frozen=True)
class ManifestFile:
    """One file: POSIX path below the directory, SHA-256 in hex, size."""

    path: str
    sha256: str
    num_bytes: int


class Store:
    """Blobs and directories under one root: a local path or a file:// URL (other schemes: not yet)."""

    def __init__(self, url: str | Path, *, disk: Disk = REAL) -> None:
        self.root = _local_path(url)
        self._disk = disk

    def put_blob(self, source: bytes | Path) -> str:
        """Store bytes, or a file's bytes, and return their digest; durable when this returns."""
        directory = self.root / "blobs"
        make_directory(directory, disk=self._disk)
        hasher = sha256()
        with NewFile(directory / "new", disk=self._disk) as file:
            file.write(_hashed(hasher, source))
            digest = f"sha256:{hasher.hexdigest()}"
            target = self._blob_path(digest)
            self._disk.make_directory(target.parent)
            file.name(target)
            self._disk.sync_directory(directory)  # each time: whoever made blobs/ab may not have come to this line
        return digest

    def get_blob(self, digest: str) -> bytes:
        """Return the bytes of a digest; StoreError when they are missing or no longer match it."""
        path = self.path_of(digest)
        data = path.read_bytes()
        if digest_of(data) != digest:
            raise StoreError(f"blob {digest}: its bytes in {path} were altered; restore the file or put the blob again")
        return data

    def path_of(self, digest: str) -> Path:
        """Return the file of a blob or the folder of a directory, unverified."""
        for path in (self._blob_path(digest), self._directory_path(digest)):
            if path.exists():
                return path
        raise StoreError(f"digest {digest}: not in the store {self.root}; contribute, train or convert it here first")

    def has(self, digest: str) -> bool:
        """Return whether a blob or directory of that digest is here."""
        return self._blob_path(digest).exists() or self._directory_path(digest).exists()

    def delete(self, digest: str) -> None:
        """Remove a blob or directory for good; nothing happens when it is not here."""
        self._blob_path(digest).unlink(missing_ok=True)
        folder = self._directory_path(digest)
        if folder.exists():
            doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gone-")) / folder.name
            folder.rename(doomed)  # in one step, so that no half of it is found under its name
            self._disk.sync_directory(folder.parent)
            shutil.rmtree(doomed.parent)

    def put_directory(self, path: Path, *, kind: str, meta: Mapping[str, Any]) -> str:
        """Copy a folder's files and return the digest of their manifest; durable when this returns.

        `meta` is JSON without floats (canonical JSON of floats is not safe between languages: use micro-units or text).
        Symbolic links and a manifest.json of the caller's own are refused.
        """
        _refuse_floats(meta, "meta")
        directory = self.root / "dirs"
        make_directory(directory)
        temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".new-"))
        try:
            files = tuple(_copy_file(source, temporary, name) for source, name in _files_of(path))
            if not files:
                raise StoreError(f"directory {path}: holds no file")
            manifest = Manifest(kind, meta, files).canonical()
            with (temporary / MANIFEST).open("wb") as file:
                _copy(manifest, file)
            digest = digest_of(manifest)
            self._adopt(temporary, self._directory_path(digest))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return digest

    def manifest(self, digest: str) -> Manifest:
        """Return the manifest of a stored directory; StoreError when it is missing or altered."""
        path = self._directory_path(digest) / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"directory {digest}: not in the store {self.root}") from error
        if digest_of(data) != digest:
            raise StoreError(f"directory {digest}: {MANIFEST} was altered; its digest is {digest_of(data)}")
        return _parse_manifest(data)

    def get_directory(self, digest: str, verify: bool = True) -> Path:
        """Return the folder of a digest.

        With `verify`, every file is hashed again (about 1 GB/s) and no file may stand beside those of the manifest.
        StoreError names the file that is missing, altered or added.
        """
        folder = self._directory_path(digest)
        manifest = self.manifest(digest)
        if verify:
            _verify_files(folder, manifest, digest)
        return folder

    def _adopt(self, temporary: Path, target: Path) -> None:
        """Move a finished folder to its name; an equal one that is there already stays, an altered one is replaced."""
        for folder in {temporary, *(file.parent for file in temporary.rglob("*"))}:
            self._disk.sync_directory(folder)
        if target.exists():
            try:
                self.get_directory(f"sha256:{target.name}")
                self._disk.sync_directory(target.parent)  # whoever moved it there may not have come so far
                return
            except StoreError:
                shutil.rmtree(target)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # else another process stored the same content first
                raise
        self._disk.sync_directory(target.parent)

    def _blob_path(self, digest: str) -> Path:
        hexadecimal = _hexadecimal(digest)
        return self.root / "blobs" / hexadecimal[:2] / hexadecimal

    def _directory_path(self, digest: str) -> Path:
        return self.root / "dirs" / _hexadecimal(digest)


def open_directory(folder: Path) -> tuple[str, Manifest]:
    """Return digest and manifest of a stored directory that was copied anywhere, once its files are what that says.

    StoreError names the file that is missing, altered or added.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = _parse_manifest(data)
    except OSError as error:
        raise StoreError(f"directory {folder}: holds no {MANIFEST}, by which its digest is known") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"directory {folder}: its {MANIFEST} is not one that a store writes") from error
    if manifest.canonical() != data:
        raise StoreError(f"directory {folder}: its {MANIFEST} is not one that a store writes")
    digest = digest_of(data)
    _verify_files(folder, manifest, digest)
    return digest, manifest


def _local_path(url: str | Path) -> Path:
    text = str(url)
    if "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme != "file" or not rest.startswith("/"):
        raise StoreError(f"store {text!r}: only a local path or file:///PATH is supported")
    return Path(rest)


def _hexadecimal(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise StoreError(f"digest {digest!r}: must be 'sha256:' and 64 hex digits")
    return digest.removeprefix("sha256:")


def _copy(source: bytes | Path, file: Any) -> tuple[str, int]:
    """Write `source` to an open file, fsync it, return its SHA-256 in hex and its size."""
    hasher, num_bytes = sha256(), 0
    for piece in _hashed(hasher, source):
        file.write(piece)
        num_bytes += len(piece)
    file.flush()
    os.fsync(file.fileno())
    return hasher.hexdigest(), num_bytes


def _hashed(hasher: Any, source: bytes | Path) -> Iterator[bytes]:
    """The pieces of `source`, each taken into the hash on its way."""
    for piece in [source] if isinstance(source, bytes) else _pieces(source):
        hasher.update(piece)
        yield piece


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            yield piece


def _copy_file(source: Path, folder: Path, name: str) -> ManifestFile:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        hexadecimal, num_bytes = _copy(source, file)
    return ManifestFile(name, hexadecimal, num_bytes)


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """Every regular file below `path` with its POSIX name, sorted by name."""
    if not path.is_dir():
        raise StoreError(f"directory {path}: not a folder")
    found = []
    for source in path.rglob("*"):
        name = source.relative_to(path).as_posix()
        if source.is_symlink() or not (source.is_file() or source.is_dir()):
            raise StoreError(f"directory {path}: {name} is a link or a special file; store plain files only")
        if name == MANIFEST:
            raise StoreError(f"directory {path}: {MANIFEST} is the store's own name; rename that file")
        if source.is_file():
            found.append((source, name))
    return sorted(found, key=lambda pair: pair[1])


def _parse_manifest(data: bytes) -> Manifest:
    loaded = json.loads(data)
    files = tuple(ManifestFile(entry["path"], entry["sha256"], entry["bytes"]) for entry in loaded["files"])
    return Manifest(loaded["kind"], loaded["meta"], files)


def _verify_files(folder: Path, manifest: Manifest, digest: str) -> None:
    known = {file.path for file in manifest.files}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (not path.is_dir() and name not in known and name != MANIFEST):
            raise StoreError(f"directory {digest}: {name} is not in its manifest; remove it from {folder}")
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise StoreError(f"directory {digest}: its manifest names {file.path!r}, outside the directory")
        path = folder / file.path
        if not path.is_file():
            raise StoreError(f"directory {digest}: {file.path} is missing from {folder}")
        hasher = sha256()
        for piece in _pieces(path):
            hasher.update(piece)
        if hasher.hexdigest() != file.sha256:
            raise StoreError(f"directory {digest}: {file.path} was altered (sha256 {hasher.hexdigest()})")


def _refuse_floats(value: object, where: str) -> None:
    if isinstance(value, float):
        raise StoreError(f"{where} = {value!r}: a float; use an integer in micro-units or text")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_floats(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_floats(item, f"{where}[{index}]")
