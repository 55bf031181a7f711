"""`down` ends the processes of a cluster whatever state its actors are in."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from cluster import local, serving
from cluster.processes import MARKER, ProcessId, cluster_processes, ray_orphans
from cluster.state import ClusterState, Part, cluster_id_of, ensure_ray_directory, save_state
from configs import env

SLEEPER = "print('ready', flush=True); import time; time.sleep(600)"


@pytest.mark.parametrize(
    "error", [ValueError("Failed to look up actor with name 'trailmark-log-writer'"), RayActorError()], ids=type
)
def test_down_stops_every_process_though_the_api_cannot_be_closed(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(home: Path) -> None:
        raise error

    monkeypatch.setattr(serving, "stop", stop)
    cluster_id = cluster_id_of(tmp_path)
    marked = env.child_environment({MARKER: cluster_id})
    with subprocess.Popen([sys.executable, "-c", SLEEPER], env=marked, stdout=subprocess.PIPE, text=True) as head:
        try:
            assert head.stdout is not None and head.stdout.readline() == "ready\n"
            part = Part("ray", "127.0.0.1:1", ProcessId.of(head.pid))
            save_state(tmp_path, ClusterState(cluster_id, api_url="http://127.0.0.1:1", parts=(part,)))
            said: list[str] = []
            assert local.down(tmp_path, report=said.append) == 1
            assert cluster_processes(cluster_id) == [] and head.wait(timeout=10) < 0
        finally:
            head.kill()
    assert any("the API did not close in order" in step and type(error).__name__ in step for step in said)
    assert not (tmp_path / "run" / "cluster.json").exists()


AGENT = """
import sys, time
open("/proc/self/comm", "w").write("ray::Agent")
log = open(sys.argv[1], "w")
print("ready", flush=True)
time.sleep(600)
"""


def test_down_ends_what_ray_left_of_a_killed_command(tmp_path: Path) -> None:
    """Such a process carries no mark (Ray's title lies over its environment); that of another home is left alone."""
    folders = [ensure_ray_directory(cluster_id_of(tmp_path / name), name="own") for name in ("home", "other")]
    (tmp_path / "home").mkdir()
    agents = [
        subprocess.Popen([sys.executable, "-c", AGENT, str(folder / "agent.log")], stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    try:
        assert all(agent.stdout is not None and agent.stdout.readline() == "ready\n" for agent in agents)
        assert [process.pid for process in ray_orphans(folders[0])] == [agents[0].pid]
        assert local.down(tmp_path / "home") == 1
        assert agents[0].wait(timeout=10) < 0 and agents[1].poll() is None
    finally:
        for agent in agents:
            agent.kill()
            agent.communicate()
        for folder in folders:
            shutil.rmtree(folder.parent)
