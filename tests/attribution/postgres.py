"""A real PostgreSQL of its own for a test: Debian's programs, a temporary folder, a free port, never run as root."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.processes import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
USERS = ("postgres", "nobody")  # whom root becomes: PostgreSQL refuses to run as root
needs_postgres = pytest.mark.skipif(
    not PROGRAMS, reason="no PostgreSQL here (Debian: apt-get install postgresql); MLflow on it is not tested"
)


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the SQLAlchemy address of a fresh, empty database; everything is gone afterwards."""
    user = _user()
    folder = Path(tempfile.mkdtemp(prefix="trailmark-postgres-"))
    port = free_port()
    try:
        if user:
            shutil.chown(folder, user)
        _run(
            "initdb", "-D", str(folder / "data"), "-U", "trailmark", "-A", "trust", "-E", "UTF8", "--no-sync", user=user
        )
        settings = f"-p {port} -h 127.0.0.1 -k {folder} -F"  # -F: no fsync, the data is thrown away
        log = str(folder / "log")
        _run("pg_ctl", "-D", str(folder / "data"), "-o", settings, "-l", log, "-w", "-t", "120", "start", user=user)
        try:
            yield f"postgresql+psycopg2://trailmark@127.0.0.1:{port}/postgres"
        finally:
            _run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "-w", "stop", user=user)
    finally:
        shutil.rmtree(folder)


def _user() -> str | None:
    """The account to run it under, None for our own."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in USERS if name in known)


def _run(program: str, *arguments: str, user: str | None) -> None:
    command = [str(PROGRAMS[-1].with_name(program)), *arguments]
    done = subprocess.run(command, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()
