"""The processes beside Ray: when they count as alive, and that what they write is for this user alone."""

import importlib
import stat
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FunctionType

import pytest

from cluster import local, services
from cluster.processes import free_port
from cluster.state import ClusterState, private_directory, save_state
from configs import env
from configs.schema import MlflowSettings


class Answers(BaseHTTPRequestHandler):
    """Answers `/503/health` with 503, and so on."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_only_status_200_is_alive(url: str) -> None:
    assert services.http_answers(f"{url}/200/health")
    assert not any(services.http_answers(f"{url}/{status}/health") for status in (204, 401, 404, 500, 503))
    assert not services.http_answers(f"http://127.0.0.1:{free_port()}/health")


def test_status_notices_an_api_whose_application_is_gone(url: str, tmp_path: Path) -> None:
    for status in (200, 404):
        save_state(tmp_path, ClusterState("test", api_url=f"{url}/{status}"))
        assert [(row.name, row.alive) for row in local.status(tmp_path)] == [("api", status == 200)]


def test_home_and_mlflow_are_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = private_directory(tmp_path / "a" / "home", name="mlflow")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]


def test_the_pages_are_named_to_mlflow_by_an_entry_point_that_makes_an_application() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = [
        value for name, value in project["entry-points"]["mlflow.app"].items() if name == services.MLFLOW_APP_NAME
    ]
    module, _, function = value.partition(":")
    assert isinstance(getattr(importlib.import_module(module), function), FunctionType)  # MLflow calls functions alone


@pytest.mark.slow
def test_what_mlflow_writes_is_for_this_user_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    part = services.spawn_mlflow(home, MlflowSettings(port=free_port()), env.child_environment({}))
    process = part.process_id.process()
    assert process is not None
    try:
        services.wait_for_mlflow(home, part)
    finally:
        for member in (*process.children(recursive=True), process):
            member.kill()
        process.wait(timeout=30)
    written = [home, home / "run", home / "mlflow", home / "mlflow" / "mlflow.db"]
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in written] == [0, 0, 0, 0]
