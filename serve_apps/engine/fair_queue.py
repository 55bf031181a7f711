"""Who comes next: a virtual token counter per tenant, so that nobody's flood delays the others.

A tenant's counter grows by the tokens computed for it, divided by its weight; the tenant with the least goes first, its
requests in order of arrival. A tenant that comes back is lifted to the least counter among those that wait: idling
saves nothing up. Source: Sheng et al., "Fairness in Serving Large Language Models", https://arxiv.org/abs/2401.00588,
algorithm 2, with the paper's prices. Ageing is ours: a tenant that waits gains credit with every step in which it gets
nothing, so that no choice of weights starves it. (Credit for each request's own wait would reward a flood.)
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from serve_apps.engine.sequence import Sequence

# Prices of a prompt token computed and of a token generated.
PROMPT_TOKEN_PRICE, OUTPUT_TOKEN_PRICE = 1.0, 2.0
# Credit in tokens per step without admission. A step serves a token to each running sequence, so among tenants that are
# served in turn this shifts a share by a turn's length in steps.
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
        self._unserved_since: dict[str, int] = {}
        self._last_left: str | None = None
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return iter(sorted((seq for queue in self._by_tenant.values() for seq in queue), key=arrival))

    def push(self, sequence: Sequence, now: int) -> None:
        """Queue a sequence among its tenant's by arrival, in step `now`."""
        tenant = sequence.request.tenant
        if tenant not in self._by_tenant:
            self._lift(tenant)
            self._by_tenant[tenant] = []
            self._unserved_since[tenant] = now
        insort(self._by_tenant[tenant], sequence, key=arrival)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out that has ended."""
        tenant = sequence.request.tenant
        queue = self._by_tenant[tenant]
        index = bisect_left(queue, sequence.arrival, key=arrival)
        assert queue[index] is sequence, "a sequence is not where it was queued"
        del queue[index]
        self._num_waiting -= 1
        if not queue:
            del self._by_tenant[tenant]
            del self._unserved_since[tenant]
            self._last_left = tenant

    def admit(self, sequence: Sequence, now: int) -> None:
        """Take a sequence out that runs from step `now` on."""
        self._unserved_since[sequence.request.tenant] = now
        self.remove(sequence)

    def charge(self, tenant: str, price: float) -> None:
        """Count service to a tenant."""
        self._counters[tenant] = self._counters.get(tenant, 0.0) + price / self._weights.get(tenant, 1.0)

    def in_order(self, now: int) -> Iterator[Sequence]:
        """Yield every sequence that waits at the call once, each time the one whose turn it is by then.

        What is charged or removed between two yields counts for the next one.
        """
        queues = {tenant: list(reversed(queue)) for tenant, queue in self._by_tenant.items()}
        while queues:
            tenant = min(queues, key=lambda name: (self._turn(name, now), queues[name][-1].arrival))
            yield queues[tenant].pop()
            if not queues[tenant]:
                del queues[tenant]

    def check_integrity(self) -> None:
        """Assert that queues are ordered, in the right place and counted."""
        for tenant, queue in self._by_tenant.items():
            assert queue and queue == sorted(queue, key=arrival), f"the queue of {tenant!r} is empty or out of order"
            assert all(sequence.request.tenant == tenant for sequence in queue), "a sequence waits in another's queue"
            assert tenant in self._counters, f"{tenant!r} has no counter"
        assert self._unserved_since.keys() == self._by_tenant.keys(), "the tenants that age are others"
        assert self._num_waiting == sum(len(queue) for queue in self._by_tenant.values()), "the count is off"

    def _turn(self, tenant: str, now: int) -> float:
        return self._counters[tenant] - AGEING_PER_STEP * (now - self._unserved_since[tenant])

    def _lift(self, tenant: str) -> None:
        last = 0.0 if self._last_left is None else self._counters.get(self._last_left, 0.0)
        floor = min((self._counters[name] for name in self._by_tenant), default=last)
        if len(self._counters) > MAX_IDLE_COUNTERS:
            kept = self._by_tenant.keys() | {self._last_left}
            self._counters = {name: value for name, value in self._counters.items() if name in kept or value > floor}
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)


def arrival(sequence: Sequence) -> int:
    """Return a sequence's place in the order of arrival."""
    return sequence.arrival
