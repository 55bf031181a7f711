"""Long work in the cluster over Ray's Jobs API: it goes on when the terminal is closed."""

import asyncio
import logging
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.state import ensure_token, load_state
from configs.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOB_COMMANDS = ("refine", "train", "benchmark", "settle", "run")


@dataclass(frozen=True)
class Job:
    """A submitted job; `status` is Ray's word (PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED), `start_us` since 1970."""

    job_id: str
    status: str
    command: str
    start_us: int
    message: str


def submit(home: Path, arguments: Sequence[str]) -> str:
    """Run `trailmark ARGUMENTS` in the cluster, from this folder and with this interpreter; return the job's id.

    Raises:
        UserError: no cluster is up, or the command is not one for the cluster.
    """
    if not arguments or arguments[0] not in JOB_COMMANDS:
        given = arguments[0] if arguments else ""
        raise UserError(f"job command {given!r}: does not run in the cluster; choose from {', '.join(JOB_COMMANDS)}")
    client = _client(home)
    # A readable, sortable id that no second submission can have: Ray answers a duplicate with a bare HTTP 500.
    job_id = f"{arguments[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    # -P: a folder named `cluster` in the working directory must not stand before ours.
    entrypoint = shlex.join([sys.executable, "-P", "-m", "cluster", *arguments])
    return client.submit_job(
        entrypoint=f"cd {shlex.quote(str(Path.cwd()))} && exec {entrypoint}",
        submission_id=job_id,
        runtime_env={"env_vars": {"TRAILMARK_HOME": str(home)}},
        metadata={"command": shlex.join(["trailmark", *arguments])},
    )


def logs(home: Path, job_id: str, *, follow: bool = False) -> Iterator[str]:
    """Yield a job's output so far; with `follow`, go on until it ends."""
    client = _client(home)
    job = _find(client, job_id)
    if not follow:
        yield client.get_job_logs(job.job_id)
        return
    chunks = client.tail_job_logs(job.job_id)
    with asyncio.Runner() as runner:
        while (chunk := runner.run(_next(chunks))) is not None:
            yield chunk


def stop(home: Path, job_id: str) -> Job:
    """Stop a job, wait until it has ended, and return it; a job that ended before is returned as it is."""
    client = _client(home)
    job = _find(client, job_id)
    if job.status in ("PENDING", "RUNNING"):
        client.stop_job(job.job_id)
        while _find(client, job.job_id).status in ("PENDING", "RUNNING"):
            time.sleep(0.2)
    return _find(client, job.job_id)


def list_jobs(home: Path) -> list[Job]:
    """Return the jobs submitted to this cluster, newest first."""
    return _jobs(_client(home))


def find(home: Path, job_id: str) -> Job:
    """Return the job of an id or of the start of one."""
    return _find(_client(home), job_id)


def _client(home: Path) -> "JobSubmissionClient":
    state = load_state(home)
    if not state.is_alive("ray"):
        raise UserError(f"no cluster is up for {home}; start one with `trailmark up`")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells each closed socket
    token = ensure_token(home).read_text(encoding="ascii")
    try:
        return JobSubmissionClient(state.dashboard_url, headers={"Authorization": f"Bearer {token}"})
    except (ConnectionError, RuntimeError) as error:
        message = f"the Jobs API at {state.dashboard_url} does not answer ({error}); see `trailmark status`"
        raise UserError(message) from error


def _jobs(client: "JobSubmissionClient") -> list[Job]:
    found = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.start_us, reverse=True)


def _find(client: "JobSubmissionClient", job_id: str) -> Job:
    jobs = _jobs(client)
    matches = [job for job in jobs if job.job_id == job_id] or [job for job in jobs if job.job_id.startswith(job_id)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(job.job_id for job in matches)
        raise UserError(f"job {job_id!r} is the start of {len(matches)} ids: {ids}")
    known = ", ".join(job.job_id for job in jobs[:5]) or "none yet"
    raise UserError(f"job {job_id!r} is unknown; newest: {known}")


def _job(details: Any) -> Job:
    command = (details.metadata or {}).get("command", details.entrypoint)
    start_us = (details.start_time or 0) * 1000
    return Job(details.submission_id, str(details.status), command, start_us, details.message or "")


async def _next(chunks: Any) -> str | None:
    """The next piece of an async iterator, or None at its end."""
    return await anext(chunks, None)
