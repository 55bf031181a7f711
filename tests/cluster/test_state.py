"""What is written down about a cluster, and the files only the user may read."""

import shutil
import stat
from pathlib import Path

import pytest

from attribution.trail import Trail
from cluster.processes import ProcessId
from cluster.state import (
    ClusterState,
    Part,
    cluster_id_of,
    ensure_ray_directory,
    ensure_token,
    forget_state,
    load_state,
    run_directory,
    save_state,
)
from configs.errors import UserError


def test_state_comes_back_as_written(tmp_path: Path) -> None:
    part = Part("ray", "127.0.0.1:6390", ProcessId(1234, 56.5))
    state = ClusterState("abcd", ray_address="127.0.0.1:6390", mlflow_url="http://127.0.0.1:8701", parts=(part,))
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state
    forget_state(tmp_path)
    assert load_state(tmp_path) == ClusterState(cluster_id_of(tmp_path))


def test_a_part_is_replaced_by_name() -> None:
    old, new = Part("mlflow", "a", ProcessId(1, 1.0)), Part("mlflow", "b", ProcessId(2, 2.0))
    assert ClusterState("x").with_part(old).with_part(new).parts == (new,)


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cluster.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="written by another trailmark"):
        load_state(tmp_path)


def test_homes_have_clusters_of_their_own(tmp_path: Path) -> None:
    assert cluster_id_of(tmp_path / "a") != cluster_id_of(tmp_path / "b")


def test_token_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    file = ensure_token(tmp_path)
    token = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(token) == 64
    assert ensure_token(tmp_path).read_text() == token


def test_a_readable_token_is_refused(tmp_path: Path) -> None:
    ensure_token(tmp_path).chmod(0o644)
    with pytest.raises(UserError, match="readable by others; run `chmod 600"):
        ensure_token(tmp_path)


def test_ray_directory_leaves_room_for_a_socket_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))
    folder = ensure_ray_directory(cluster_id_of(tmp_path), name="ray")
    try:
        session = "session_2026-11-22_17-10-58_564746_1234567/sockets/plasma_store"
        assert len(str(folder / session)) < 107
    finally:
        shutil.rmtree(folder.parent)


def test_ray_directory_stays_closed_when_ray_opens_it(tmp_path: Path) -> None:
    folder = ensure_ray_directory(cluster_id_of(tmp_path), name="ray")
    try:
        folder.chmod(0o777)
        assert ensure_ray_directory(cluster_id_of(tmp_path), name="ray") == folder
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.parent.chmod(0o755)
        with pytest.raises(UserError, match="only you can enter"):
            ensure_ray_directory(cluster_id_of(tmp_path), name="ray")
    finally:
        shutil.rmtree(folder.parent)


def test_a_home_made_on_the_way_is_for_this_user_alone(tmp_path: Path) -> None:
    home = tmp_path / "some" / "home"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (run_directory(home), home)] == [0o700, 0o700]
    other = Trail.open(tmp_path / "another" / "home").home
    assert {stat.S_IMODE(path.stat().st_mode) for path in (other, *other.glob("*/"))} == {0o700}
