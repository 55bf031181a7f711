"""Connecting to Ray: tokens, addresses, and what is put back afterwards."""

import os
from pathlib import Path

import pytest

from cluster.session import connect, ray_session
from configs import env
from configs.errors import UserError
from configs.schema import ClusterSettings

pytestmark = pytest.mark.ray


def test_a_private_cluster_is_found_by_its_address(ray_cluster: str) -> None:
    import ray

    assert env.variable("RAY_ADDRESS") == ray_cluster == ray.get_runtime_context().gcs_address
    assert ray.cluster_resources()["CPU"] == 4


def test_work_in_an_open_session_uses_it(ray_cluster: str, tmp_path: Path) -> None:
    import ray

    with ray_session(tmp_path, ClusterSettings()) as address:
        assert address == ray_cluster
    assert ray.is_initialized(), "the outer session goes on"


def test_the_token_is_not_the_users_own(ray_cluster: str) -> None:
    """Ray would write ~/.ray/auth_token readable by all; ours lies in a folder that only we can enter."""
    token = Path(env.variable("RAY_AUTH_TOKEN_PATH"))
    assert Path.home() not in token.parents
    assert token.stat().st_mode & 0o077 == 0
    assert token.stat().st_uid == os.getuid()


def test_workers_carry_the_token(ray_cluster: str) -> None:
    import ray

    @ray.remote
    def token_of_worker() -> str:
        return env.variable("RAY_AUTH_TOKEN_PATH")

    assert ray.get(token_of_worker.remote()) == env.variable("RAY_AUTH_TOKEN_PATH")


def test_connecting_to_nothing_says_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=f"no cluster is up for {tmp_path}; start one with `trailmark up`"),
        connect(tmp_path),
    ):
        pass
