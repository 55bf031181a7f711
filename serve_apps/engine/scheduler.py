"""Decides which tokens run next: continuous batching, chunked prefill, preemption, fairness between tenants."""

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from serve_apps.engine.adapter_loads import AdapterLoads
from serve_apps.engine.errors import EngineError
from serve_apps.engine.fair_queue import OUTPUT_TOKEN_PRICE, PROMPT_TOKEN_PRICE, FairQueue, arrival
from serve_apps.engine.kv_cache import BlockAllocator
from serve_apps.engine.prefix import extend_keys, first_key
from serve_apps.engine.sequence import Sequence

# A request whose adapter finds no room lets this many later ones pass; then nobody is admitted before it.
MAX_PASSED_OVER = 64


@dataclass(frozen=True)
class SchedulerLimits:
    """What bounds a step, and what the scheduler must know of the engine's settings."""

    block_size: int
    max_num_seqs: int
    max_step_tokens: int
    enable_prefix_cache: bool = True
    base_digest: str = ""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheduled:
    """The next `num_tokens` pending tokens of a sequence run in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def gives_token(self) -> bool:
        """Whether the last known token is among them, so that the next one can be chosen."""
        return self.num_tokens == self.sequence.num_pending


OnFailure = Callable[[Sequence, EngineError], None]


class Scheduler:
    """Owns the queues, and every sequence's blocks and lease.

    Deterministic for a given order of calls, but for the step in which an adapter comes from disk.
    """

    def __init__(self, allocator: BlockAllocator, loads: AdapterLoads, limits: SchedulerLimits) -> None:
        self._allocator = allocator
        self._loads = loads
        self._limits = limits
        self.waiting = FairQueue(limits.tenant_weights)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_prefix_hit_tokens = 0
        self._num_steps = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind its tenant's earlier ones."""
        self.waiting.push(sequence, self._num_steps)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or aborted sequence and give back all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def schedule(self, on_failure: OnFailure) -> list[Scheduled]:
        """Choose this step's work, sorted by adapter so that equal adapters are neighbours.

        `on_failure` hears of waiting sequences whose adapter can no longer be loaded, and must remove them.
        """
        self._num_steps += 1
        num_preemptions = self.num_preemptions
        plan = self._schedule_running()
        if num_preemptions == self.num_preemptions:
            self._admit(plan, on_failure)
        return sorted(plan, key=_adapter_then_arrival)

    def commit(self, sequence: Sequence, *, num_tokens: int, gave_token: bool) -> None:
        """Take over that `num_tokens` of a sequence were computed; before the token that they gave is appended.

        Its whole blocks can be found by others from then on: logits that are finite prove the keys behind them sound.
        """
        sequence.num_computed += num_tokens
        if not gave_token:
            return
        self.waiting.charge(sequence.request.tenant, OUTPUT_TOKEN_PRICE)
        if self._limits.enable_prefix_cache:
            self._extend_keys(sequence, sequence.num_computed)
            num_whole = sequence.num_computed // self._limits.block_size
            for index in range(sequence.num_registered, num_whole):
                self._allocator.register(sequence.blocks[index], sequence.block_keys[index + 1])
            sequence.num_registered = num_whole

    def restart(self, sequence: Sequence) -> None:
        """Have a running sequence's keys and values computed anew, because what they depend on has changed."""
        self.running.remove(sequence)
        self._give_back(sequence)
        self.add(sequence)

    def check_integrity(self) -> None:
        """Assert that blocks and leases are held by running sequences only, as many as their tokens need."""
        self._allocator.check_integrity([block for sequence in self.running for block in sequence.blocks])
        self._loads.check_integrity()
        self.waiting.check_integrity()
        for sequence in self.waiting:
            assert not sequence.blocks and sequence.lease is None and not sequence.num_computed, (
                "a waiting sequence holds something"
            )
        for sequence in self.running:
            assert len(sequence.blocks) >= self._num_blocks(sequence.num_computed), "computed tokens without a block"
            assert (sequence.lease is None) == (sequence.request.adapter is None), "a running sequence lacks its lease"
        assert self.running == sorted(self.running, key=arrival), "running sequences are out of order"
        assert len(self.running) <= self._limits.max_num_seqs, "more sequences run than there are seats"

    def _schedule_running(self) -> list[Scheduled]:
        """Every decoding sequence gets its token, prefills share the rest; the latest arrivals yield their blocks."""
        budget = self._limits.max_step_tokens
        shares: dict[int, int] = {}
        for sequence in sorted(self.running, key=lambda sequence: (sequence.num_pending > 1, sequence.arrival)):
            shares[sequence.arrival] = min(sequence.num_pending, budget)
            budget -= shares[sequence.arrival]
        plan: list[Scheduled] = []
        num_preemptions = self.num_preemptions
        for sequence in list(self.running):
            share = shares[sequence.arrival]
            if num_preemptions != self.num_preemptions and sequence not in self.running:
                continue
            if share and self._reserve(sequence, share):
                plan.append(Scheduled(sequence, share))
        return plan

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence blocks for its next tokens, preempting the latest arrivals; False when it went itself."""
        count = self._num_blocks(sequence.num_computed + num_tokens) - len(sequence.blocks)
        while count > self._allocator.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if count > 0:
            sequence.blocks += self._allocator.allocate(count, after=sequence.blocks[-1] if sequence.blocks else None)
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Send a running sequence back to wait; its tokens stay, their keys and values are found or computed again."""
        self.restart(victim)
        self.num_preemptions += 1

    def _admit(self, plan: list[Scheduled], on_failure: OnFailure) -> None:
        """Start waiting sequences while tokens, seats and blocks last, passing over whose adapter is not there yet."""
        budget = self._limits.max_step_tokens - sum(item.num_tokens for item in plan)
        passed_over: list[Sequence] = []
        is_closed = False
        self._loads.begin_round(self.running)
        for sequence in self.waiting.in_order(self._num_steps):
            is_closed = is_closed or budget < 1 or not self._has_room(sequence)
            if is_closed:
                if not self._loads.read_ahead(sequence):
                    break
                continue
            try:
                outcome = self._loads.lease(sequence)
            except EngineError as error:
                on_failure(sequence, error)
                continue
            if outcome == "loading":
                continue
            if outcome == "no room":
                is_closed |= sequence.num_passed_over >= MAX_PASSED_OVER
                passed_over.append(sequence)
                continue
            for earlier in passed_over:
                earlier.num_passed_over += 1
            budget -= self._start(sequence, plan, budget)
        self._loads.end_round()

    def _start(self, sequence: Sequence, plan: list[Scheduled], budget: int) -> int:
        """Let an admitted sequence run, from behind the prefix that is cached; return the tokens it takes."""
        self.waiting.admit(sequence, self._num_steps)
        insort(self.running, sequence, key=arrival)
        self._find_prefix(sequence)
        if not sequence.is_charged:
            sequence.is_charged = True
            self.waiting.charge(sequence.request.tenant, PROMPT_TOKEN_PRICE * sequence.num_pending)
        share = min(sequence.num_pending, budget)
        if not self._reserve(sequence, share):
            return 0
        plan.append(Scheduled(sequence, share))
        return share

    def _find_prefix(self, sequence: Sequence) -> None:
        """Hold the cached blocks that begin with the sequence's tokens; one token at least is left to compute."""
        if not self._limits.enable_prefix_cache:
            return
        lease = sequence.lease
        content_digest = None if lease is None else lease.content_digest
        start = first_key(self._limits.base_digest, content_digest, is_long=sequence.is_long)
        if not sequence.block_keys or sequence.block_keys[0] != start:
            sequence.block_keys = [start]
        num_findable = len(sequence.token_ids) - 1
        self._extend_keys(sequence, num_findable)
        num_blocks = num_findable // self._limits.block_size
        sequence.blocks = self._allocator.share(sequence.block_keys[1 : num_blocks + 1])
        sequence.num_computed = len(sequence.blocks) * self._limits.block_size
        sequence.num_registered = len(sequence.blocks)
        self.num_prompt_tokens += len(sequence.token_ids)
        self.num_prefix_hit_tokens += sequence.num_computed

    def _extend_keys(self, sequence: Sequence, num_tokens: int) -> None:
        extend_keys(sequence.block_keys, sequence.token_ids, block_size=self._limits.block_size, num_tokens=num_tokens)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there is a seat, and blocks beyond those that running prefills still have to take.

        All its tokens and one more must fit, or it would preempt itself at once; alone it may always try.
        """
        if not self.running:
            return True
        if len(self.running) >= self._limits.max_num_seqs:
            return False
        owed = sum(max(0, self._num_blocks(len(seq.token_ids)) - len(seq.blocks)) for seq in self.running)
        return self._num_blocks(len(sequence.token_ids) + 1) <= self._allocator.num_available - owed

    def _give_back(self, sequence: Sequence) -> None:
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_registered = 0
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)


def _adapter_then_arrival(item: Scheduled) -> tuple[str, int]:
    adapter = item.sequence.request.adapter
    return ("" if adapter is None else adapter.digest, item.sequence.arrival)
