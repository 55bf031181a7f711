"""What `trailmark up` started, written down in HOME/run so that later commands find it."""

import hashlib
import json
import os
import secrets
import stat
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.processes import ProcessId
from configs.errors import UserError

STATE_VERSION = 1


@dataclass(frozen=True)
class Part:
    """One part of the cluster: where it answers and the process that is its root."""

    name: str
    address: str
    process_id: ProcessId

    @property
    def alive(self) -> bool:
        """Whether the root process lives."""
        return self.process_id.process() is not None


@dataclass(frozen=True)
class ClusterState:
    """The cluster of one home. `ray_address` is empty while no head was started."""

    cluster_id: str
    ray_address: str = ""
    dashboard_url: str = ""
    api_url: str = ""
    mlflow_url: str = ""
    temp_dir: str = ""
    parts: tuple[Part, ...] = ()

    def part(self, name: str) -> Part | None:
        """Return the part by name, dead or alive, or None."""
        return next((part for part in self.parts if part.name == name), None)

    def is_alive(self, name: str) -> bool:
        """Whether the part was started and its process lives."""
        part = self.part(name)
        return part is not None and part.alive

    def with_part(self, part: Part) -> "ClusterState":
        """Return the state with `part` in the place of one of its name."""
        return replace(self, parts=(*(other for other in self.parts if other.name != part.name), part))


def run_directory(home: Path) -> Path:
    """Return HOME/run, made on first use for this user alone, as is the home."""
    return private_directory(home, name="run")


def private_directory(home: Path, *, name: str) -> Path:
    """Return HOME/NAME; it and the home get mode 0700 when they are made here."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)  # on its own: a parent made in passing would get 0755
    folder = home / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def cluster_id_of(home: Path) -> str:
    """Return the id of the home's cluster: one home, one cluster."""
    return hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]


def load_state(home: Path) -> ClusterState:
    """Return what is written down; an empty state when nothing is."""
    file = home / "run" / "cluster.json"
    if not file.is_file():
        return ClusterState(cluster_id=cluster_id_of(home))
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.pop("version") != STATE_VERSION:
        raise UserError(f"{file}: written by another trailmark; stop that cluster with it, then remove the file")
    parts = tuple(Part(part["name"], part["address"], ProcessId(**part["process_id"])) for part in fields.pop("parts"))
    return ClusterState(**fields, parts=parts)


def save_state(home: Path, state: ClusterState) -> None:
    """Write the state in one step: a reader sees the old or the new one."""
    folder = run_directory(home)
    draft = folder / f"cluster.json.{os.getpid()}"
    draft.write_text(json.dumps({"version": STATE_VERSION, **asdict(state)}, indent=2), encoding="utf-8")
    draft.replace(folder / "cluster.json")


def forget_state(home: Path) -> None:
    """Remove what was written down."""
    (home / "run" / "cluster.json").unlink(missing_ok=True)


def ensure_token(home: Path) -> Path:
    """Return the file of the cluster's token (0600), made on first use: Ray would write its own world-readable."""
    file = run_directory(home) / "ray_token"
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32))
    if stat.S_IMODE(file.stat().st_mode) != 0o600:
        raise UserError(f"{file}: readable by others; run `chmod 600 {file}`, or remove it between `down` and `up`")
    return file


def ensure_ray_directory(cluster_id: str, *, name: str) -> Path:
    """Return a folder for Ray's sessions, for this user alone, and short: a unix socket's path ends at 107 bytes.

    Ray opens the folder it is given to everybody (mode 0777), so it is given one inside a folder that stays closed.
    """
    base = Path(tempfile.gettempdir())
    folder = (base if len(str(base)) <= 12 else Path("/tmp")) / f"trailmark-{cluster_id}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{folder}: must be a folder that only you can enter; remove it and try again")
    inner = folder / name
    inner.mkdir(exist_ok=True)
    return inner
