"""A real cluster by the command line: up, a job, its log, down, and no process left."""

import json
import shutil
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import jobs, local
from cluster.processes import cluster_processes, free_port
from cluster.state import cluster_id_of, load_state
from configs import env
from configs.errors import UserError
from configs.schema import ClusterSettings, MlflowSettings, Settings, WitnessSettings

# Ray keeps a process's first token and connection, which in a whole run are those of the session's cluster.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not env.variable("TRAILMARK_TEST_ALONE"), reason="run by test_local_alone.py"),
]


def small_settings() -> Settings:
    """A cluster on ports of its own, so that it never meets another on this host."""
    cluster = ClusterSettings(ray_port=free_port(), dashboard_port=free_port(), num_cpus=2, object_store_mib=100)
    witness = WitnessSettings(ports=(free_port(), free_port()))
    return Settings(cluster=cluster, mlflow=MlflowSettings(port=free_port()), witness=witness)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose cluster is up with MLflow, without the API."""
    home = tmp_path_factory.mktemp("home")
    temp_dir = local.up(home, small_settings(), with_serve=False).state.temp_dir
    yield home
    local.down(home)
    shutil.rmtree(Path(temp_dir).parent)


def test_up_shows_each_part_alive(home: Path) -> None:
    rows = local.status(home)
    assert {row.name for row in rows} == {"ray", "raylet", "mlflow", "follower", "witness-1", "witness-2", "publisher"}
    assert all(row.alive for row in rows)
    assert all(row.memory_bytes > 1 << 20 for row in rows)


def test_up_again_changes_nothing(home: Path) -> None:
    before = load_state(home)
    assert local.up(home, Settings(), with_serve=False).state == before


def test_jobs_api_wants_our_token(home: Path) -> None:
    token = home / "run" / "ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{load_state(home).dashboard_url}/api/jobs/")


def test_a_job_runs_and_tells(home: Path) -> None:
    job_id = jobs.submit(home, ["refine", "--help"])
    output = "".join(jobs.logs(home, job_id, follow=True))
    assert "Usage: " in output
    found = jobs.find(home, job_id[:12])
    assert (found.job_id, found.status, found.command) == (job_id, "SUCCEEDED", "trailmark refine --help")
    assert "".join(jobs.logs(home, job_id)) in output


def test_an_unknown_job_names_those_there_are(home: Path) -> None:
    job_id = jobs.submit(home, ["train", "--help"])
    with pytest.raises(UserError, match=f"job 'nope' is unknown; newest: {job_id}"):
        jobs.find(home, "nope")
    assert jobs.stop(home, job_id).status in ("STOPPED", "SUCCEEDED")


def test_work_reaches_the_cluster_that_is_up(home: Path) -> None:
    import ray

    with local.ray_session(home, ClusterSettings()) as address:
        assert address == load_state(home).ray_address
        assert ray.cluster_resources()["CPU"] == 2
    assert not ray.is_initialized()


def test_mlflow_answers(home: Path) -> None:
    with urllib.request.urlopen(f"{load_state(home).mlflow_url}/version") as response:
        assert response.read().decode().startswith("3.")


def test_a_dead_part_is_shown_and_started_again(home: Path) -> None:
    follower = load_state(home).part("follower")
    assert follower is not None
    process = follower.process_id.process()
    assert process is not None
    process.kill()
    process.wait(timeout=10)
    assert [row.name for row in local.status(home) if not row.alive] == ["follower"]
    local.up(home, Settings(), with_serve=False)
    assert all(row.alive for row in local.status(home))


def test_down_leaves_no_process(tmp_path: Path) -> None:
    """Also after the head was killed under it, the worst that `down` can find."""
    state = local.up(tmp_path, small_settings(), with_mlflow=False, with_serve=False).state
    head = state.part("ray")
    assert head is not None
    process = head.process_id.process()
    assert process is not None
    process.kill()
    assert local.down(tmp_path) > 0
    assert cluster_processes(cluster_id_of(tmp_path)) == []
    assert not (tmp_path / "run" / "cluster.json").exists()
    shutil.rmtree(Path(state.temp_dir).parent)


def test_a_taken_port_stops_nothing_and_starts_nothing(home: Path, tmp_path: Path) -> None:
    taken = int(load_state(home).dashboard_url.rsplit(":", 1)[1])
    settings = Settings(
        cluster=ClusterSettings(ray_port=free_port(), dashboard_port=taken), witness=WitnessSettings(ports=())
    )
    with pytest.raises(UserError, match=f"cluster.dashboard_port = {taken}: cannot listen"):
        local.up(tmp_path, settings, with_mlflow=False, with_serve=False)
    assert cluster_processes(cluster_id_of(tmp_path)) == []
    assert local.status(home), "the other cluster goes on"


def test_logs_are_in_one_place(home: Path) -> None:
    run = home / "run"
    assert (run / "mlflow.log").is_file()
    assert (run / "ray-start.log").is_file()
    assert (run / "ray-logs" / "gcs_server.out").exists()
    assert json.loads((run / "cluster.json").read_text())["version"] == 1
