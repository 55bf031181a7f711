"""The adapter cache under random operations and under threads."""

import threading
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_apps.engine.adapter import Adapter
from serve_apps.engine.adapter_pool import AdapterPool, Lease
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import AdapterCacheFull, AdapterInUse, AdapterTooLarge, CorruptAdapter

BUDGET = 10
# Digest "n" takes n bytes; 11 never fits, and 3 is corrupt.
NUMBERS = st.integers(1, 11)


def ref(number: int) -> AdapterRef:
    return AdapterRef(str(number), "unused")


def read(adapter: AdapterRef) -> Adapter:
    if adapter.digest == "3":
        raise CorruptAdapter("3 is corrupt")
    return Adapter(adapter.digest, (), int(adapter.digest), torch.empty(0))


class PoolMachine(RuleBasedStateMachine):
    """A model of the pool: resident digests, oldest use first, and leases; compared after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AdapterPool(read, budget_bytes=BUDGET)
        self.resident: list[int] = []
        self.leases: list[tuple[int, Lease]] = []

    def leased(self) -> set[int]:
        return {number for number, _ in self.leases}

    def obtain(self, number: int) -> type[Exception] | None:
        """Apply one load to the model; return the error it must raise."""
        if number not in self.resident:
            held = sum(self.leased())
            if number == 3:
                return CorruptAdapter
            if number > BUDGET:
                return AdapterTooLarge
            if number + held > BUDGET:
                return AdapterCacheFull
            while sum(self.resident) + number > BUDGET:
                self.resident.remove(next(other for other in self.resident if other not in self.leased()))
        else:
            self.resident.remove(number)
        self.resident.append(number)
        return None

    @rule(number=NUMBERS)
    def load(self, number: int) -> None:
        error = self.obtain(number)
        if error is None:
            self.pool.load(ref(number))
        else:
            with pytest.raises(error):
                self.pool.load(ref(number))

    @rule(number=NUMBERS)
    def acquire(self, number: int) -> None:
        error = self.obtain(number)
        if error is None:
            self.leases.append((number, self.pool.acquire(ref(number))))
        else:
            with pytest.raises(error):
                self.pool.acquire(ref(number))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        lease.release()

    @rule(number=NUMBERS)
    def unload(self, number: int) -> None:
        if number in self.leased():
            with pytest.raises(AdapterInUse):
                self.pool.unload(str(number))
        else:
            assert self.pool.unload(str(number)) == (number in self.resident)
            self.resident = [other for other in self.resident if other != number]

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert stats["adapters_resident"] == [str(number) for number in self.resident]
        assert stats["adapter_bytes"] == sum(self.resident)
        assert stats["adapters_leased"] == len(self.leased())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_one_load_serves_all_who_wait() -> None:
    """Eight threads want the same cold adapter: one reads it. Others load beside it, not behind it."""
    reads: Counter[str] = Counter()
    may_finish, cold_started = threading.Event(), threading.Event()

    def slow(adapter: AdapterRef) -> Adapter:
        reads[adapter.digest] += 1
        if adapter.digest == "2":
            cold_started.set()
            assert may_finish.wait(10)
        return read(adapter)

    pool = AdapterPool(slow, budget_bytes=BUDGET)
    leases: list[Lease] = []
    threads = [threading.Thread(target=lambda: leases.append(pool.acquire(ref(2)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert cold_started.wait(10)
    pool.load(ref(5))
    assert pool.stats()["adapters_resident"] == ["5"]
    may_finish.set()
    for thread in threads:
        thread.join(10)
    assert reads == {"2": 1, "5": 1} and len(leases) == 8
    for lease in leases:
        pool.check_integrity()
        lease.release()
    assert pool.unload("2")


def test_a_failed_load_leaves_nothing_behind() -> None:
    """The next one who asks reads again, and gets the reason again."""
    pool = AdapterPool(read, budget_bytes=BUDGET)
    for _ in range(2):
        with pytest.raises(CorruptAdapter):
            pool.acquire(ref(3))
    assert pool.stats()["adapters_resident"] == []


def test_another_adapter_than_the_one_asked_for_is_refused_and_evicts_nothing() -> None:
    def swapped(adapter: AdapterRef) -> Adapter:
        return read(ref(5) if adapter.digest == "4" else adapter)

    pool = AdapterPool(swapped, budget_bytes=BUDGET)
    pool.load(ref(7))
    with pytest.raises(CorruptAdapter, match="adapter 4 was asked for and unused holds 5"):
        pool.acquire(ref(4))
    pool.check_integrity()
    assert pool.stats()["adapters_resident"] == ["7"]


def test_a_full_pool_does_not_read_again() -> None:
    """Whoever retries while all is leased costs no disk access once the size is known."""
    reads: Counter[str] = Counter()

    def counting(adapter: AdapterRef) -> Adapter:
        reads[adapter.digest] += 1
        return read(adapter)

    pool = AdapterPool(counting, budget_bytes=BUDGET)
    lease = pool.acquire(ref(9))
    for _ in range(5):
        with pytest.raises(AdapterCacheFull, match="wait or raise adapter_cache_bytes"):
            pool.acquire(ref(4))
    assert reads["4"] == 1
    lease.release()
    pool.acquire(ref(4)).release()
