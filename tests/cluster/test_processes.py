"""Finding and stopping exactly the processes of one cluster."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.processes import (
    MARKER,
    ProcessId,
    cluster_processes,
    free_port,
    require_free_port,
    stop_processes,
    tree_memory_bytes,
    wait_until,
)
from configs import env
from configs.errors import UserError

# A parent whose child drops the marker, as Ray's workers do: it belongs by descent alone. Both say when they are ready.
PARENT = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={});"
    "print('ready', flush=True); child.wait()"
)
SLEEPER = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
CLUSTER = "test-cluster"


@pytest.fixture
def spawned() -> Iterator[list[subprocess.Popen[str]]]:
    """Children to end after the test, whatever it did."""
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()


def start(spawned: list[subprocess.Popen[str]], *command: str, cluster: str = CLUSTER) -> subprocess.Popen[str]:
    """Start a marked Python program and wait for its first line."""
    environment = env.child_environment({MARKER: cluster})
    child = subprocess.Popen([sys.executable, "-c", *command], env=environment, stdout=subprocess.PIPE, text=True)
    spawned.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_child_without_the_marker_belongs_by_descent(spawned: list[subprocess.Popen[str]]) -> None:
    parent = start(spawned, PARENT, SLEEPER)
    assert wait_until(lambda: len(cluster_processes(CLUSTER)) == 2, timeout_s=10)
    members = cluster_processes(CLUSTER)
    assert parent.pid in {process.pid for process in members}
    assert stop_processes(members) == []
    assert cluster_processes(CLUSTER) == []


def test_another_cluster_is_left_alone(spawned: list[subprocess.Popen[str]]) -> None:
    other = start(spawned, STUBBORN, cluster="another")
    stop_processes(cluster_processes(CLUSTER))
    assert other.poll() is None


def test_this_process_never_stops_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.getpid() not in {process.pid for process in cluster_processes(env.variable(MARKER))}


def test_what_ignores_sigterm_is_killed(spawned: list[subprocess.Popen[str]]) -> None:
    start(spawned, STUBBORN)
    assert stop_processes(cluster_processes(CLUSTER), grace_s=0.2) == []
    assert cluster_processes(CLUSTER) == []


def test_an_identity_outlives_its_process(spawned: list[subprocess.Popen[str]]) -> None:
    child = start(spawned, STUBBORN)
    identity = ProcessId.of(child.pid)
    assert identity.process() is not None
    assert ProcessId(child.pid, identity.started_s + 1).process() is None, "the pid was given to another process"
    child.kill()
    child.wait()
    assert identity.process() is None


def test_memory_counts_the_tree(spawned: list[subprocess.Popen[str]]) -> None:
    parent = ProcessId.of(start(spawned, PARENT, SLEEPER).pid).process()
    assert parent is not None
    assert tree_memory_bytes(parent) > parent.memory_info().rss > 1 << 20


def test_a_taken_port_names_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"serve.port = {port}: cannot listen on 127.0.0.1:{port}.*--config"):
            require_free_port("serve.port", port)


def test_a_free_port_is_free() -> None:
    require_free_port("serve.port", free_port())


def test_waiting_ends_either_way() -> None:
    assert wait_until(lambda: True, timeout_s=0)
    assert not wait_until(lambda: False, timeout_s=0.01, interval_s=0.001)
