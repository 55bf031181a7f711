"""The command line: what it lists, how it fails."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs import env


def trailmark(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    environment = env.child_environment({"TRAILMARK_HOME": str(home), "COLUMNS": "120"})
    command = [sys.executable, "-P", "-m", "cluster", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_help_lists_every_step_of_the_road(tmp_path: Path) -> None:
    done = trailmark("--help", home=tmp_path)
    assert done.returncode == 0
    commands = (
        "demo up down status contributor contribute refine train benchmark publish apikey engine ask verify mlflow "
        "job config"
    )
    missing = [name for name in commands.split() if f" {name} " not in done.stdout]
    assert not missing


def test_version(tmp_path: Path) -> None:
    assert trailmark("--version", home=tmp_path).stdout == "trailmark 0.1.0\n"


def test_a_users_mistake_is_one_message_and_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  rnk: 3\n")
    done = trailmark("config", "check", str(file), home=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"Error: {file}: train.rnk: no such setting; did you mean 'train.rank'?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [("job", "list"), ("job", "logs", "x"), ("job", "stop", "x"), ("job", "submit", "refine")]
)
def test_jobs_say_when_no_cluster_is_up(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = trailmark(*arguments, home=tmp_path)
    assert done.returncode == 2
    assert f"no cluster is up for {tmp_path}; start one with `trailmark up`" in done.stderr


def test_a_job_must_be_one_for_the_cluster(tmp_path: Path) -> None:
    done = trailmark("job", "submit", "frobnicate", home=tmp_path)
    assert done.returncode == 2
    assert "job command 'frobnicate'" in done.stderr
    assert "choose from refine, train, benchmark" in done.stderr


def test_a_jobs_help_is_its_commands_and_submits_nothing(tmp_path: Path) -> None:
    done = trailmark("job", "submit", "settle", "--help", home=tmp_path)
    assert done.returncode == 0 and "trailmark settle [OPTIONS]" in done.stdout and "--over" in done.stdout


def test_nothing_up_is_said_plainly(tmp_path: Path) -> None:
    assert trailmark("status", home=tmp_path).returncode == 1
    done = trailmark("down", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"nothing was up for {tmp_path}\n")


def test_shown_settings_can_be_read_back(tmp_path: Path) -> None:
    from cluster.cli import app
    from configs.schema import load_settings

    shown = CliRunner().invoke(app, ["config", "show", "h200"])
    file = tmp_path / "again.yaml"
    file.write_text(shown.stdout)
    assert load_settings(file) == load_settings("h200")


def test_check_counts_what_differs() -> None:
    from cluster.cli import app

    result = CliRunner().invoke(app, ["config", "check", "local"])
    assert result.exit_code == 0
    assert "local: good; " in result.stdout
