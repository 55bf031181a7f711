"""The rules of the house, read from the source: who imports whom, where Ray may stand, how long a file is."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("attribution", "cluster", "configs", "kernels", "pipelines", "serve_apps")
# What each package may import of ours, besides itself.
MAY_IMPORT = {
    "configs": set(),
    "kernels": set(),
    "attribution": {"configs", "kernels"},
    "pipelines": {"attribution", "configs", "kernels", "serve_apps.engine"},
    "serve_apps": {"attribution", "configs", "kernels"},
    "cluster": {"attribution", "configs", "kernels", "pipelines", "serve_apps"},
}
RAY_FILES = (
    "cluster/*",
    "pipelines/*/driver.py",
    "pipelines/*/loop.py",
    "serve_apps/app.py",
    "serve_apps/gateway.py",
    "serve_apps/replica.py",
    "serve_apps/router.py",
    "attribution/actors.py",
)
# On a bare GPU machine there is torch, triton, transformers, safetensors and numpy, and no more.
BARE_PACKAGES = ("serve_apps/engine", "kernels")
BARE_FORBIDDEN = {"pydantic", "ray", "mlflow", "pyarrow", "fastapi", "starlette", "typer"}
TOP_LEVEL = {
    *PACKAGES,
    *("benchmarks", "docs", "tests", ".ci", ".gitignore", "pyproject.toml", "requirements.lock", "Makefile", "LICENSE"),
    *("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
}
MAX_LINES = 500
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def sources(*folders: str) -> list[Path]:
    """Every Python file below the folders, relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    """The parsed source of a file relative to the root."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports(path: Path, *, with_type_checking: bool = True) -> Iterator[str]:
    """Every module a file imports, as dotted names; `from a import b` yields `a.b`, for b may be a module."""
    for node in _nodes(tree_of(path), with_type_checking=with_type_checking):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _nodes(node: ast.AST, *, with_type_checking: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        is_guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if with_type_checking or not is_guard:
            yield from _nodes(child, with_type_checking=with_type_checking)


def _is_below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def tracked() -> list[str]:
    """The files git knows, or every file where this is no checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_layers(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path} imports {module}"
        for path in sources(package)
        for module in imports(path)
        if module.split(".")[0] in PACKAGES and not any(_is_below(module, name) for name in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_and_benchmarks_are_imported_by_no_package() -> None:
    wrong = [
        f"{path} imports {module}"
        for path in sources(*PACKAGES)
        for module in imports(path)
        if module.split(".")[0] in ("tests", "benchmarks")
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_stands_only_in_shells() -> None:
    wrong = [
        str(path)
        for path in sources(*PACKAGES)
        if any(_is_below(module, "ray") for module in imports(path))
        and not any(fnmatch(path.as_posix(), pattern) for pattern in RAY_FILES)
    ]
    assert not wrong, f"import ray outside the shells: {wrong}"


def test_engine_and_kernels_need_no_more_than_torch() -> None:
    wrong = [
        f"{path} imports {module}"
        for path in sources(*BARE_PACKAGES)
        for module in imports(path, with_type_checking=False)
        if module.split(".")[0] in BARE_FORBIDDEN
    ]
    assert not wrong, "\n".join(wrong)


def test_environment_is_read_in_one_file() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        for node in ast.walk(tree_of(path)):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if name in ENVIRONMENT_NAMES and isinstance(node.value, ast.Name) and node.value.id == "os":
                wrong.append(f"{path}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                wrong += [f"{path}:{node.lineno}" for alias in node.names if alias.name in ENVIRONMENT_NAMES]
    assert [place for place in wrong if not place.startswith("configs/env.py")] == []


def test_kernels_package_looks_older_than_the_hub_one() -> None:
    body = tree_of(Path("kernels/__init__.py")).body
    assert len(body) == 2, "a docstring and __version__, nothing else"
    assert ast.unparse(body[1]) == "__version__ = '0.0.0'"


def test_distribution_stays_at_0_1() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "trailmark"
    assert project["version"].startswith("0.1.")


def test_no_foreign_package_has_our_names() -> None:
    names = {found.metadata["Name"].lower() for found in distributions()}
    assert names.isdisjoint({*PACKAGES, "tests", "benchmarks"}), "uninstall it: it would stand before ours"


def test_licence_rules_of_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not any(line.startswith("pymerkle") for line in project["dependencies"]), "GPL: an oracle for tests only"
    assert not [path for path in sources(*PACKAGES) if any(_is_below(name, "pymerkle") for name in imports(path))]


def test_tests_is_no_package() -> None:
    assert not [path for path in sources("tests") if path.name == "__init__.py"]


def test_top_level_is_fixed() -> None:
    found = {name.split("/")[0] for name in tracked()}
    assert found <= TOP_LEVEL, f"not in the design's tree: {sorted(found - TOP_LEVEL)}"


def test_files_are_short() -> None:
    long = {}
    for path in sources(*PACKAGES, "tests", "benchmarks"):
        num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_LINES and path.parts[0] != "kernels":
            long[str(path)] = num_lines
    assert not long


def test_functions_are_short() -> None:
    long = []
    for path in sources(*PACKAGES):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.parts[0] != "kernels":
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{path}:{node.lineno} {node.name}: {num_lines} lines"] if num_lines > 60 else []
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is() -> None:
    silent = [str(path) for path in sources(*PACKAGES) if ast.get_docstring(tree_of(path)) is None]
    assert not silent


def test_names_say_what_they_hold() -> None:
    vague = {"manager", "helper", "helpers", "utils", "util", "common", "misc"}
    assert not [str(path) for path in sources(*PACKAGES) if vague & set(path.stem.lower().split("_"))]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("cluster.cli", ("torch", "ray", "pydantic", "pyarrow", "mlflow", "transformers", "numpy", "rich.table")),
        ("attribution.trail", ("torch", "ray", "mlflow", "transformers")),
        ("attribution.lineage", ("torch", "ray", "mlflow", "transformers")),
        ("attribution.log.verify", ("torch", "ray", "mlflow", "transformers", "pyarrow", "pydantic")),
        ("serve_apps.engine.engine", ("ray", "pydantic", "mlflow", "fastapi")),
    ],
)
def test_importing_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
