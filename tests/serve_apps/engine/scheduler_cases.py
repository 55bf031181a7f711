"""A scheduler with everything round it but the model: adapters come when the test says, keys and values are names."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from kernels.lora import MODULES
from serve_apps.engine.adapter_loads import AdapterLoads
from serve_apps.engine.adapter_pool import AdapterPool
from serve_apps.engine.config import AdapterRef, Request, SamplingParams
from serve_apps.engine.errors import CorruptAdapter, EngineError
from serve_apps.engine.host_tier import HostTier
from serve_apps.engine.kv_cache import BlockAllocator
from serve_apps.engine.packed_adapter import PackedAdapter
from serve_apps.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from serve_apps.engine.sequence import Sequence

# An adapter "n" takes n lines of 64 bytes; number 3 is corrupt.
LINE_BYTES, CORRUPT = 64, 3
BLOCK_SIZE = 4


class ByHand:
    """An executor whose jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: function(*args)))
        return future

    def run(self, index: int) -> None:
        future, job = self.jobs.pop(index)
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)


def read(ref: AdapterRef) -> PackedAdapter:
    number = int(ref.digest)
    if number == CORRUPT:
        raise CorruptAdapter("3 is corrupt")
    table = torch.zeros(1, len(MODULES), 3, dtype=torch.int64)
    table[0, 0, 2] = 1
    return PackedAdapter(ref.digest, f"content {number}", torch.zeros(number * LINE_BYTES // 4), table, (0,))


class NoText:
    """A tokenizer without text."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return ""


class Simulation:
    """Plays the engine: commits what is scheduled and makes up the next token.

    `slots` names what each KV slot holds: the adapter's content and all tokens up to its own. Whatever a step reads
    must bear the name that the reader expects.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 3,
        max_step_tokens: int = 8,
        pool_lines: int = 8,
        host_lines: int = 100,
        max_step_lines: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.disk = ByHand()
        host = HostTier(read, budget_bytes=host_lines * LINE_BYTES)
        host._threads = self.disk  # type: ignore[assignment]
        self.pool = AdapterPool(
            host,
            num_layers=1,
            budget_bytes=pool_lines * LINE_BYTES,
            max_adapters=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.max_step_bytes = None if max_step_lines is None else max_step_lines * LINE_BYTES
        self.loads = AdapterLoads(self.pool, max_step_bytes=self.max_step_bytes)
        self.limits = SchedulerLimits(
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            base_digest="base",
            tenant_weights=weights or {},
        )
        self.allocator = BlockAllocator(num_blocks)
        self.scheduler = Scheduler(self.allocator, self.loads, self.limits)
        self.slots: list[object] = [None] * (num_blocks * BLOCK_SIZE)
        self.sequences: list[Sequence] = []
        self.ended: dict[int, str] = {}
        self.num_added = 0
        self.service: dict[str, float] = {}

    def add(
        self, prompt: tuple[int, ...], *, adapter: int | None = None, tenant: str = "", max_new_tokens: int = 3
    ) -> Sequence:
        ref = None if adapter is None else AdapterRef(str(adapter), "unused")
        request = Request(f"r{self.num_added}", prompt, SamplingParams(), ref, tenant)
        sequence = Sequence(request, arrival=self.num_added, max_new_tokens=max_new_tokens, tokenizer=NoText())
        self.num_added += 1
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def end(self, sequence: Sequence, why: str) -> None:
        self.ended[sequence.arrival] = why
        self.sequences.remove(sequence)
        self.scheduler.remove(sequence)

    def step(self) -> list[Scheduled]:
        def fail(sequence: Sequence, error: EngineError) -> None:
            self.end(sequence, "error")

        plan = self.scheduler.schedule(fail)
        self.check_plan(plan)
        for item in plan:
            self.run(item)
        for item in plan:
            self.commit(item)
        self.scheduler.check_integrity()
        return plan

    def check_plan(self, plan: list[Scheduled]) -> None:
        """Assert every limit of a step, and that equal adapters are neighbours."""
        assert sum(item.num_tokens for item in plan) <= self.limits.max_step_tokens
        assert len({item.sequence.arrival for item in plan}) == len(plan) <= self.limits.max_num_seqs
        assert all(1 <= item.num_tokens <= item.sequence.num_pending for item in plan)
        leases = [item.sequence.lease for item in plan if item.sequence.lease is not None]
        distinct = {lease.digest: lease.num_bytes for lease in leases}
        if self.max_step_bytes is not None and len(distinct) > 1:
            assert sum(distinct.values()) <= self.max_step_bytes
        digests = [lease.digest for lease in leases]
        assert digests == sorted(digests)
        for item in plan:
            ref, lease = item.sequence.request.adapter, item.sequence.lease
            assert (None if ref is None else ref.digest) == (None if lease is None else lease.digest)

    def run(self, item: Scheduled) -> None:
        """Write the new tokens' names, then read all tokens' names."""
        sequence = item.sequence
        end = sequence.num_computed + item.num_tokens
        expected = [self.name(sequence, position) for position in range(end)]
        slots = [sequence.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(end)]
        for position in range(sequence.num_computed, end):
            self.slots[slots[position]] = expected[position]
        assert [self.slots[slot] for slot in slots] == expected, "a sequence reads what is not its own"

    def name(self, sequence: Sequence, position: int) -> object:
        lease = sequence.lease
        return (None if lease is None else lease.content_digest, tuple(sequence.token_ids[: position + 1]))

    def commit(self, item: Scheduled) -> None:
        sequence, gives_token = item.sequence, item.gives_token
        tenant = sequence.request.tenant
        self.service[tenant] = self.service.get(tenant, 0.0) + item.num_tokens + 2 * gives_token
        self.scheduler.commit(sequence, num_tokens=item.num_tokens, gave_token=gives_token)
        if gives_token and sequence.append(hash(tuple(sequence.token_ids)) % 5)[1] is not None:
            self.end(sequence, "length")

    def finish(self, max_steps: int = 3000) -> None:
        """Step, with a disk that answers, until all have ended."""
        for _ in range(max_steps):
            if not self.sequences:
                return
            while self.disk.jobs:
                self.disk.run(0)
            self.step()
        raise AssertionError(f"{len(self.sequences)} requests never ended")
