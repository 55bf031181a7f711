"""The device tier under random operations: what is resident, what it holds, and that nothing leased ever moves out."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kernels.lora import MODULES
from serve_apps.engine import lora_memory
from serve_apps.engine.adapter_pool import AdapterPool, Lease
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import AdapterCacheFull, AdapterInUse, AdapterTooLarge, CorruptAdapter
from serve_apps.engine.host_tier import HostTier, Reader
from serve_apps.engine.packed_adapter import PackedAdapter

# The budget in lines of 64 bytes, 16 float32 each. Digest "n" takes n lines; 11 never fits, and 3 is corrupt.
BUDGET, LINE = 10, 16
NUMBERS = st.integers(1, 11)
MAX_ADAPTERS = 4


def ref(number: int) -> AdapterRef:
    return AdapterRef(str(number), "unused")


def read(adapter: AdapterRef) -> PackedAdapter:
    """An adapter of one linear, layer 1 o_proj: A holds its number, B its number and a half."""
    number = int(adapter.digest)
    if number == 3:
        raise CorruptAdapter("3 is corrupt")
    half = number * LINE // 2
    table = torch.zeros(2, len(MODULES), 3, dtype=torch.int64)
    table[1, 3] = torch.tensor([0, half, 1])
    data = torch.cat((torch.full((half,), float(number)), torch.full((half,), number + 0.5)))
    return PackedAdapter(adapter.digest, adapter.digest, data, table, (0, 2 * half))


def pool_of(reader: Reader = read, *, host_lines: int = 100) -> AdapterPool:
    return AdapterPool(
        HostTier(reader, budget_bytes=host_lines * LINE * 4, num_threads=2),
        num_layers=2,
        budget_bytes=BUDGET * LINE * 4,
        max_adapters=MAX_ADAPTERS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def check_content(pool: AdapterPool, adapter_row: int, number: int) -> None:
    """Assert that the table row leads to the adapter's own A and B, and to nothing else."""
    a_start, b_start, rank = pool.lora.table[adapter_row, 1, 3].tolist()
    half = number * LINE // 2
    assert rank == 1 and b_start == a_start + half
    assert (pool.lora.data[a_start : a_start + half] == number).all()
    assert (pool.lora.data[b_start : b_start + half] == number + 0.5).all()
    assert int((pool.lora.table[adapter_row] != 0).any(-1).sum()) == 1


class PoolMachine(RuleBasedStateMachine):
    """A model of the pool: resident digests, oldest use first, and leases; compared after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(host_lines=12)
        self.resident: list[int] = []
        self.leases: list[tuple[int, Lease]] = []

    def leased(self) -> set[int]:
        return {number for number, _ in self.leases}

    def obtain(self, number: int) -> type[Exception] | None:
        """Apply one load to the model; return the error it must raise."""
        if number in self.resident:
            self.resident.remove(number)
        elif number == 3:
            return CorruptAdapter
        elif number > BUDGET:
            return AdapterTooLarge
        elif number + sum(self.leased()) > BUDGET or len(self.leased()) >= MAX_ADAPTERS:
            return AdapterCacheFull
        while sum(self.resident) + number > BUDGET or len(self.resident) >= MAX_ADAPTERS:
            self.resident.remove(next(other for other in self.resident if other not in self.leased()))
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
            was_resident = number in self.resident
            assert self.pool.unload(str(number)) or not was_resident
            assert not self.pool.unload(str(number))
            self.resident = [other for other in self.resident if other != number]

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert stats["adapters_resident"] == [str(number) for number in self.resident]
        assert stats["adapter_bytes"] == sum(self.resident) * LINE * 4
        assert stats["adapters_leased"] == len(self.leased())

    @invariant()
    def every_weight_is_where_the_table_says(self) -> None:
        for resident in self.pool._resident.values():
            check_content(self.pool, resident.adapter_row, int(resident.digest))
        for number, lease in self.leases:
            check_content(self.pool, lease.adapter_row, number)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_holes_too_small_for_an_adapter_are_moved_together() -> None:
    """After 2, 4, 1 and a rest of 3 lines, the 2 goes: five lines are free, no hole of five until leased ones move."""
    pool = pool_of()
    for number in (2, 4, 1):
        pool.load(ref(number))
    leases = {number: pool.acquire(ref(number)) for number in (4, 1)}
    pool.unload("2")
    pool.load(ref(5))
    assert pool.stats()["adapter_moved_bytes"] == 5 * LINE * 4 and pool.stats()["adapter_evictions"] == 0
    for number, lease in leases.items():
        check_content(pool, lease.adapter_row, number)
    pool.check_integrity()


@pytest.mark.parametrize("staging_elements", [LINE // 2, LINE * 3 // 2, BUDGET * LINE])
def test_moving_asks_for_no_memory(staging_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full device a compaction that fails half-way would leave a table that names other adapters' weights."""
    monkeypatch.setattr(lora_memory, "STAGING_BYTES", staging_elements * 4)
    pool = pool_of()
    clone = torch.Tensor.clone

    def full(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            raise torch.OutOfMemoryError("no room")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", full)
    for number in (2, 4, 1):
        pool.load(ref(number))
    leases = {number: pool.acquire(ref(number)) for number in (4, 1)}
    pool.unload("2")
    leases[5] = pool.acquire(ref(5))
    assert pool.stats()["adapter_moved_bytes"] == 5 * LINE * 4
    for number, lease in leases.items():
        check_content(pool, lease.adapter_row, number)


def test_unload_returns_every_byte() -> None:
    """Of the device and of the host, whatever order they came in."""
    pool = pool_of()
    for number in (1, 2, 4):
        pool.load(ref(number))
    for number in (2, 1, 4):
        assert pool.unload(str(number))
        pool.check_integrity()
    stats = pool.stats()
    assert stats["adapter_bytes"] == stats["adapter_host_bytes"] == stats["adapters_in_host"] == 0
    assert not pool.lora.table.any()
    pool.load(ref(10))


def test_a_failed_load_leaves_nothing_behind() -> None:
    """The next one who asks reads again, and gets the reason again."""
    pool = pool_of()
    for _ in range(2):
        with pytest.raises(CorruptAdapter):
            pool.acquire(ref(3))
    assert pool.stats()["adapters_resident"] == []


def test_another_adapter_than_the_one_asked_for_is_refused_and_evicts_nothing() -> None:
    def swapped(adapter: AdapterRef) -> PackedAdapter:
        return read(ref(5) if adapter.digest == "4" else adapter)

    pool = pool_of(swapped)
    pool.load(ref(7))
    with pytest.raises(CorruptAdapter, match="adapter 4 was asked for and unused holds 5"):
        pool.acquire(ref(4))
    pool.check_integrity()
    assert pool.stats()["adapters_resident"] == ["7"]


def test_all_rows_leased_is_a_full_cache() -> None:
    pool = pool_of()
    leases = [pool.acquire(AdapterRef(digest, "unused")) for digest in ("1", "01", "001", "0001")]
    with pytest.raises(AdapterCacheFull, match="all 4 rows"):
        pool.acquire(ref(2))
    leases[0].release()
    assert pool.acquire(ref(2)).adapter_row == leases[0].adapter_row
