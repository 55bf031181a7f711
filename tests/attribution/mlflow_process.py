"""A real MLflow server for tests: started on a free port over a SQLite file, stopped, emptied and started again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from attribution.mlflow_server import MlflowServer
from cluster.services import pages_arguments

START_TIMEOUT_S = 240.0  # 8 s on two quiet cores; much more when other tests share them


class MlflowProcess:
    """One server process and its files."""

    def __init__(self, folder: Path, *, home: Path | None = None, store_uri: str | None = None) -> None:
        """`home`: serve our pages too, of this home's log. `store_uri`: a database other than a file in `folder`."""
        self.folder = folder
        self.home = home
        self.store_uri = store_uri or f"sqlite:///{folder / 'mlflow.db'}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        artifacts = self.folder / "artifacts"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", self.store_uri),
            *("--serve-artifacts", "--artifacts-destination", artifacts.as_uri()),
            *(pages_arguments() if self.home else ()),
        ]
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self.home:
            settings["TRAILMARK_HOME"] = str(self.home)
        with (self.folder.parent / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
            )
        MlflowServer(self.uri).wait(timeout_s=START_TIMEOUT_S)

    def stop(self) -> None:
        """Stop the server and its workers, and wait until they are gone."""
        if self._process is None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """Stop it as a crash would."""
        assert self._process is not None, "start the server first"
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def empty(self) -> None:
        """Remove everything the stopped server knew."""
        assert self._process is None, "stop the server first"
        shutil.rmtree(self.folder)
