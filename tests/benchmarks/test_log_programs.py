"""The programs about the log at toy sizes: that they judge, and that the judge is not blind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attribution.disk import Disk
from benchmarks import crash_disk, log_failover, log_faults, log_rate
from benchmarks.crash_disk import CrashDisk


def test_a_few_kills_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_faults, "KILLS_PER_HOME", 4)
    tally = log_faults.Tally()
    log_faults.kill_loop(tmp_path, tally, num_kills=8, chance=log_faults.random.Random(1))
    assert tally.is_good, tally
    assert tally.kills == 8 and tally.acknowledged > 8 and tally.checkpoints_signed >= 8


def test_the_kill_loop_sees_a_lost_leaf_and_a_second_history(tmp_path: Path) -> None:
    trail = log_faults.Trail.open(tmp_path / "home")
    tally = log_faults.Tally()
    log_faults._check_acknowledged(trail, b"0 " + b"ab" * 32 + b"\n", {}, tally)
    assert len(tally.lost) == 1
    signed = tmp_path / "signed"
    signed.write_text(json.dumps(log_faults.Checkpoint(trail.log.key.name, 0, b"\x01" * 32).text()) + "\n")
    log_faults._check_signed(trail, signed, 0, tally)
    assert len(tally.forked) == 1 and not tally.is_good


def problems(outcomes: list[crash_disk.Outcome]) -> list[str]:
    return [line for outcome in outcomes for line in (*outcome.lost, *outcome.forked, *outcome.damaged)]


def test_no_crash_and_no_failing_call_hurts_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_disk, "NUM_APPENDS", 2)
    crashes = list(crash_disk.crash_points(tmp_path / "crash", seed=7, seeds_per_point=1))
    failures = list(crash_disk.failing_calls(tmp_path / "failing"))
    assert problems(crashes) == problems(failures) == []
    assert len(crashes) > 100 and len(failures) > 50


def lie(disk: CrashDisk, descriptor: int) -> None:
    """An fsync that says yes and does nothing."""
    disk._count()


@pytest.mark.parametrize(("call", "broken"), [("fsync", lie), ("sync_directory", lie)])
def test_a_disk_that_lies_about_fsync_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, broken: Callable[[CrashDisk, int], None]
) -> None:
    """The judge is not blind: without fsync, acknowledged records are lost."""
    monkeypatch.setattr(crash_disk, "NUM_APPENDS", 2)
    monkeypatch.setattr(CrashDisk, call, broken)
    crashes = crash_disk.crash_points(tmp_path, seed=7, seeds_per_point=0)
    assert any(problems([outcome]) for outcome in crashes), "one is enough"


def test_a_full_real_disk_refuses_cleanly(tmp_path: Path) -> None:
    tally = log_faults.Tally()
    log_faults.full_disk(tmp_path, tally, num_rounds=4)
    assert tally.is_good, tally
    if tally.read_only == "skipped":
        pytest.skip("takes root to mount a tmpfs")
    assert (
        tally.full_disk_refusals == 4 and "read-only" in tally.read_only and "nothing was recorded" in tally.read_only
    )


def test_the_rate_program_counts_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_rate, "MILLION", 5000)
    assert log_rate.rate_of_threads(tmp_path / "threads", num_threads=4, seconds=0.3) > 20
    home = tmp_path / "receipts"
    load = {"num_replicas": 2, "per_second": 40.0, "seconds": 0.5}
    figures = {item.name: item for item in log_rate.receipt_figures(home, log_rate.in_process_writer(home), **load)}
    assert figures["receipts a second, answered"].value >= 30
    assert figures["published after, p99"].is_good
    assert figures["receipt file, as written"].value > 2000
    assert figures["receipt file, 5000 entries, 2 cosignatures"].is_good


def test_a_disk_calls_what_its_name_says(tmp_path: Path) -> None:
    """The model counts every method that changes a disk: one added to Disk must be added to it."""
    changing = {name for name in vars(Disk) if not name.startswith("_")}
    assert changing <= set(vars(CrashDisk)), changing - set(vars(CrashDisk))


@pytest.mark.ray
@pytest.mark.slow
def test_the_writer_moves_to_another_node_and_loses_nothing(tmp_path: Path) -> None:
    """A process of its own, for the nodes are a Ray of their own; one is killed under load."""
    command = [sys.executable, "-m", "benchmarks.log_failover", "--quick", "--check", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out").read_text())
    assert result["kills"] == 1 and result["take_overs"] >= 2 and result["acknowledged"] >= 100


def test_the_failover_judge_is_not_blind() -> None:
    good = log_failover.Result(1, 2, 100, 0, 0, 0, 1.0)
    assert good.is_good
    for worse in ({"lost": 1}, {"damaged": 1}, {"take_overs": 1}):
        assert not replace(good, **worse).is_good
