"""The engine's adapter cache: a byte budget, least recently used out first, leases that pin, single-flight loads."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from serve_apps.engine.adapter import Adapter
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import AdapterCacheFull, AdapterInUse, AdapterTooLarge, CorruptAdapter, EngineError

Reader = Callable[[AdapterRef], Adapter]


class Lease:
    """Keeps one adapter resident until released."""

    def __init__(self, pool: "AdapterPool", adapter: Adapter) -> None:
        self.adapter = adapter
        self._pool = pool
        self._is_released = False

    def release(self) -> None:
        """Let the pool evict the adapter again once nobody else leases it. A second call does nothing."""
        if not self._is_released:
            self._is_released = True
            self._pool.end_lease(self.adapter.digest)


class AdapterPool:
    """Adapters on the engine's device by digest. Safe to use from several threads.

    A load reads and checks the files first and evicts second, so an unknown or corrupt adapter never costs a resident
    one its place; for the length of a load the process holds that one adapter beyond the budget.
    """

    def __init__(self, read: Reader, *, budget_bytes: int) -> None:
        """`read` turns a reference into an adapter on the device, raising EngineError."""
        self._read = read
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._resident: OrderedDict[str, Adapter] = OrderedDict()
        self._num_leases: dict[str, int] = {}
        self._loading: dict[str, Future[None]] = {}
        self._known_bytes: dict[str, int] = {}
        self._used_bytes = 0
        self._num_hits = self._num_loads = self._num_evictions = 0
        # Grows whenever room may have appeared, so that a waiting request retries only when that can help.
        self.num_releases = 0

    def load(self, ref: AdapterRef) -> None:
        """Make an adapter resident without pinning it. Raises EngineError; AdapterCacheFull when all room is leased."""
        self._obtain(ref, pin=False)

    def acquire(self, ref: AdapterRef) -> Lease:
        """Make an adapter resident and pin it. Raises as `load`."""
        return Lease(self, self._obtain(ref, pin=True))

    def end_lease(self, digest: str) -> None:
        """Undo one acquire; called by `Lease.release`."""
        with self._lock:
            assert self._num_leases.get(digest, 0) > 0, f"lease of {digest} ended twice"
            self._num_leases[digest] -= 1
            if not self._num_leases[digest]:
                del self._num_leases[digest]
            self.num_releases += 1

    def unload(self, digest: str) -> bool:
        """Free an adapter; False when it was not resident. Raises AdapterInUse while it is leased."""
        with self._lock:
            if digest not in self._resident:
                return False
            if digest in self._num_leases:
                raise AdapterInUse(
                    f"adapter {digest} serves {self._num_leases[digest]} running requests; abort them or wait"
                )
            self._drop(digest)
            self.num_releases += 1
            return True

    def stats(self) -> dict[str, object]:
        """Return counts, bytes and the resident digests, least recently used first."""
        with self._lock:
            return {
                "adapters_resident": list(self._resident),
                "adapters_leased": len(self._num_leases),
                "adapter_bytes": self._used_bytes,
                "adapter_budget_bytes": self._budget_bytes,
                "adapter_hits": self._num_hits,
                "adapter_loads": self._num_loads,
                "adapter_evictions": self._num_evictions,
            }

    def check_integrity(self) -> None:
        """Assert that bytes add up, the budget holds, and whatever is leased is resident."""
        with self._lock:
            assert self._used_bytes == sum(adapter.num_bytes for adapter in self._resident.values()), (
                "bytes do not add up"
            )
            assert self._used_bytes <= self._budget_bytes, "over budget"
            assert set(self._num_leases) <= set(self._resident), "a leased adapter is not resident"
            assert all(count > 0 for count in self._num_leases.values()), "a lease count is not positive"
            assert all(digest == adapter.digest for digest, adapter in self._resident.items()), (
                "an adapter lies under another digest"
            )

    def _obtain(self, ref: AdapterRef, *, pin: bool) -> Adapter:
        """Return the resident adapter, loading it when needed; of several threads that want it, one loads it."""
        while True:
            with self._lock:
                if ref.digest in self._resident:
                    self._num_hits += 1
                    return self._touch(ref.digest, pin=pin)
                running = self._loading.get(ref.digest)
                if running is None:
                    mine: Future[None] = Future()
                    self._loading[ref.digest] = mine
            if running is None:
                return self._load(ref, mine, pin=pin)
            running.result()

    def _load(self, ref: AdapterRef, done: "Future[None]", *, pin: bool) -> Adapter:
        """Read, make room, insert; whoever waits on `done` gets the same outcome."""
        try:
            with self._lock:
                self._check_room(ref.digest, self._known_bytes.get(ref.digest, 0))
            adapter = self._read(ref)
            if adapter.digest != ref.digest:
                raise CorruptAdapter(
                    f"adapter {ref.digest} was asked for and {ref.path} holds {adapter.digest}; fetch it again"
                )
            with self._lock:
                self._known_bytes[ref.digest] = adapter.num_bytes
                self._check_room(ref.digest, adapter.num_bytes)
                self._evict_until(self._budget_bytes - adapter.num_bytes)
                self._resident[ref.digest] = adapter
                self._used_bytes += adapter.num_bytes
                self._num_loads += 1
                self._touch(ref.digest, pin=pin)
                del self._loading[ref.digest]
        except BaseException as error:
            with self._lock:
                del self._loading[ref.digest]
            # A waiter must not see the KeyboardInterrupt of another thread as its own.
            done.set_exception(
                error if isinstance(error, Exception) else EngineError(f"loading {ref.digest} was interrupted")
            )
            raise
        done.set_result(None)
        return adapter

    def _touch(self, digest: str, *, pin: bool) -> Adapter:
        self._resident.move_to_end(digest)
        if pin:
            self._num_leases[digest] = self._num_leases.get(digest, 0) + 1
        return self._resident[digest]

    def _check_room(self, digest: str, num_bytes: int) -> None:
        """Raise unless `num_bytes` fit after evicting everything that is not leased."""
        if num_bytes > self._budget_bytes:
            raise AdapterTooLarge(
                f"adapter {digest} takes {num_bytes} bytes, adapter_cache_bytes={self._budget_bytes}; raise the budget"
            )
        leased = sum(self._resident[held].num_bytes for held in self._num_leases)
        if num_bytes + leased > self._budget_bytes:
            raise AdapterCacheFull(
                f"adapter {digest} takes {num_bytes} bytes, but requests lease {leased} of {self._budget_bytes}; "
                "wait or raise adapter_cache_bytes"
            )

    def _evict_until(self, allowed_bytes: int) -> None:
        for digest in list(self._resident):
            if self._used_bytes <= allowed_bytes:
                return
            if digest not in self._num_leases:
                self._drop(digest)
                self._num_evictions += 1

    def _drop(self, digest: str) -> None:
        self._used_bytes -= self._resident.pop(digest).num_bytes
