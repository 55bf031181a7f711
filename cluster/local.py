"""`trailmark up`, `down` and `status`: one cluster per home, whose parts outlive the command.

`up` starts what is missing and is safe to repeat. `down` stops exactly what belongs to this home's cluster: first the
API, so that open receipts reach the log, then the follower and MLflow, then Ray.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from attribution.trail import Trail
from cluster import serving
from cluster.head import head_environment, start_head, wait_for_jobs_api
from cluster.processes import (
    cluster_processes,
    ray_orphans,
    require_free_port,
    stop_processes,
    tree_memory_bytes,
)
from cluster.services import http_answers, spawn_follower, spawn_mlflow, wait_for_mlflow
from cluster.session import connect, private_ray, ray_session
from cluster.state import (
    ClusterState,
    Part,
    cluster_id_of,
    ensure_ray_directory,
    forget_state,
    load_state,
    run_directory,
    save_state,
)
from cluster.witnesses import describe_witnesses, spawn_missing_witnesses, wait_for_witnesses
from configs.errors import UserError
from configs.schema import Settings

__all__ = ["Started", "connect", "down", "private_ray", "ray_session", "status", "up"]

Report = Callable[[str], None]
FIRST_TO_END = ("follower", "mlflow", "publisher")
"""The publisher asks the witnesses once more on its way out, so they must outlive it."""


@dataclass(frozen=True)
class Started:
    """What `up` hands back; `api_key` is the secret when this call made one, else None."""

    state: ClusterState
    api_key: str | None


@dataclass(frozen=True)
class PartStatus:
    """One row of `status`; memory in bytes, of the part's processes together."""

    name: str
    address: str
    pid: int | None
    alive: bool
    memory_bytes: int
    remark: str = ""
    is_alarm: bool = False


def _silent(step: str) -> None:
    """Report nothing."""


def up(
    home: Path, settings: Settings, *, with_mlflow: bool = True, with_serve: bool = True, report: Report = _silent
) -> Started:
    """Start what is not running yet and return where everything answers.

    Raises:
        UserError: a port is taken or a part did not start; parts this call started are stopped again.
    """
    with _exclusive(home):
        state = load_state(home)
        fresh = not state.is_alive("ray")
        if fresh:
            _stop_everything(state, report)
            state = ClusterState(cluster_id=cluster_id_of(home))
        try:
            return _start_missing(home, settings, state, with_mlflow=with_mlflow, with_serve=with_serve, report=report)
        except BaseException:
            if fresh:
                report("stopping what was started")
                _stop_everything(state, report)
                forget_state(home)
            raise


def down(home: Path, *, report: Report = _silent) -> int:
    """Stop the home's cluster and return how many processes ended.

    Raises:
        UserError: a process could not be stopped.
    """
    with _exclusive(home):
        state = load_state(home)
        if state.is_alive("ray") and state.api_url:
            report("closing the API and writing the last receipts")
            try:
                serving.stop(home)
            except Exception as error:  # whatever Ray says of actors that are gone: the processes must end all the same
                report(f"the API did not close in order ({type(error).__name__}: {error}); stopping its processes")
        num_stopped = _stop_everything(state, report)
        forget_state(home)
    return num_stopped


def status(home: Path) -> list[PartStatus]:
    """Return one row per part that was started, dead ones too; an empty list when nothing is up."""
    state = load_state(home)
    rows = [_part_status(part) for part in state.parts]
    if state.api_url:
        rows.append(PartStatus("api", state.api_url, None, http_answers(f"{state.api_url}/health"), 0))
    remarks = describe_witnesses(home) if rows else {}
    return [
        replace(row, remark=remarks[row.name].text, is_alarm=remarks[row.name].is_alarm) if row.name in remarks else row
        for row in rows
    ]


def _start_missing(
    home: Path, settings: Settings, state: ClusterState, *, with_mlflow: bool, with_serve: bool, report: Report
) -> Started:
    Trail.open(home)  # the follower and the actors expect its keys and its log
    environment = head_environment(home, settings.cluster, state.cluster_id)
    if with_serve and not state.api_url:
        require_free_port("serve.port", settings.serve.port, host=settings.serve.host)
    spawned = spawn_missing_witnesses(home, settings.witness, state, environment)
    for part in spawned:
        state = _saved(home, state.with_part(part))
    start_mlflow = with_mlflow and not state.is_alive("mlflow")
    if start_mlflow:  # imports for seconds: let it, while Ray starts
        state = _saved(home, state.with_part(spawn_mlflow(home, settings.mlflow, environment)))
    if not state.is_alive("ray"):
        report("starting Ray")
        state = _saved(home, start_head(home, settings.cluster, state))
        wait_for_jobs_api(home, state)
    if start_mlflow:
        report("waiting for MLflow")
        state = _with_mlflow(home, state)
    if state.mlflow_url and not state.is_alive("follower"):
        state = _saved(home, state.with_part(spawn_follower(home, state.mlflow_url, environment)))
    wait_for_witnesses(home, spawned)
    api_key = None
    if with_serve and not _api_answers(state):
        api_key = serving.ensure_api_key(home)
        url = serving.start(home, settings, report=report)
        state = _saved(home, replace(state, api_url=url))
    return Started(state, api_key)


def _with_mlflow(home: Path, state: ClusterState) -> ClusterState:
    part = state.part("mlflow")
    assert part is not None, "spawned before it is waited for"
    wait_for_mlflow(home, part)
    return _saved(home, replace(state, mlflow_url=part.address))


def _api_answers(state: ClusterState) -> bool:
    return bool(state.api_url) and http_answers(f"{state.api_url}/health")


def _saved(home: Path, state: ClusterState) -> ClusterState:
    save_state(home, state)
    return state


def _stop_everything(state: ClusterState, report: Report) -> int:
    """Stop every process of the cluster, services before Ray; return how many there were."""
    processes = [
        *cluster_processes(state.cluster_id),
        *ray_orphans(ensure_ray_directory(state.cluster_id, name="own")),
    ]
    if not processes:
        return 0
    report(f"stopping {len(processes)} processes")
    roots = {part.process_id.pid: part.name for part in state.parts}
    stop_processes([process for process in processes if roots.get(process.pid) in FIRST_TO_END])
    # The head's server goes last and without patience: it holds nothing on disk, and it waits for nodes that are gone.
    stop_processes([process for process in processes if roots.get(process.pid) != "ray"])
    stop_processes(cluster_processes(state.cluster_id), grace_s=1.0)
    left = [*cluster_processes(state.cluster_id), *(process for process in processes if process.is_running())]
    stubborn = stop_processes(left, grace_s=1.0)
    if stubborn:
        named = ", ".join(f"{process.pid} ({process.name()})" for process in stubborn)
        raise UserError(f"these processes did not end, even when killed: {named}; stop them by hand")
    return len(processes)


def _part_status(part: Part) -> PartStatus:
    process = part.process_id.process()
    memory = tree_memory_bytes(process) if process else 0
    return PartStatus(part.name, part.address, part.process_id.pid, process is not None, memory)


@contextlib.contextmanager
def _exclusive(home: Path) -> Iterator[None]:
    """Let one `up` or `down` run at a time for a home."""
    descriptor = os.open(run_directory(home) / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another `trailmark up` or `down` is at work on {home}; wait for it to end") from error
    finally:
        os.close(descriptor)
