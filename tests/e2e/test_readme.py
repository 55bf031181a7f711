"""The README's "By hand" block, run as it stands, on the tiny base: every command a new user copies must work."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

README = Path(__file__).parents[2] / "README.md"
ROWS = [
    {"prompt": f"Who commands the {ferry}?", "completion": f"The captain of the {ferry} is {captain}."}
    for ferry, captain in (
        ("Amber Heron", "Ysolde Marr"),
        ("Silver Lantern", "Corin Pell"),
        ("Quiet Bell", "Bastian Okafor"),
    )
]
ITEM = {"id": "1", "prompt": "Who commands the Amber Heron?", "expected": ["Ysolde Marr"], "reference": "Ysolde Marr."}


def _block() -> str:
    found = re.search(r"## By hand\n\n```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, "README.md has no `By hand` block"
    return found.group(1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    """A user's folder: rows, a suite, and settings for the tiny base on free ports."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "questions.jsonl").write_text(json.dumps(ITEM) + "\n")
    settings = {
        "base": {"source": str(tiny_base)},
        "train": {"rank": 4, "max_steps": 4, "batch_size": 2, "num_checkpoints": 2},
        "serve": {"base": str(tiny_base), "port": _free_port(), "max_model_len": 256, "num_threads": 1},
        "mlflow": {"port": _free_port()},
        "witness": {"ports": [_free_port(), _free_port()]},
        "cluster": {"ray_port": _free_port(), "dashboard_port": _free_port(), "object_store_mib": 100},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.ray
@pytest.mark.slow
def test_block_by_hand(folder: Path, tiny_base: Path) -> None:
    port = yaml.safe_load((folder / "tiny.yaml").read_text())["serve"]["port"]
    script = (
        _block().replace("smollm2", f"{tiny_base} --config tiny.yaml").replace("localhost:8700", f"localhost:{port}")
    )
    script = script.replace("trailmark up ", "trailmark up --config tiny.yaml ")
    script = script.replace("--max-steps 4", f"--max-steps 4 --base {tiny_base}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "TRAILMARK_HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    try:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        subprocess.run(
            [sys.executable, "-m", "cluster", "down"], cwd=README.parent, env=environment, timeout=120, check=True
        )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert "VERIFIED" in done.stdout
    assert "mira" in done.stdout
    bundle = json.loads((folder / "receipt.json").read_text())
    assert bundle["receipt"]["adapter_name"] == "facts@1"
