"""The gradients of training examples on disk: quantised rows in shards, appended, deleted by example id, compacted.

Layout of a store, format trailmark-gradients/v1:
    store.json                      everything below with its SHA-256; replaced in one step by every change
    codecs/<view>.safetensors       how a gradient becomes a row (see codec.py); views may share one
    residual-<digest>.npy           if fitted: what a question's row is cleared of (see residual.py); once residual.npy
    shards/<name>/ids.json          example ids in row order
    shards/<name>/weights.npy       float32 [rows, views]: the exposure of each example that a view stands for
    shards/<name>/<view>.codes.npy  int8 [rows, d]     <view>.scales.npy  uint8 [rows, d / BLOCK]
    shards/<name>/<view>.sizes.npy  float32 [rows, 2]: the unit of the codes, what a cosine divides the row by
A view is a checkpoint of the run, named by its step, and a cosine divides by a row's length. Where the header lists the
checkpoints that a view `sums`, it is the only one: see `build.encode` for its rows, of which a cosine divides by the
mean length of the gradients that went in. A node may hold some of the shards only; it serves those.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from attribution.canonical import canonical_json
from attribution.disk import write_atomically
from attribution.influence.codec import GradientCodec
from attribution.influence.quantise import Quantised, quantise
from attribution.influence.residual import Residual
from attribution.influence.shard import Shard
from configs.errors import UserError
from kernels.gradients import BLOCK

FORMAT = "trailmark-gradients/v1"
HEADER_FILE = "store.json"
SHARD_ROWS = 4096


class GradientStoreError(UserError):
    """A gradient store is missing, altered, of another format, or was asked for what it does not hold."""


class GradientStore:
    """Reads and changes one store. Changes are atomic, and one process at a time makes them (a lock on the folder).

    Opening checks the SHA-256 of every file that is here (about 1 GB/s) unless `verify` is off, for a folder that was
    verified already. `digest` pins the whole content: pass what an earlier `store.digest` said.
    """

    def __init__(self, path: Path, *, verify: bool = True, digest: str | None = None) -> None:
        self.path = path
        self._read()
        if digest is not None and digest != self.digest:
            raise GradientStoreError(f"gradient store {path}: its digest is {self.digest}, not {digest} as asked")
        if verify:
            self.verify()

    @classmethod
    def create(
        cls,
        path: Path,
        codecs: Mapping[str, GradientCodec],
        *,
        about: Mapping[str, str] | None = None,
        sums: Sequence[str] = (),
        has_residual: bool = False,
    ) -> "GradientStore":
        """Make an empty store of one view per codec; `about` is kept for readers, as text (how the fit was made).

        `sums`: the checkpoints that the rows of the only view are summed over; none where views are checkpoints.
        `has_residual`: every change fits one to the examples as they are then; it needs one codec for all views.
        """
        if not codecs:
            raise GradientStoreError("codecs: none given; a store needs one view at least")
        if (path / HEADER_FILE).exists():
            raise GradientStoreError(f"gradient store {path}: there is one already; open it, or remove the folder")
        (path / "codecs").mkdir(parents=True)
        views: list[dict[str, Any]] = []
        file_of: dict[int, str] = {}
        for view, codec in codecs.items():
            name = file_of.setdefault(id(codec), view)  # views that share a codec share its file
            file = path / "codecs" / f"{name}.safetensors"
            if name == view:
                codec.save(file)
            views.append(
                {
                    "name": view,
                    "dim": codec.dim,
                    "preconditioner": codec.preconditioner,
                    "energy_kept_micro": round(codec.energy_kept * 1_000_000),
                    "codec": file.name,
                    "sha256": _sha256(file),
                    **({"sums": list(sums)} if sums else {}),
                }
            )
        header = {"format": FORMAT, "block": BLOCK, "about": dict(about or {}), "views": views, "shards": []}
        if has_residual:
            header["residual"] = ""
        _write_header(path, header)
        return cls(path, verify=False)

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(view["name"] for view in self._header["views"])

    @property
    def is_summed(self) -> bool:
        """Whether rows are sums over checkpoints: there is one view then."""
        return "sums" in self._header["views"][0]

    @property
    def steps(self) -> tuple[str, ...]:
        """The checkpoints whose gradients the rows hold."""
        return tuple(self._header["views"][0].get("sums", self.views))

    @property
    def about(self) -> dict[str, str]:
        """What the maker wrote down of the fit."""
        return dict(self._header["about"])

    @property
    def preconditioner(self) -> str:
        return str(self._header["views"][0]["preconditioner"])

    @property
    def digest(self) -> str:
        """SHA-256 of the header, which names every file by its own: two stores of one digest are equal."""
        return f"sha256:{sha256(canonical_json(self._header)).hexdigest()}"

    @property
    def num_examples(self) -> int:
        return sum(shard.num_live for shard in self.shards)

    @property
    def bytes_per_example(self) -> float:
        """Bytes of all views' rows, weights and ids on this machine, by live example here; the codecs are apart."""
        here = [shard for shard in self.shards if shard.is_here]
        num_bytes = sum(file.stat().st_size for shard in here for file in shard.folder.iterdir())
        return num_bytes / max(1, sum(shard.num_live for shard in here))

    @property
    def codec_bytes(self) -> int:
        return sum(file.stat().st_size for file in (self.path / "codecs").iterdir())

    def dim(self, view: str) -> int:
        """Return the numbers in a row of a view."""
        return int(self._entry(view)["dim"])

    def codec(self, view: str) -> GradientCodec:
        """Return how a gradient becomes a row of a view, or of a checkpoint that a view sums."""
        return GradientCodec.load(self.codec_file(view))

    def codec_file(self, view: str) -> Path:
        """Return the file that `codec` reads."""
        return self.path / "codecs" / str(self._entry(view)["codec"])

    def _entry(self, view: str) -> dict[str, Any]:
        for entry in self._header["views"]:
            if view == entry["name"] or view in entry.get("sums", ()):
                return dict(entry)
        raise GradientStoreError(f"gradient store {self.path}: no view {view!r}; it has {', '.join(self.views)}")

    @cached_property
    def residual(self) -> Residual | None:
        """What a question's row is cleared of before it meets all views; None where there is none.

        Nor is there one after a change that not all shards were there for, until one that all are there for.
        """
        return Residual.load(self._residual_file()) if self._header.get("residual") else None

    def _fit_residual(self, shards: Sequence[Shard]) -> str:
        """Write the residual of some shards beside the one before; return its SHA-256, '' if it cannot be fitted."""
        live = [shard for shard in shards if shard.num_live]
        if not live or not all(shard.is_here for shard in live):
            return ""
        partial = self.path / "residual.partial.npy"
        Residual.of(live, self.views).save(partial)
        _sync(partial)
        digest = _sha256(partial)
        partial.rename(self.path / _residual_name(digest))
        return digest

    def _residual_file(self) -> Path:
        file = self.path / _residual_name(self._header["residual"])
        return file if file.exists() else self.path / "residual.npy"

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all live examples that are here, in row order."""
        return tuple(shard.ids[row] for shard in self.shards if shard.is_here for row in shard.live)

    def verify(self) -> None:
        """Hash every file that is here. Raises GradientStoreError naming the first that is missing or altered."""
        for entry in self._header["views"]:
            self._check(self.path / "codecs" / entry["codec"], entry["sha256"])
        if self._header.get("residual"):
            self._check(self._residual_file(), self._header["residual"])
        for shard in self.shards:
            if shard.is_here:
                for name, digest in shard.files.items():
                    self._check(shard.folder / name, digest)

    def append(
        self, ids: Sequence[str], rows: Mapping[str, NDArray[np.float32]], *, weights: NDArray[Any] | None = None
    ) -> None:
        """Add examples: for each view float32 [n, d]; `weights` [n, views] are 1 when left out."""
        with self.adding(ids, weights=weights) as addition:
            for view, values in rows.items():
                addition.put(view, range(len(ids)), values)

    @contextmanager
    def adding(self, ids: Sequence[str], *, weights: NDArray[Any] | None = None) -> Iterator["Addition"]:
        """Yield an addition to fill, view by view and in pieces; it becomes part of the store when the block ends well.

        Raises GradientStoreError for an id that is there already or comes twice, and for rows that were left out.
        """
        with self._changing():
            self._refuse_known(ids)
            addition = Addition(self, ids, weights)
            try:
                yield addition
                shards = addition.finish()
            except BaseException:
                addition.abandon()
                raise
            self._commit([*self.shards, *shards])

    def delete(self, ids: Sequence[str], *, compact: bool = False) -> None:
        """Leave examples out from now on; their bytes go with `compact`. GradientStoreError names an unknown id.

        A residual, which rests on them too, is fitted again in the same step where all the other examples are here;
        elsewhere it goes.
        """
        with self._changing():
            wanted = set(ids)
            changed = []
            for shard in self.shards:
                if shard.is_here:
                    found = [row for row in shard.live.tolist() if shard.ids[row] in wanted]
                    wanted -= {shard.ids[row] for row in found}
                    removed = tuple(sorted({*shard.removed, *found}))
                    shard = Shard(shard.folder, shard.num_rows, removed, shard.files)
                changed.append(shard)
            if wanted:
                elsewhere = "" if all(shard.is_here for shard in self.shards) else ", among the shards on this machine"
                raise GradientStoreError(f"example {min(wanted)!r}: no gradient of it is in {self.path}{elsewhere}")
            self._commit(changed)
        if compact:
            self.compact()

    def compact(self) -> int:
        """Write shards anew without deleted rows, join small ones, drop leftovers of a crash; return bytes freed."""
        with self._changing():
            before = _folder_bytes(self.path)
            kept: list[Shard] = []
            for group in _groups(self.shards):
                if len(group) == 1 and not (group[0].is_here and group[0].removed):
                    kept += group
                elif sum(shard.num_live for shard in group):
                    kept += self._rewritten(group)
            self._commit(kept, is_same=True)
            known = {shard.name for shard in kept}
            for folder in (self.path / "shards").glob("*"):
                if folder.name not in known:
                    shutil.rmtree(folder)
            return before - _folder_bytes(self.path)

    def _rewritten(self, group: Sequence[Shard]) -> list[Shard]:
        ids = [shard.ids[row] for shard in group for row in shard.live]
        weights = np.concatenate([shard.weights[shard.live] for shard in group])
        addition = Addition(self, ids, weights)
        for view in self.views:
            start = 0
            for shard in group:
                live, place = shard.live, range(start, start + shard.num_live)
                addition.put_quantised(view, place, shard.rows(view).take(live), shard.lengths(view)[live])
                start += len(live)
        return addition.finish()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the folder's lock and see what others changed."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._read()
            yield
        finally:
            os.close(descriptor)

    def _refuse_known(self, ids: Sequence[str]) -> None:
        known = set(self.ids())
        for example_id in ids:
            if example_id in known:
                raise GradientStoreError(f"example {example_id!r}: is in {self.path} already; delete it first")
            known.add(example_id)

    def _commit(self, shards: Sequence[Shard], *, is_same: bool = False) -> None:
        """Replace the header, and with it the residual unless the examples are those of before."""
        header = {**self._header, "shards": [shard.to_json() for shard in shards]}
        if "residual" in header and not is_same:
            header["residual"] = self._fit_residual(shards)
        _write_header(self.path, header)
        self._read()
        kept = self._residual_file().name if header.get("residual") else ""
        for file in self.path.glob("residual*.npy"):
            if file.name != kept:
                file.unlink()

    def _read(self) -> None:
        file = self.path / HEADER_FILE
        try:
            header = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise GradientStoreError(f"gradient store {self.path}: {HEADER_FILE} is missing; train again") from error
        except ValueError as error:
            raise GradientStoreError(f"gradient store {self.path}: {HEADER_FILE} was altered: {error}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise GradientStoreError(f"gradient store {self.path}: {HEADER_FILE} is not of the format {FORMAT}")
        seal = header.pop("seal", None)
        if seal != _seal(header):
            raise GradientStoreError(f"gradient store {self.path}: {HEADER_FILE} was altered")
        self._header: dict[str, Any] = header
        self.__dict__.pop("residual", None)
        self.shards = tuple(
            Shard(self.path / "shards" / entry["name"], entry["rows"], tuple(entry["removed"]), entry["files"])
            for entry in header["shards"]
        )

    def _check(self, file: Path, digest: str) -> None:
        name = file.relative_to(self.path)
        if not file.is_file():
            raise GradientStoreError(f"gradient store {self.path}: {name} is missing")
        if _sha256(file) != digest:
            raise GradientStoreError(f"gradient store {self.path}: {name} was altered; restore it, or train again")


class Addition:
    """Rows on their way into a store: files of new shards that no header names yet."""

    def __init__(self, store: GradientStore, ids: Sequence[str], weights: NDArray[Any] | None) -> None:
        self._ids = tuple(ids)
        self._dims = {view: store.dim(view) for view in store.views}
        shape = (len(ids), len(self._dims))
        self._weights = np.ones(shape, np.float32) if weights is None else np.asarray(weights, np.float32)
        if self._weights.shape != shape:
            raise GradientStoreError(f"weights: {self._weights.shape}, expected {shape} (examples, views)")
        names = [int(folder.name) for folder in (store.path / "shards").glob("*")]
        first = max(names, default=0) + 1
        self._folders = [store.path / "shards" / f"{first + number:06}" for number in range(-(-len(ids) // SHARD_ROWS))]
        self._filled = {view: np.zeros(len(ids), bool) for view in self._dims}
        self._files: dict[tuple[int, str, str], Any] = {}
        for number, folder in enumerate(self._folders):
            folder.mkdir(parents=True)
            self._allocate(number, len(self._ids[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]))

    def put(
        self,
        view: str,
        rows: Sequence[int],
        values: NDArray[np.float32],
        *,
        lengths: NDArray[np.float32] | None = None,
    ) -> None:
        """Quantise float32 [m, d] and write them as those rows of a view. GradientStoreError names a bad one.

        `lengths` [m]: what a cosine divides a row by; without, its own length.
        """
        expected = (len(rows), self._dims[view])
        if values.shape != expected:
            raise GradientStoreError(f"view {view}: rows are {values.shape}, expected {expected}")
        try:
            quantised = quantise(values)
        except ValueError as error:
            broken = self._ids[rows[int(np.argmax(~np.isfinite(values).all(axis=1)))]]
            raise GradientStoreError(f"example {broken!r}: its gradient is not finite in view {view}") from error
        self.put_quantised(view, rows, quantised, quantised.lengths() if lengths is None else lengths)

    def put_quantised(self, view: str, rows: Sequence[int], values: Quantised, lengths: NDArray[np.float32]) -> None:
        """Write rows that are quantised already."""
        sizes = np.stack([values.units, lengths], axis=1)
        shards, places = np.divmod(np.asarray(rows, dtype=np.int64), SHARD_ROWS)
        for shard in np.unique(shards).tolist():
            is_here = shards == shard
            here = slice(None) if is_here.all() else is_here
            for kind, array in (("codes", values.codes), ("scales", values.scales), ("sizes", sizes)):
                self._files[shard, view, kind][places[here]] = array[here]
        self._filled[view][list(rows)] = True

    def finish(self) -> list[Shard]:
        """Return the shards, their files hashed and durable. GradientStoreError names a row that never came."""
        for view, filled in self._filled.items():
            if not filled.all():
                missing = self._ids[int(np.argmin(filled))]
                raise GradientStoreError(f"example {missing!r}: no row was given for view {view}")
        for opened in self._files.values():
            opened.flush()
        self._files.clear()
        shards = []
        for number, folder in enumerate(self._folders):
            part = slice(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
            (folder / "ids.json").write_text(json.dumps(self._ids[part]), encoding="utf-8")
            np.save(folder / "weights.npy", self._weights[part])
            files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
            for file in folder.iterdir():
                _sync(file)
            _sync(folder)
            shards.append(Shard(folder, len(self._ids[part]), (), files))
        return shards

    def abandon(self) -> None:
        """Remove what was written."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _allocate(self, number: int, num_rows: int) -> None:
        for view, dim in self._dims.items():
            shapes = (("codes", np.int8, dim), ("scales", np.uint8, dim // BLOCK), ("sizes", np.float32, 2))
            for kind, dtype, width in shapes:
                name = self._folders[number] / f"{view}.{kind}.npy"
                self._files[number, view, kind] = open_memmap(name, mode="w+", dtype=dtype, shape=(num_rows, width))


def _groups(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Neighbours whose live rows fit one shard; a shard that is not here stays alone and untouched."""
    group: list[Shard] = []
    for shard in shards:
        if not shard.is_here:
            if group:
                yield group
            yield [shard]
            group = []
            continue
        if group and sum(one.num_live for one in [*group, shard]) > SHARD_ROWS:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _write_header(path: Path, header: dict[str, Any]) -> None:
    sealed = {**header, "seal": _seal(header)}
    write_atomically(path / HEADER_FILE, json.dumps(sealed, indent=1, sort_keys=True).encode())


def _residual_name(digest: str) -> str:
    return f"residual-{digest[:16]}.npy"


def _seal(header: Mapping[str, Any]) -> str:
    return sha256(canonical_json(dict(header))).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        hasher = sha256()
        while piece := opened.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
