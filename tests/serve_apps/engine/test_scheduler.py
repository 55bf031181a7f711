"""The scheduler under random operations, its fairness between tenants, and adapters that come late or not at all."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve_apps.engine import fair_queue
from serve_apps.engine.adapter_loads import MAX_LOADS_AHEAD
from serve_apps.engine.errors import AdapterInUse
from serve_apps.engine.fair_queue import OUTPUT_TOKEN_PRICE, PROMPT_TOKEN_PRICE
from serve_apps.engine.scheduler import MAX_PASSED_OVER
from tests.serve_apps.engine.scheduler_cases import BLOCK_SIZE, CORRUPT, Simulation


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of few prompts, adapters and tenants come and go; the simulation checks each step."""

    @initialize(
        num_blocks=st.integers(6, 14),
        max_num_seqs=st.integers(1, 4),
        max_step_tokens=st.integers(4, 12),
        pool_lines=st.integers(5, 8),
        host_lines=st.integers(1, 12),
        max_step_lines=st.one_of(st.none(), st.integers(1, 6)),
    )
    def build(self, **limits: int) -> None:
        self.simulation = Simulation(**limits, weights={"b": 2.5})  # type: ignore[arg-type]

    @rule(
        length=st.integers(1, 13),
        prompt=st.integers(0, 2),
        adapter=st.one_of(st.none(), st.integers(1, 5)),
        tenant=st.sampled_from("abc"),
        max_new_tokens=st.integers(1, 8),
    )
    def add(self, length: int, prompt: int, adapter: int | None, tenant: str, max_new_tokens: int) -> None:
        tokens = tuple((prompt * index) % 3 for index in range(length))
        self.simulation.add(tokens, adapter=adapter, tenant=tenant, max_new_tokens=max_new_tokens)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.simulation.disk.jobs)
    @rule(data=st.data())
    def disk_answers(self, data: st.DataObject) -> None:
        self.simulation.disk.run(data.draw(st.integers(0, len(self.simulation.disk.jobs) - 1)))

    @precondition(lambda self: self.simulation.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.end(data.draw(st.sampled_from(self.simulation.sequences)), "abort")

    @rule(adapter=st.integers(1, 5))
    def unload(self, adapter: int) -> None:
        self.simulation.loads.forget(str(adapter))
        running = [seq for seq in self.simulation.scheduler.running if seq.lease and seq.lease.digest == str(adapter)]
        if running:
            with pytest.raises(AdapterInUse):
                self.simulation.pool.unload(str(adapter))
        else:
            self.simulation.pool.unload(str(adapter))
            assert self.simulation.pool.resident_bytes(str(adapter)) is None

    @invariant()
    def accounts_hold(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check_integrity()
            queued = [*self.simulation.scheduler.waiting, *self.simulation.scheduler.running]
            assert {seq.arrival for seq in queued} == {seq.arrival for seq in self.simulation.sequences}

    def teardown(self) -> None:
        """Everything ends, in its own way, and gives back all it held."""
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        corrupt = {
            seq.arrival for seq in simulation.sequences if seq.request.adapter and seq.request.adapter.digest == "3"
        }
        left = {seq.arrival for seq in simulation.sequences}
        simulation.finish()
        assert {arrival for arrival in left if simulation.ended[arrival] == "error"} == corrupt
        assert simulation.allocator.num_available == simulation.allocator.num_blocks
        assert simulation.pool.stats()["adapters_leased"] == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_same_calls_give_the_same_plans() -> None:
    def plans() -> list[list[tuple[int, int]]]:
        simulation = Simulation(num_blocks=12)
        for index in range(30):
            simulation.add((index % 3,) * (1 + index % 9), adapter=1 + index % 2, tenant="ab"[index % 2])
        steps = []
        while simulation.sequences:
            if simulation.disk.jobs:
                simulation.disk.run(0)
            steps.append([(item.sequence.arrival, item.num_tokens) for item in simulation.step()])
        return steps

    assert plans() == plans()


def test_the_order_in_which_adapters_come_changes_no_token() -> None:
    def tokens(order: list[int]) -> dict[int, list[int]]:
        simulation = Simulation(num_blocks=12)
        sequences = [simulation.add((index,) * 5, adapter=adapter) for index, adapter in enumerate((1, 2, 4, 2, 1))]
        simulation.step()
        for index in order:
            simulation.disk.run(index)
            simulation.step()
        simulation.finish()
        return {sequence.arrival: sequence.token_ids for sequence in sequences}

    assert tokens([0, 0, 0]) == tokens([2, 1, 0]) == tokens([1, 0, 0])


def test_a_request_whose_adapter_is_read_blocks_nobody() -> None:
    simulation = Simulation()
    cold = simulation.add((1, 2), adapter=2)
    for _ in range(3):
        simulation.add((1, 2))
    while len(simulation.ended) < 3:
        assert simulation.step()
    assert simulation.loads.is_loading and simulation.step() == []
    simulation.disk.run(0)
    assert [item.sequence for item in simulation.step()] == [cold]


def test_a_read_that_fails_ends_its_own_requests_only() -> None:
    """A bug in the reader too: it concerns who needs that adapter."""
    simulation = Simulation()
    for adapter in (CORRUPT, 2, CORRUPT):
        simulation.add((1,), adapter=adapter)
    simulation.finish()
    assert simulation.ended == {0: "error", 1: "length", 2: "error"}
    simulation.pool._host._read = lambda ref: 1 // 0  # type: ignore[assignment]
    simulation.add((1,), adapter=4)
    simulation.add((1,), adapter=2)
    simulation.finish()
    assert simulation.ended[3] == "error" and simulation.ended[4] == "length"


def test_an_abort_while_its_adapter_is_read_leaves_nothing() -> None:
    simulation = Simulation()
    cold = simulation.add((1, 2), adapter=2)
    simulation.step()
    simulation.end(cold, "abort")
    simulation.step()
    assert not simulation.loads.is_loading
    simulation.disk.run(0)
    assert simulation.pool.unload("2")
    stats = simulation.pool.stats()
    assert stats["adapter_host_bytes"] == stats["adapter_bytes"] == stats["adapters_leased"] == 0


def test_a_host_tier_too_small_for_one_adapter_makes_progress_and_holds_little() -> None:
    simulation = Simulation(host_lines=1, pool_lines=4, max_num_seqs=2)
    for index in range(60):
        simulation.add((index % 7,), adapter=(1, 2, 4)[index % 3] if index % 2 else 2)
    simulation.finish()
    assert set(simulation.ended.values()) == {"length"}
    assert len(simulation.loads._held) <= MAX_LOADS_AHEAD


def test_distinct_adapters_of_a_step_are_bounded_and_nobody_starves() -> None:
    """Room for 3 lines a step: adapters of 1 and 2 lines run together, 2 and 4 do not; one alone may exceed it."""
    simulation = Simulation(max_num_seqs=4, max_step_lines=3)
    for index in range(4 * MAX_PASSED_OVER):
        simulation.add((index % 5,), adapter=(1, 2, 4, 1)[index % 4])
    seen: set[tuple[str, ...]] = set()
    while simulation.sequences:
        while simulation.disk.jobs:
            simulation.disk.run(0)
        leases = [item.sequence.request.adapter for item in simulation.step()]
        seen.add(tuple(sorted({ref.digest for ref in leases if ref is not None})))
    assert ("1", "2") in seen and ("4",) in seen
    assert not any("4" in together and len(together) > 1 for together in seen)


def backlogged(simulation: Simulation, tenants: str, *, steps: int) -> None:
    """Keep twenty requests of every tenant waiting; all prompts differ, so that no prefix is found."""
    for _ in range(steps):
        for tenant in tenants:
            waiting = sum(sequence.request.tenant == tenant for sequence in simulation.scheduler.waiting)
            for _ in range(20 - waiting):
                simulation.add((10_000 + simulation.num_added, *range(7)), tenant=tenant, max_new_tokens=6)
        simulation.step()


def bound(simulation: Simulation) -> float:
    """The paper's bound on two backlogged tenants, 2 max(price of a prompt, of all that runs), and a turn's ageing."""
    max_running_tokens = simulation.limits.max_num_seqs * (8 + 6)
    ageing = 3 * 2 * (8 + 6)
    return 2 * max(PROMPT_TOKEN_PRICE * 8, OUTPUT_TOKEN_PRICE * max_running_tokens) + ageing


def test_backlogged_tenants_are_served_alike_whoever_asks_more() -> None:
    simulation = Simulation(max_step_tokens=32, max_num_seqs=4)
    for _ in range(400):
        simulation.add((9, simulation.num_added, 1, 1), tenant="flood", max_new_tokens=6)
    backlogged(simulation, "ab", steps=600)
    assert min(simulation.service.values()) > 5 * bound(simulation)
    for tenant in "ab":
        assert abs(simulation.service[tenant] - simulation.service["flood"]) <= bound(simulation)


def test_weights_share_out_service() -> None:
    simulation = Simulation(max_step_tokens=32, max_num_seqs=4, weights={"a": 3.0})
    backlogged(simulation, "ab", steps=800)
    assert abs(simulation.service["a"] / 3 - simulation.service["b"]) <= bound(simulation)
    assert simulation.service["a"] > 2 * simulation.service["b"]


def test_who_was_away_saved_nothing_up() -> None:
    """A tenant that comes after a thousand steps is not served alone until it has caught up."""
    simulation = Simulation(max_step_tokens=32, max_num_seqs=4)
    backlogged(simulation, "a", steps=400)
    before = simulation.service["a"]
    backlogged(simulation, "ab", steps=200)
    assert abs(simulation.service["a"] - before - simulation.service["b"]) <= bound(simulation)


def test_ageing_serves_a_tenant_of_next_to_no_weight() -> None:
    simulation = Simulation(max_step_tokens=32, max_num_seqs=2, weights={"z": 1e-9})
    simulation.add((1, 2, 3), tenant="z", max_new_tokens=1)
    simulation.finish()
    late = simulation.add((1, 2, 4), tenant="z", max_new_tokens=1)
    simulation.scheduler.waiting._counters["z"] = 300.0 + max(simulation.scheduler.waiting._counters.values())
    for _ in range(600):
        backlogged(simulation, "a", steps=1)
        if late.arrival in simulation.ended:
            break
    assert simulation.ended[late.arrival] == "length"


def test_found_prefixes_cost_a_tenant_nothing() -> None:
    simulation = Simulation()
    for tenant in "ab":
        simulation.add(tuple(range(4 * BLOCK_SIZE + 1)), tenant=tenant, max_new_tokens=1)
        simulation.finish()
    counters = simulation.scheduler.waiting._counters
    assert counters["a"] == 4 * BLOCK_SIZE + 1 + OUTPUT_TOKEN_PRICE
    # b was lifted to a's counter when it came.
    assert counters["b"] - counters["a"] == 1 + OUTPUT_TOKEN_PRICE


def test_counters_of_tenants_long_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those below the floor, which would be lifted to it anyway; a debt above it stays."""
    monkeypatch.setattr(fair_queue, "MAX_IDLE_COUNTERS", 3)
    simulation = Simulation()
    simulation.add(tuple(range(90, 60, -1)), tenant="in debt", max_new_tokens=1)
    for index in range(8):
        simulation.add((index,), tenant=f"t{index}", max_new_tokens=1)
    simulation.finish()
    simulation.add((1,), tenant="t1")
    counters = simulation.scheduler.waiting._counters
    assert len(counters) <= 4 and counters["in debt"] == 32.0
    simulation.finish()
