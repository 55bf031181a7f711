"""Who comes next: a virtual token counter per tenant, so that nobody's flood delays the others.

A tenant's counter grows by the tokens computed for it, divided by its weight; the tenant with the least goes first, its
requests in order of arrival. A tenant that comes back is lifted to the least counter among those that wait: idling
saves nothing up. Source: Sheng et al., "Fairness in Serving Large Language Models", https://arxiv.org/abs/2401.00588,
algorithm 2, with the paper's prices. Ageing is ours: a waiting request gains credit with every step, so that no choice
of weights starves it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from serve_apps.engine.sequence import Sequence

# Prices of a prompt token computed and of a token generated.
PROMPT_TOKEN_PRICE, OUTPUT_TOKEN_PRICE = 1.0, 2.0
# Credit in tokens per step of waiting. A step serves a token to each running sequence, so this shifts a fair share by
# at most one running sequence's worth.
AGEING_PER_STEP = 1.0
# Beyond this many, counters of absent tenants that would be lifted anyway are forgotten.
MAX_IDLE_COUNTERS = 10_000


class FairQueue:
    """Waiting sequences. Deterministic: time is counted in steps."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` by tenant; 1 where it names none."""
        self._weights = dict(weights)
        self._by_tenant: dict[str, list[Sequence]] = {}
        self._counters: dict[str, float] = {}
        self._last_left = 0.0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return iter(sorted((seq for queue in self._by_tenant.values() for seq in queue), key=arrival))

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence among its tenant's by arrival."""
        tenant = sequence.request.tenant
        if tenant not in self._by_tenant:
            self._lift(tenant)
            self._by_tenant[tenant] = []
        insort(self._by_tenant[tenant], sequence, key=arrival)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, because it runs now or has ended."""
        tenant = sequence.request.tenant
        queue = self._by_tenant[tenant]
        index = bisect_left(queue, sequence.arrival, key=arrival)
        assert queue[index] is sequence, "a sequence is not where it was queued"
        del queue[index]
        self._num_waiting -= 1
        if not queue:
            del self._by_tenant[tenant]
            self._last_left = self._counters[tenant]

    def charge(self, tenant: str, price: float) -> None:
        """Count service to a tenant."""
        self._counters[tenant] = self._counters.get(tenant, 0.0) + price / self._weights.get(tenant, 1.0)

    def in_order(self, now: int) -> Iterator[Sequence]:
        """Yield every sequence that waits at the call once, each time the one whose turn it is by then.

        What is charged or removed between two yields counts for the next one.
        """
        queues = {tenant: list(reversed(queue)) for tenant, queue in self._by_tenant.items()}
        while queues:
            tenant = min(queues, key=lambda name: self._turn(queues[name][-1], now))
            yield queues[tenant].pop()
            if not queues[tenant]:
                del queues[tenant]

    def check_integrity(self) -> None:
        """Assert that queues are ordered, in the right place and counted."""
        for tenant, queue in self._by_tenant.items():
            assert queue and queue == sorted(queue, key=arrival), f"the queue of {tenant!r} is empty or out of order"
            assert all(sequence.request.tenant == tenant for sequence in queue), "a sequence waits in another's queue"
            assert tenant in self._counters, f"{tenant!r} has no counter"
        assert self._num_waiting == sum(len(queue) for queue in self._by_tenant.values()), "the count is off"

    def _turn(self, sequence: Sequence, now: int) -> tuple[float, int]:
        credit = AGEING_PER_STEP * (now - sequence.waiting_since)
        return self._counters[sequence.request.tenant] - credit, sequence.arrival

    def _lift(self, tenant: str) -> None:
        floor = min((self._counters[name] for name in self._by_tenant), default=self._last_left)
        if len(self._counters) > MAX_IDLE_COUNTERS:
            self._counters = {
                name: value for name, value in self._counters.items() if name in self._by_tenant or value > floor
            }
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)


def arrival(sequence: Sequence) -> int:
    """Return a sequence's place in the order of arrival."""
    return sequence.arrival
