"""Compiling the C kernels: once, safely for several processes, and doing without."""

import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import native
from kernels.native import Native


def test_the_library_shares_torchs_threads(native: Native) -> None:
    """One libgomp in the process, so one pool of threads."""
    assert native.path.exists()
    mapped = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"\S*libgomp\S*", mapped))) == 1


def test_a_second_process_finds_the_compiled_library(native: Native) -> None:
    program = (
        "import sys, subprocess, kernels.native as n; from pathlib import Path;"
        "n._compile = lambda *_: sys.exit('compiled again');"
        f"print(n.load(Path({str(native.path.parent)!r})).path)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == native.path


def test_processes_that_compile_at_once_do_no_harm(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All compile at the same time into the same name; each opens a whole library and no scratch is left."""
    target = tmp_path / "cache" / native.path.name
    monkeypatch.setattr("kernels.native.FLAGS", ("-O0", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi"))
    from kernels.native import _compile, _open

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: _compile("cc", target), range(3)))
    assert _open(target).path == target
    assert list(target.parent.iterdir()) == [target]


def test_no_compiler_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert native.load(tmp_path) is None
    assert [record.message for record in caplog.records if "no C compiler" in record.message] == [
        record.message for record in caplog.records
    ]


def test_a_failing_compiler_is_one_warning_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such target' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(compiler))
    with caplog.at_level(logging.WARNING):
        assert native.load(tmp_path / "cache") is None
    assert len(caplog.records) == 1 and "no such target" in caplog.text
