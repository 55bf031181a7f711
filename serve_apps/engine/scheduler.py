"""Decides which tokens run next: continuous batching, chunked prefill, preemption by recompute, in arrival order."""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from serve_apps.engine.adapter_pool import AdapterPool
from serve_apps.engine.errors import AdapterCacheFull, EngineError
from serve_apps.engine.kv_cache import BlockAllocator
from serve_apps.engine.sequence import Sequence

# A request whose adapter finds no room lets this many later ones pass; then nobody is admitted before it.
MAX_PASSED_OVER = 64


@dataclass(frozen=True)
class Scheduled:
    """The next `num_tokens` pending tokens of a sequence run in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def gives_token(self) -> bool:
        """Whether the last known token is among them, so that the next one can be chosen."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """Owns the queues, and every sequence's blocks and lease. Deterministic for a given order of calls."""

    def __init__(
        self, allocator: BlockAllocator, pool: AdapterPool, *, block_size: int, max_num_seqs: int, max_step_tokens: int
    ) -> None:
        self._allocator = allocator
        self._pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_step_tokens = max_step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by arrival."""
        insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or aborted sequence and give back all it holds."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._give_back(sequence)

    def schedule(self, on_failure: Callable[[Sequence, EngineError], None]) -> list[Scheduled]:
        """Choose this step's work, sorted by adapter so that equal adapters are neighbours.

        `on_failure` hears of waiting sequences whose adapter can no longer be loaded, and must remove them.
        """
        num_preemptions = self.num_preemptions
        plan = self._schedule_running()
        if num_preemptions == self.num_preemptions:
            self._admit(plan, on_failure)
        return sorted(plan, key=_adapter_then_arrival)

    def check_integrity(self) -> None:
        """Assert that blocks and leases are held by running sequences only, as many as their tokens need."""
        self._allocator.check_integrity([block for sequence in self.running for block in sequence.blocks])
        self._pool.check_integrity()
        for sequence in self.waiting:
            assert not sequence.blocks and sequence.lease is None and not sequence.num_computed, (
                "a waiting sequence holds something"
            )
        for sequence in self.running:
            assert len(sequence.blocks) >= self._num_blocks(sequence.num_computed), "computed tokens without a block"
            assert (sequence.lease is None) == (sequence.request.adapter is None), "a running sequence lacks its lease"
        assert self.running == sorted(self.running, key=_arrival) and self.waiting == sorted(self.waiting, key=_arrival)

    def _schedule_running(self) -> list[Scheduled]:
        """Every decoding sequence gets its token, prefills share the rest; the latest arrivals yield their blocks."""
        budget = self._max_step_tokens
        shares: dict[int, int] = {}
        for sequence in sorted(self.running, key=lambda sequence: (sequence.num_pending > 1, sequence.arrival)):
            shares[sequence.arrival] = min(sequence.num_pending, budget)
            budget -= shares[sequence.arrival]
        plan: list[Scheduled] = []
        for sequence in list(self.running):
            share = shares[sequence.arrival]
            if sequence in self.running and share and self._reserve(sequence, share):
                plan.append(Scheduled(sequence, share))
        return plan

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence blocks for its next tokens, preempting the latest arrivals; False when it went itself."""
        count = self._num_blocks(sequence.num_computed + num_tokens) - len(sequence.blocks)
        while count > self._allocator.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if count > 0:
            sequence.blocks += self._allocator.allocate(count, after=sequence.blocks[-1] if sequence.blocks else None)
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Send a running sequence back to wait; its tokens stay, their keys and values are computed again."""
        self.running.remove(victim)
        self._give_back(victim)
        insort(self.waiting, victim, key=_arrival)
        self.num_preemptions += 1

    def _admit(self, plan: list[Scheduled], on_failure: Callable[[Sequence, EngineError], None]) -> None:
        """Start waiting sequences while tokens, seats and blocks last, passing over whose adapter finds no room."""
        budget = self._max_step_tokens - sum(item.num_tokens for item in plan)
        passed_over: list[Sequence] = []
        for sequence in list(self.waiting):
            # All its tokens and one more must fit, or it would preempt itself at once.
            is_room = self._num_blocks(len(sequence.token_ids) + 1) <= self._num_unreserved_blocks()
            if budget < 1 or len(self.running) >= self._max_num_seqs or not (is_room or not self.running):
                return
            try:
                is_leased = self._lease(sequence)
            except EngineError as error:
                on_failure(sequence, error)
                continue
            if not is_leased:
                if sequence.num_passed_over >= MAX_PASSED_OVER:
                    return
                passed_over.append(sequence)
                continue
            for earlier in passed_over:
                earlier.num_passed_over += 1
            share = min(sequence.num_pending, budget)
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_arrival)
            if self._reserve(sequence, share):
                plan.append(Scheduled(sequence, share))
                budget -= share

    def _num_unreserved_blocks(self) -> int:
        """Free blocks less those that running prefills still have to take for tokens they already know."""
        owed = sum(max(0, self._num_blocks(len(seq.token_ids)) - len(seq.blocks)) for seq in self.running)
        return self._allocator.num_free - owed

    def _lease(self, sequence: Sequence) -> bool:
        """Pin the sequence's adapter; False when there is no room for it until some lease ends."""
        if sequence.request.adapter is None:
            return True
        if sequence.retry_after_release == self._pool.num_releases:
            return False
        try:
            sequence.lease = self._pool.acquire(sequence.request.adapter)
        except AdapterCacheFull:
            sequence.retry_after_release = self._pool.num_releases
            return False
        sequence.adapter_digest = sequence.lease.digest
        return True

    def _give_back(self, sequence: Sequence) -> None:
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _adapter_then_arrival(item: Scheduled) -> tuple[str, int]:
    adapter = item.sequence.request.adapter
    return ("" if adapter is None else adapter.digest, item.sequence.arrival)
