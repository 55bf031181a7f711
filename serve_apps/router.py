"""Which replica answers: the one that an adapter belongs to, or the least loaded one when that is too busy.

Serve's own multiplexing sends the list of every adapter on every replica through its controller. Here nothing is
reported: all routers rank replicas by rendezvous hashing of (adapter, replica), so each adapter has the same home
everywhere, and a replica that comes or goes moves only the adapters it owns. The replica's own cache does the rest.

`AdapterAffinityRouter` builds on Ray 2.60's RequestRouter, an alpha API: tests/serve_apps/test_router.py holds what we
rely on.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

DEFAULT_MAX_SPILL = 8


def rank_replicas(adapter: str, loads: Mapping[str, int], *, max_spill: int) -> list[list[str]]:
    """Return replica ids in ranks, best first; `loads` gives the requests each one holds.

    Without an adapter the least loaded comes first. With one its home does, unless the home holds more than `max_spill`
    requests above the least loaded; then the least loaded goes first and the home second. The others follow in the
    adapter's own order, so that what spills again lands where it spilled before.
    """
    if not adapter:
        return [[replica] for replica in sorted(loads, key=lambda replica: (loads[replica], replica))]
    order = sorted(loads, key=lambda replica: _weight(adapter, replica), reverse=True)
    home = order[0]
    idlest = min(order, key=lambda replica: loads[replica])
    if loads[home] - loads[idlest] > max_spill:
        order.remove(idlest)
        order.insert(0, idlest)
    return [[replica] for replica in order]


def _weight(adapter: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{adapter}\0{replica}".encode(), digest_size=16).digest()


class AdapterAffinityRouter(RequestRouter):
    """Routes by the handle's `multiplexed_model_id`: the gateway sets the adapter's digest, "" for the base."""

    _max_spill = DEFAULT_MAX_SPILL

    def initialize_state(self, **kwargs: Any) -> None:
        """Take `max_spill` from RequestRouterConfig.request_router_kwargs."""
        self._max_spill = int(kwargs.get("max_spill", DEFAULT_MAX_SPILL))

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return one replica a rank: Serve tries them in order and comes back after a pause when all are full."""
        if not candidate_replicas:
            return []
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in by_id.items()}
        return [[by_id[name] for name in rank] for rank in rank_replicas(adapter, loads, max_spill=self._max_spill)]
