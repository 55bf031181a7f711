"""Runs test_local.py in a process of its own: Ray keeps a process's first token and connection."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import env


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_local_in_a_process_of_its_own() -> None:
    names = [name for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH") if env.variable(name)]
    environment = {k: v for k, v in env.child_environment({"TRAILMARK_TEST_ALONE": "1"}).items() if k not in names}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_local.py")),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
