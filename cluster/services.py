"""The MLflow server and the follower that fills it: processes of their own session, which outlive the command."""

import http.client
import importlib.metadata
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from cluster.processes import ProcessId, require_free_port, wait_until
from cluster.state import Part, private_directory, run_directory
from configs.errors import UserError
from configs.schema import MlflowSettings

MLFLOW_START_TIMEOUT_S = 180.0
HEALTH_TIMEOUT_S = 5.0
MLFLOW_APP_GROUP, MLFLOW_APP_NAME = "mlflow.app", "trailmark"
MLFLOW_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Its queue of background jobs is four more processes, for features we do not use.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def spawn_mlflow(home: Path, settings: MlflowSettings, environment: dict[str, str]) -> Part:
    """Start `mlflow server` on 127.0.0.1 over HOME/mlflow, without waiting for it to answer."""
    require_free_port("mlflow.port", settings.port)
    folder = private_directory(home, name="mlflow")
    artifacts = folder / "artifacts"
    artifacts.mkdir(mode=0o700, exist_ok=True)
    command = [
        *(sys.executable, "-P", "-m", "mlflow", "server"),
        *("--host", "127.0.0.1", "--port", str(settings.port), "--workers", "1"),
        *("--serve-artifacts", "--artifacts-destination", artifacts.as_uri()),
        *pages_arguments(),
    ]
    url = f"http://127.0.0.1:{settings.port}"
    variables = {
        "TRAILMARK_HOME": str(home),  # the pages read the log of this home
        "MLFLOW_BACKEND_STORE_URI": settings.store_uri or f"sqlite:///{folder / 'mlflow.db'}",  # may hold a password
    }
    return spawn("mlflow", url, command, home=home, environment={**environment, **MLFLOW_VARIABLES, **variables})


def pages_arguments() -> tuple[str, ...]:
    """Return what makes `mlflow server` serve our pages too; nothing where an older installation does not name them."""
    named = importlib.metadata.entry_points(group=MLFLOW_APP_GROUP, name=MLFLOW_APP_NAME)
    return ("--app-name", MLFLOW_APP_NAME) if named else ()


def wait_for_mlflow(home: Path, part: Part) -> None:
    """Wait until MLflow answers; `UserError` with its log when it ends or takes too long."""
    answered = wait_until(
        lambda: http_answers(f"{part.address}/health") or not part.alive, timeout_s=MLFLOW_START_TIMEOUT_S
    )
    if not answered or not part.alive:
        raise UserError(f"MLflow did not start: see {home / 'run' / 'mlflow.log'}")


def spawn_follower(home: Path, mlflow_url: str, environment: dict[str, str]) -> Part:
    """Start `trailmark mlflow follow`, which shows each new record of the log in MLflow."""
    command = [sys.executable, "-P", "-m", "cluster", "mlflow", "follow", "--uri", mlflow_url]
    return spawn("follower", mlflow_url, command, home=home, environment={**environment, **MLFLOW_VARIABLES})


def http_answers(url: str) -> bool:
    """Whether `url` answers with status 200: Serve's proxy answers, with 404, when its application is gone."""
    try:
        with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:  # any other status
        error.close()
        return False
    except (OSError, ValueError, http.client.HTTPException):
        return False


def spawn(name: str, address: str, command: list[str], *, home: Path, environment: dict[str, str]) -> Part:
    """Start a process of its own session that writes to HOME/run/NAME.log, and return it as a part."""
    log = run_directory(home) / f"{name}.log"
    with log.open("ab") as stream:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=home,
            umask=0o077,  # prompts and answers stand in what they write
        )
    return Part(name, address, ProcessId.of(child.pid))
