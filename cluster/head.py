"""Ray's head node as a process of its own, so that the cluster outlives the command that started it."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from cluster.processes import (
    MARKER,
    ProcessId,
    cluster_processes,
    free_port,
    require_free_port,
    stop_processes,
    wait_until,
)
from cluster.session import MIB, NUM_STARTS, ray_variables
from cluster.state import ClusterState, Part, ensure_ray_directory, ensure_token, run_directory
from configs import env
from configs.errors import UserError
from configs.schema import ClusterSettings

# Ray 2.60 gives up when its node is not ready within 30 s, which a loaded machine needs for its agent's imports alone.
START_GIVEN_UP = "timed out during startup"
START_TIMEOUT_S = 180.0  # 20 s on two idle cores; four times that when tests share them


def start_head(home: Path, settings: ClusterSettings, state: ClusterState) -> ClusterState:
    """Run `ray start --head` and return the state with its address and process.

    Raises:
        UserError: a port is taken, or Ray did not start (the message says where its log is).
    """
    require_free_port("cluster.ray_port", settings.ray_port, host=settings.host)
    require_free_port("cluster.dashboard_port", settings.dashboard_port)
    temp_dir = ensure_ray_directory(state.cluster_id, name="ray")
    environment = head_environment(home, settings, state.cluster_id)
    log = run_directory(home) / "ray-start.log"
    for _ in range(NUM_STARTS):
        _remove_old_sessions(temp_dir)
        if _run(_start_command(settings, temp_dir), environment, log=log):
            _link_logs(home, temp_dir)
            return _with_head(state, settings, temp_dir)
        # What half started would hold the ports; MLflow, which belongs to the cluster too, is not Ray's.
        stop_processes(process for process in cluster_processes(state.cluster_id) if _is_ray(process, temp_dir))
        if START_GIVEN_UP not in log.read_text(encoding="utf-8", errors="replace"):
            break
    raise UserError(f"Ray did not start: see {log}\n{_last_lines(log)}")


def head_environment(home: Path, settings: ClusterSettings, cluster_id: str) -> dict[str, str]:
    """Return the environment of every process of the cluster: its home, its token, this virtual environment first."""
    here = str(Path(sys.executable).parent)
    return env.child_environment(
        {
            **ray_variables(ensure_token(home)),
            MARKER: cluster_id,
            "TRAILMARK_HOME": str(home),
            "RAY_ADDRESS": f"{settings.host}:{settings.ray_port}",
            "PATH": f"{here}:{env.variable('PATH')}",
            "TOKENIZERS_PARALLELISM": "false",
            **({} if settings.num_gpus else {"DS_ACCELERATOR": "cpu"}),
        }
    )


def wait_for_jobs_api(home: Path, state: ClusterState) -> None:
    """Wait until the dashboard's Jobs API answers with our token; `ray start` returns before it does."""
    token = ensure_token(home).read_text(encoding="ascii")
    request = urllib.request.Request(f"{state.dashboard_url}/api/version", headers={"Authorization": f"Bearer {token}"})
    if not wait_until(lambda: _answers(request), timeout_s=START_TIMEOUT_S, interval_s=0.25):
        raise UserError(f"Ray's Jobs API at {state.dashboard_url} is silent: see {home}/run/ray-logs/dashboard.log")


def _run(command: list[str], environment: dict[str, str], *, log: Path) -> bool:
    """Run a command with its output in `log`; return whether it succeeded in time."""
    with log.open("wb") as stream:
        try:
            ended = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=START_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == 0


def _is_ray(process: psutil.Process, temp_dir: Path) -> bool:
    """Whether Ray's session folder stands in the process's command line."""
    try:
        return any(str(temp_dir) in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def _start_command(settings: ClusterSettings, temp_dir: Path) -> list[str]:
    ray = Path(sys.executable).parent / "ray"
    options = {
        "--node-ip-address": settings.host,
        "--port": settings.ray_port,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": settings.dashboard_port,
        "--num-cpus": settings.num_cpus,
        "--num-gpus": settings.num_gpus,
        "--object-store-memory": settings.object_store_mib * MIB,
        "--temp-dir": temp_dir,
        # Fixed by default, so a second cluster on the host would fail on them.
        "--ray-client-server-port": free_port(),
        "--dashboard-agent-listen-port": free_port(),
    }
    flags = [f"{name}={value}" for name, value in options.items()]
    return [str(ray), "start", "--head", "--disable-usage-stats", *flags]


def _with_head(state: ClusterState, settings: ClusterSettings, temp_dir: Path) -> ClusterState:
    address = f"{settings.host}:{settings.ray_port}"
    dashboard = f"http://127.0.0.1:{settings.dashboard_port}"
    fields = {"ray_address": address, "dashboard_url": dashboard, "temp_dir": str(temp_dir)}
    started = ClusterState(**{**vars(state), **fields})
    for name, executable, where in (("ray", "gcs_server", address), ("raylet", "raylet", address)):
        process = _find(state.cluster_id, executable)
        started = started.with_part(Part(name, where, ProcessId.of(process.pid)))
    return started


def _find(cluster_id: str, executable: str) -> psutil.Process:
    for process in cluster_processes(cluster_id):
        if process.name() == executable:
            return process
    raise UserError(f"Ray's {executable} ended right after its start: see HOME/run/ray-logs")


def _answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(json.load(response).get("ray_version"))
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
        return False


def _link_logs(home: Path, temp_dir: Path) -> None:
    """Point HOME/run/ray-logs at the session's logs: all logs in one place."""
    link = run_directory(home) / "ray-logs"
    link.unlink(missing_ok=True)
    link.symlink_to(temp_dir / "session_latest" / "logs")


def _remove_old_sessions(temp_dir: Path) -> None:
    """Drop what earlier sessions left: they stay readable until the next start, not for ever."""
    for child in temp_dir.iterdir():
        if child.is_symlink() or child.is_file():
            child.unlink()
        else:
            shutil.rmtree(child, ignore_errors=True)


def _last_lines(file: Path, *, num_lines: int = 12) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])
