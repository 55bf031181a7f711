"""Brings the adapters of waiting requests to the device: disk and host in the background, the device between steps."""

from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Literal

from serve_apps.engine.adapter_pool import AdapterPool, Lease
from serve_apps.engine.errors import AdapterCacheFull, EngineError
from serve_apps.engine.packed_adapter import PackedAdapter
from serve_apps.engine.sequence import Sequence

# Adapters that waiting requests hold in memory beyond the host tier's budget, or have being read, at any time.
MAX_LOADS_AHEAD = 16
# How far down the line a step that admits nobody more looks for adapters to read.
MAX_LOOKED_AT = 64

Outcome = Literal["leased", "loading", "no room"]


class AdapterLoads:
    """Leases for sequences about to run. Of those that wait, the first in line have their adapters read ahead.

    A round is one pass over the waiting sequences in their order. What the first `MAX_LOADS_AHEAD` adapters of a round
    need is read, and held until it is on the device, so that no host tier is too small to make progress.
    """

    def __init__(self, pool: AdapterPool, *, max_step_bytes: int | None) -> None:
        """`max_step_bytes` bounds the distinct adapters that run together; one alone may exceed it."""
        self._pool = pool
        self._max_step_bytes = max_step_bytes
        self._held: dict[str, Future[PackedAdapter]] = {}
        self._wanted: dict[str, Future[PackedAdapter]] = {}
        self._running_bytes: dict[str, int] = {}
        self._running: Collection[Sequence] = ()
        self._num_looked_at = 0
        # Adapters on their way to the GPU, pinned until whoever waits for them can run.
        self._copying: dict[str, Lease] = {}
        self._still_copying: dict[str, Lease] = {}

    @property
    def is_loading(self) -> bool:
        """Whether a waiting sequence's adapter is being read."""
        return any(not future.done() for future in self._held.values())

    def begin_round(self, running: Collection[Sequence]) -> None:
        """Start a pass over the waiting sequences, given those that run, which grow by whom the pass admits."""
        self._wanted = {}
        self._num_looked_at = 0
        self._still_copying = {}
        self._running = running
        leases = [sequence.lease for sequence in running if sequence.lease is not None]
        self._running_bytes = {lease.digest: lease.num_bytes for lease in leases}

    def lease(self, sequence: Sequence) -> Outcome:
        """Pin the sequence's adapter if it can run now. Raises EngineError when it can never be loaded."""
        ref = sequence.request.adapter
        if ref is None:
            return "leased"
        num_bytes = self._pool.resident_bytes(ref.digest)
        packed: PackedAdapter | None = None
        if num_bytes is None:
            future = self._want(sequence)
            if future is None or not future.done():
                return "loading"
            packed = _result(future)
            num_bytes = packed.num_bytes
            if sequence.retry_after_release == self._pool.num_releases:
                return "no room"
        if not self._may_run(ref.digest, num_bytes):
            return "no room"
        try:
            lease = self._pool.lease(ref.digest) if packed is None else self._pool.place(packed)
        except AdapterCacheFull:
            sequence.retry_after_release = self._pool.num_releases
            return "no room"
        self._wanted.pop(ref.digest, None)
        if self._running and lease.copies is not None:
            # Others run: let them, rather than have their step wait for the bus.
            self._keep_copying(lease)
            return "loading"
        self._running_bytes[ref.digest] = num_bytes
        sequence.lease, sequence.adapter_digest = lease, lease.digest
        return "leased"

    def read_ahead(self, sequence: Sequence) -> bool:
        """Have the adapter of a sequence that cannot run yet read; False when that is enough for this round."""
        ref = sequence.request.adapter
        self._num_looked_at += 1
        if ref is not None and self._pool.resident_bytes(ref.digest) is None and self._want(sequence) is None:
            return False
        return self._num_looked_at < MAX_LOOKED_AT

    def end_round(self) -> None:
        """Let go of what no sequence at the head of the line asked for in this round."""
        self._held = self._wanted
        for lease in self._copying.values():
            lease.release()
        self._copying = self._still_copying

    def forget(self, digest: str) -> None:
        """Let go of an adapter that is unloaded; who still wants it has it read anew."""
        self._held.pop(digest, None)
        if digest in self._copying:
            self._copying.pop(digest).release()

    def wait(self, timeout_s: float) -> None:
        """Return as soon as one of the adapters being read is there, or after `timeout_s`."""
        pending = [future for future in self._held.values() if not future.done()]
        if pending:
            wait(pending, timeout=timeout_s, return_when=FIRST_COMPLETED)

    def check_integrity(self) -> None:
        """Assert the pool's accounts, and that no more is held than allowed."""
        self._pool.check_integrity()
        assert len(self._held) <= MAX_LOADS_AHEAD, "more adapters are read ahead than allowed"

    def _keep_copying(self, lease: Lease) -> None:
        if lease.digest in self._still_copying:
            lease.release()
        else:
            self._still_copying[lease.digest] = lease

    def _want(self, sequence: Sequence) -> "Future[PackedAdapter] | None":
        """Return the future of a sequence's adapter, starting its read; None when too many are ahead of it."""
        ref = sequence.request.adapter
        assert ref is not None
        if ref.digest not in self._wanted:
            if len(self._wanted) >= MAX_LOADS_AHEAD:
                return None
            self._wanted[ref.digest] = self._held.get(ref.digest) or self._pool.start(ref)
        return self._wanted[ref.digest]

    def _may_run(self, digest: str, num_bytes: int) -> bool:
        """Whether an adapter may join those that run; each costs a step its bytes, read once."""
        if self._max_step_bytes is None or digest in self._running_bytes or not self._running_bytes:
            return True
        return sum(self._running_bytes.values()) + num_bytes <= self._max_step_bytes


def _result(future: "Future[PackedAdapter]") -> PackedAdapter:
    """Return a finished read's adapter; whatever the read raised comes as EngineError, for it ends one request only."""
    try:
        return future.result()
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"reading the adapter failed: {type(error).__name__}: {error}") from error
