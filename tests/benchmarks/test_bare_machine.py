"""`make gpu` where only torch, triton, transformers, safetensors and numpy are installed, with what those need."""

import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_check import PROGRAMS
from configs import env

ROOT = Path(__file__).parents[2]
BARE = ("torch", "triton", "transformers", "safetensors", "numpy")
OURS = {"benchmarks", "configs", "kernels", "serve_apps"}
# Finds nothing else: what asks whether a package is there is told no.
SCRIPT = """
import importlib, importlib.machinery, sys

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_there = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if is_there else None

builtin = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") == "_frozen_importlib"]
sys.meta_path = [*builtin, Bare]
for name in ["gpu_check", *PROGRAMS]:
    importlib.import_module("benchmarks." + name)
from benchmarks import many_adapters
sys.exit(many_adapters.main(["--toy", "--check"]))
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions that these need, extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        needed = [Requirement(line) for line in distribution(name).requires or ()]
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def test_the_programs_import_and_serve_with_five_packages() -> None:
    bare = closure(BARE)
    allowed = {
        module
        for module, names in packages_distributions().items()
        if any(canonicalize_name(name) in bare for name in names)
    }
    assert {"torch", "tokenizers"} <= allowed and not allowed & {"ray", "peft", "mlflow", "pyarrow", "fastapi"}
    heading = f"ALLOWED = {allowed | OURS | set(sys.stdlib_module_names)!r}\nPROGRAMS = {PROGRAMS!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", heading + SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=env.child_environment({"PYTHONPATH": str(ROOT)}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
