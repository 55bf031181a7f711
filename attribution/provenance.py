"""Which code and which packages are running: what a record says of its own making."""

import platform
import subprocess
import sys
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rfc8785

from attribution.records import CodeIdentity

DISTRIBUTION = "trailmark"
GIT_TIMEOUT_S = 10


@lru_cache(maxsize=1)
def code_identity() -> CodeIdentity:
    """Return commit, dirty flag and version of the running code; the commit is '' outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else ""
    dirty = bool(commit) and bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    try:
        distribution_version = version(DISTRIBUTION)
    except PackageNotFoundError:
        distribution_version = ""
    return CodeIdentity(commit, dirty, distribution_version)


@lru_cache(maxsize=1)
def environment_manifest() -> bytes:
    """Return canonical JSON of the Python version, the platform and every installed (package, version), sorted.

    Names are read off the metadata folders on the import path (about 5 ms for 300 packages; parsing each package's
    metadata takes 300 ms), the first on the path winning as it does on import.
    """
    packages: dict[str, str] = {}
    for entry in sys.path:
        for name, release in sorted(_packages_in(Path(entry or "."))):
            packages.setdefault(name, release)
    manifest: Any = {
        "v": 1,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "packages": [[name, packages[name]] for name in sorted(packages)],
    }
    return rfc8785.dumps(manifest)


@lru_cache(maxsize=1)
def environment_digest() -> str:
    """Return `sha256:<hex>` of the environment manifest."""
    return f"sha256:{sha256(environment_manifest()).hexdigest()}"


def _packages_in(folder: Path) -> list[tuple[str, str]]:
    """The (normalised name, version) of each installed distribution in one folder."""
    try:
        found = [path.name for path in folder.iterdir() if path.name.endswith((".dist-info", ".egg-info"))]
    except OSError:
        return []
    stems = [name.rpartition(".")[0].split("-") for name in found]
    return [(stem[0].lower().replace("_", "-").replace(".", "-"), stem[1]) for stem in stems if len(stem) > 1]


def _git(root: Path, *arguments: str) -> str:
    """The output of a git command, '' when git is absent or refuses."""
    try:
        finished = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return finished.stdout.strip()
