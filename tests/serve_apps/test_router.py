"""The choice of replica, and the contract with Ray's alpha RequestRouter that it stands on."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve._private.test_utils import FakeRunningReplica
from ray.serve.request_router import PendingRequest, RequestRouter

from serve_apps.router import AdapterAffinityRouter, rank_replicas

LOADS = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 50), min_size=1, max_size=6)


def flat(ranks: list[list[str]]) -> list[str]:
    return [replica for rank in ranks for replica in rank]


@given(adapter=st.text(max_size=8), loads=LOADS, max_spill=st.integers(0, 20))
def test_every_replica_is_ranked_once_and_the_first_is_never_far_above_the_idlest(
    adapter: str, loads: dict[str, int], max_spill: int
) -> None:
    order = flat(rank_replicas(adapter, loads, max_spill=max_spill))
    assert sorted(order) == sorted(loads)
    assert loads[order[0]] - min(loads.values()) <= max_spill


@given(loads=LOADS)
def test_the_base_model_goes_to_the_least_loaded(loads: dict[str, int]) -> None:
    assert loads[flat(rank_replicas("", loads, max_spill=3))[0]] == min(loads.values())


def test_an_adapter_keeps_its_home_when_another_replica_comes_or_goes() -> None:
    few, more = dict.fromkeys("abc", 0), dict.fromkeys("abcd", 0)
    moved = 0
    for index in range(300):
        before = flat(rank_replicas(f"adapter{index}", few, max_spill=1))[0]
        after = flat(rank_replicas(f"adapter{index}", more, max_spill=1))[0]
        assert after in (before, "d")
        moved += after == "d"
    assert 40 < moved < 110  # a quarter of 300, more or less


def test_adapters_spread_evenly_over_replicas() -> None:
    homes = Counter(flat(rank_replicas(f"adapter{i}", dict.fromkeys("abcd", 0), max_spill=1))[0] for i in range(400))
    assert set(homes) == set("abcd")
    assert max(homes.values()) < 150


def test_a_busy_home_spills_to_the_idlest_and_stays_second() -> None:
    order = flat(rank_replicas("adapter", dict.fromkeys("abcd", 0), max_spill=4))
    home = order[0]
    loads = {**dict.fromkeys("abcd", 3), home: 9, order[2]: 1}
    assert flat(rank_replicas("adapter", loads, max_spill=4))[:2] == [order[2], home]
    assert flat(rank_replicas("adapter", {**loads, home: 5}, max_spill=4))[0] == home


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def _route(adapters: list[str], *, queue_lengths: dict[str, int]) -> list[str]:
    """Let Ray's own machinery route one request per adapter over fake replicas; return where each went."""
    router = AdapterAffinityRouter(
        deployment_id=DeploymentID(name="Replica", app_name="test"),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    router.initialize_state(max_spill=4)
    replicas = [FakeRunningReplica(name, max_ongoing_requests=10) for name in queue_lengths]
    for replica in replicas:
        replica.set_queue_len_response(queue_lengths[replica.replica_id.unique_id])
    router.update_replicas(replicas)
    for replica in replicas:
        router.replica_queue_len_cache.update(replica.replica_id, queue_lengths[replica.replica_id.unique_id])
    homes = []
    for index, adapter in enumerate(adapters):
        metadata = RequestMetadata(str(index), str(index), multiplexed_model_id=adapter)
        request = PendingRequest(args=[], kwargs={}, metadata=metadata)
        homes.append((await router._choose_replica_for_request(request)).replica_id.unique_id)
    return homes


def test_ray_routes_by_our_ranks(loop: asyncio.Runner) -> None:
    idle = dict.fromkeys(("r0", "r1", "r2"), 0)
    adapters = [f"sha256:{index}" for index in range(12)]
    homes = loop.run(_route(adapters * 2, queue_lengths=idle))
    assert homes[:12] == homes[12:] == [flat(rank_replicas(adapter, idle, max_spill=4))[0] for adapter in adapters]
    assert len(set(homes)) == 3


def test_ray_passes_over_a_home_that_is_full(loop: asyncio.Runner) -> None:
    home, second, third = flat(rank_replicas("sha256:a", dict.fromkeys(("r0", "r1", "r2"), 0), max_spill=4))
    lengths = {home: 10, second: 9, third: 8}
    assert loop.run(_route(["sha256:a"], queue_lengths=lengths)) == [second]


def test_ray_sends_the_base_model_to_the_least_loaded(loop: asyncio.Runner) -> None:
    assert loop.run(_route([""], queue_lengths={"r0": 5, "r1": 1, "r2": 3})) == ["r1"]


def test_the_parts_of_rays_alpha_router_that_we_use_are_there() -> None:
    assert RequestRouter.__abstractmethods__ == {"choose_replicas"}
    assert RequestMetadata("a", "b").multiplexed_model_id == ""
    for name in ("initialize_state", "replica_queue_len_cache", "update_replicas"):
        assert hasattr(RequestRouter, name)
