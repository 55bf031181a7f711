"""The only reader of the process environment.

Every other module is handed values; this file lists each variable that changes Trailmark's behaviour.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

HOME_DIRECTORY_NAME = ".trailmark"


def home() -> Path:
    """Return $TRAILMARK_HOME, else the nearest `.trailmark/` at or above the working directory, else `~/.trailmark`."""
    explicit = os.environ.get("TRAILMARK_HOME")
    if explicit:
        return Path(explicit).expanduser().resolve()
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / HOME_DIRECTORY_NAME).is_dir():
            return folder / HOME_DIRECTORY_NAME
    return Path.home() / HOME_DIRECTORY_NAME


def native_kernels() -> bool:
    """Return whether CPU kernels may be compiled and used: $TRAILMARK_NATIVE_KERNELS is not 0, off or no."""
    return os.environ.get("TRAILMARK_NATIVE_KERNELS", "").lower() not in ("0", "off", "no")


def cache_home() -> Path:
    """Return the user's folder for what can be made again: $TRAILMARK_CACHE, else trailmark/ in the XDG cache."""
    explicit = os.environ.get("TRAILMARK_CACHE")
    if explicit:
        return Path(explicit).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trailmark"


def key_passphrase() -> str | None:
    """Return the passphrase of signing keys, $TRAILMARK_KEY_PASSPHRASE, None when it is not set."""
    return os.environ.get("TRAILMARK_KEY_PASSPHRASE")


def is_interactive() -> bool:
    """Return whether there is a terminal to ask at."""
    return sys.stdin is not None and sys.stdin.isatty()


def set_variables(values: dict[str, str]) -> None:
    """Set variables for this process and its children (Ray, DeepSpeed and MLflow read theirs from the environment)."""
    os.environ.update(values)


def variable(name: str, default: str = "") -> str:
    """Return one variable or `default`."""
    return os.environ.get(name, default)


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """Return a copy of the environment with `extra` on top, for a subprocess."""
    return {**os.environ, **extra}


@contextlib.contextmanager
def temporary_variables(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the block, then put back what they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
