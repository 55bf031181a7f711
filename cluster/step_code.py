"""Which code a step's result depends on: the sources reachable from its modules, and the packages those import.

A git commit would be too coarse (a line in a how-to would train everything again) and, with local changes, too blind.
"""

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rfc8785

ROOT = Path(__file__).resolve().parent.parent
OURS = frozenset({"attribution", "configs", "kernels", "pipelines", "serve_apps"})
NATIVE_SUFFIXES = frozenset({".c", ".h"})  # compiled on first use by the package that holds them


@lru_cache
def code_manifest(modules: tuple[str, ...]) -> bytes:
    """Return canonical JSON {"v", "files": {path: SHA-256}, "packages": {name: version}} of what `modules` reach.

    Imports inside functions count, imports for type checkers do not. A package is named as it is imported, and left out
    when no distribution has that name.
    """
    files: dict[str, str] = {}
    foreign: set[str] = set()
    waiting = [path for module in modules for path in _files_of(module)]
    assert waiting, f"{modules}: name modules of this distribution"
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in files:
            continue
        data = path.read_bytes()
        files[name] = sha256(data).hexdigest()
        if path.suffix == ".py":
            for module in _imports(ast.parse(data)):
                found = _files_of(module)
                waiting += found
                if not found:
                    foreign.add(module.partition(".")[0])
    packages = {name: release for name in foreign - sys.stdlib_module_names if (release := _version(name))}
    manifest: dict[str, Any] = {"v": 1, "files": files, "packages": packages}
    return rfc8785.dumps(manifest)


def changed_code(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the files and packages in which two manifests differ."""
    differing = []
    for part in ("files", "packages"):
        old, new = before.get(part, {}), after.get(part, {})
        differing += sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return differing


def _files_of(module: str) -> list[Path]:
    """The source of a module of ours, or of the module that a dotted name lies in; [] for everything else."""
    parts = module.split(".")
    if parts[0] not in OURS:
        return []
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        for source in (path.with_suffix(".py"), path / "__init__.py"):
            if source.is_file():
                return [source, *(file for file in source.parent.iterdir() if file.suffix in NATIVE_SUFFIXES)]
    return []


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a tree imports, dotted; `from a import b` gives `a.b`, for b may be a module."""
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _nodes(child)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
