"""The how-to's workflow on the tiny base, by the command line: killed in training, resumed, signed, published."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from attribution.settlement import settlements
from attribution.trail import Trail
from attribution.workflow_runs import recorded_runs
from cluster.cli import app
from cluster.processes import stop_processes, wait_until
from tests.tiny_model import QUESTIONS

REPOSITORY = Path(__file__).parents[2]
HOW_TO = REPOSITORY / "docs" / "platform-team.md"
SMALL = {"rank": 2, "max_steps": 2, "batch_size": 4, "max_length": 64, "num_workers": 1, "num_checkpoints": 1}


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The how-to's file with a tiny base and few steps, rows, a suite, and a home."""
    block = re.search(r"```yaml\n(name: facts\n.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    assert block, "docs/platform-team.md has no workflow"
    workflow = yaml.safe_load(block.group(1))
    workflow |= {"base": str(tiny_base)}
    benchmark = {"max_new_tokens": 4, "num_bootstrap": 100}
    workflow["settings"] = {"train": SMALL, "benchmark": benchmark, "settle": {"num_workers": 1}}
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(workflow, sort_keys=False))
    rows = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS]
    for name, part in {"mira": rows[:4], "otto": rows[4:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    items = [{"id": str(i), "prompt": q, "expected": [a], "reference": a} for i, (q, a) in enumerate(QUESTIONS[:4])]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trailmark(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def kill_in_training(folder: Path) -> None:
    """Start the workflow as a process with a Ray of its own, and kill -9 it once training is under way."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (folder / "killed.log").open("wb") as log:
        command = [sys.executable, "-P", "-m", "cluster", "run", "facts.yaml"]
        driver = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        training = folder / "home" / "run" / "train"
        began = wait_until(lambda: driver.poll() is not None or any(training.glob("*/*")), timeout_s=240)
        children = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        assert began and children, (folder / "killed.log").read_text()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # Ray 2.60 follows its driver, but for an agent that was still there after 30 s.
    stop_processes(child for child in children if child.is_running())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_killed_resumed_signed_published(folder: Path) -> None:
    for name in ("mira", "otto"):
        trailmark("contributor", "add", name)
        trailmark("contribute", f"{name}.jsonl", "--as", name, "--licence", "CC0-1.0")
    dry = trailmark("run", "facts.yaml", "--dry-run").output
    assert "never ran" in dry and "needs what train will make" in dry
    kill_in_training(folder)
    trail = Trail.open(folder / "home")
    assert recorded_runs(trail) == [] and not list(trail.entries(kind="adapter"))

    output = trailmark("run", "facts.yaml", code=3).output
    assert "attempt 2: the one before was killed" in output and "train killed: its driver was killed" in output
    assert "trailmark approve facts-1 sign-off --as NAME" in output
    killed, waiting = recorded_runs(trail)
    assert {step.name: step.status for step in killed.steps} == {"refine": "done", "train": "killed"}
    assert [step.status for step in waiting.steps] == ["reused", "done", "done", "waiting", "skipped", "skipped"]
    assert (waiting.attempt, waiting.parent) == (2, killed.leaf_hash)
    assert len(list(trail.entries(kind="refinement"))) == 1

    trailmark("approve", "facts-1", "sign-off", "--as", "mira", "--note", "read the answers")
    trailmark("run", "--resume", "facts")
    adapter = waiting.step("train").outputs[0].artefact.digest  # type: ignore[union-attr]
    assert trail.registry.resolve("facts@1").digest == adapter
    (settled,) = settlements(trail, adapter)
    assert {player.name for player in settled.players} == {"mira", "otto"} and settled.num_coalitions == 4
    size = Trail.open(folder / "home").log.size
    assert "facts: nothing to do" in trailmark("run", "facts.yaml").output
    assert Trail.open(folder / "home").log.size == size

    story = trailmark("workflow", "log", "facts").output
    for told in (
        "facts-1 attempt 1 killed",
        "facts-1 attempt 2 waiting",
        "sign-off approved by mira: read the answers",
    ):
        assert told in story
    assert "facts-1" in trailmark("workflow", "list").output
    assert "learning_rate" not in trailmark("workflow", "show", "facts-1").output
    trailmark("log", "proof", trail.registry.resolve("facts").leaf_hash, "--out", "proof.json")
    approval = next(iter(trail.entries(kind="approval")))
    trailmark("log", "proof", approval.leaf_hash, "--out", "approval.json")
    for file in ("proof.json", "approval.json"):
        assert "VERIFIED" in trailmark("verify", file).output
