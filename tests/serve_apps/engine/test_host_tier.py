"""The host tier under threads: one read serves all, reads run beside each other, and what is discarded stays away."""

import threading
from collections import Counter

import pytest
import torch

from configs import env
from kernels.native import load
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import CorruptAdapter
from serve_apps.engine.host_tier import HostTier
from serve_apps.engine.packed_adapter import PackedAdapter


def ref(number: int) -> AdapterRef:
    return AdapterRef(str(number), "unused")


class Disk:
    """Reads adapter "n" as n bytes; those in `gates` only once their gate is open. 3 is corrupt."""

    def __init__(self, *gated: int) -> None:
        self.reads: Counter[str] = Counter()
        self.gates = {str(number): threading.Event() for number in gated}
        self.started = {str(number): threading.Event() for number in gated}

    def __call__(self, adapter: AdapterRef) -> PackedAdapter:
        self.reads[adapter.digest] += 1
        if adapter.digest in self.gates:
            self.started[adapter.digest].set()
            assert self.gates[adapter.digest].wait(10)
        if adapter.digest == "3":
            raise CorruptAdapter("3 is corrupt")
        return PackedAdapter(
            adapter.digest, adapter.digest, torch.zeros(int(adapter.digest), dtype=torch.uint8), torch.empty(0), ()
        )


def test_one_read_serves_all_who_wait_and_others_load_beside_it() -> None:
    disk = Disk(2)
    tier = HostTier(disk, budget_bytes=10, num_threads=2)
    futures = [tier.start(ref(2)) for _ in range(8)]
    assert disk.started["2"].wait(10)
    assert tier.obtain(ref(5)).digest == "5"
    assert not any(future.done() for future in futures) and tier.stats()["adapters_loading"] == 1
    disk.gates["2"].set()
    assert {future.result(10).digest for future in futures} == {"2"}
    assert disk.reads == {"2": 1, "5": 1}
    assert tier.start(ref(2)).done() and tier.stats()["adapter_host_hits"] == 1
    tier.check_integrity()


def test_the_least_recently_used_goes_first_and_the_budget_holds() -> None:
    disk = Disk()
    tier = HostTier(disk, budget_bytes=10)
    for number in (4, 5, 4, 6):
        tier.obtain(ref(number))
        tier.check_integrity()
    assert tier.stats()["adapter_host_bytes"] == 10 and tier.stats()["adapter_host_evictions"] == 1
    tier.obtain(ref(4))
    assert disk.reads == {"4": 1, "5": 1, "6": 1}


def test_what_is_larger_than_the_budget_is_handed_over_and_not_kept() -> None:
    tier = HostTier(Disk(), budget_bytes=10)
    tier.obtain(ref(4))
    assert tier.obtain(ref(11)).num_bytes == 11
    assert tier.stats()["adapter_host_bytes"] == 4
    tier.check_integrity()


def test_a_failure_reaches_all_who_wait_and_is_not_remembered() -> None:
    disk = Disk(3)
    tier = HostTier(disk, budget_bytes=10)
    futures = [tier.start(ref(3)) for _ in range(3)]
    disk.gates["3"].set()
    for future in futures:
        with pytest.raises(CorruptAdapter):
            future.result(10)
    assert tier.stats()["adapters_loading"] == 0
    with pytest.raises(CorruptAdapter):
        tier.obtain(ref(3))
    assert disk.reads["3"] == 2


def test_an_adapter_discarded_while_it_is_read_is_not_kept() -> None:
    """Whoever waits gets it; the tier holds no byte of it, and a new request reads anew."""
    disk = Disk(2)
    tier = HostTier(disk, budget_bytes=10, num_threads=2)
    first = tier.start(ref(2))
    assert disk.started["2"].wait(10)
    assert tier.discard("2") and not tier.discard("2")
    second = tier.start(ref(2))
    assert second is not first
    disk.gates["2"].set()
    assert first.result(10) is not second.result(10)
    assert tier.stats()["adapter_host_bytes"] == 2 and disk.reads["2"] == 2
    assert tier.discard("2") and tier.stats()["adapter_host_bytes"] == 0
    tier.check_integrity()


def test_threads_that_load_compute_alone_and_the_caller_as_before() -> None:
    native = load(env.cache_home())
    if native is None:
        pytest.skip("no C compiler here")
    seen: list[int] = []

    def read(adapter: AdapterRef) -> PackedAdapter:
        seen.append(torch.get_num_threads())
        return Disk()(adapter)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tier = HostTier(read, budget_bytes=10, on_thread_start=native.compute_alone)
        tier.obtain(ref(1))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
