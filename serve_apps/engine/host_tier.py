"""Adapters in host memory: read from disk by a few threads, each once at a time, kept in a byte-bounded LRU."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import CorruptAdapter
from serve_apps.engine.packed_adapter import PackedAdapter

Reader = Callable[[AdapterRef], PackedAdapter]
NUM_LOAD_THREADS = 4


class HostTier:
    """Packed adapters by digest. Safe to use from several threads.

    The budget bounds what is kept for later. An adapter on its way to somebody who waits for it lives beside it, in
    the future that the waiter holds, so that a tier too small for the traffic costs reads and never a request.
    """

    def __init__(
        self,
        read: Reader,
        *,
        budget_bytes: int,
        num_threads: int = NUM_LOAD_THREADS,
        on_thread_start: Callable[[], None] | None = None,
    ) -> None:
        """`read` turns a reference into a packed adapter, raising EngineError; `on_thread_start` runs once a thread."""
        self._read = read
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(num_threads, "trailmark-load", initializer=on_thread_start)
        self._kept: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._loading: dict[str, tuple[object, Future[PackedAdapter]]] = {}
        self._kept_bytes = 0
        self._num_hits = self._num_reads = self._num_evictions = 0

    def start(self, ref: AdapterRef) -> "Future[PackedAdapter]":
        """Return the adapter's future, done when it is kept already; of all who ask meanwhile, the first starts a read.

        Whoever stops waiting leaves the others unharmed: a read always runs to its end. A failed one is not
        remembered.
        """
        with self._lock:
            kept = self._kept.get(ref.digest)
            if kept is not None:
                self._kept.move_to_end(ref.digest)
                self._num_hits += 1
                done: Future[PackedAdapter] = Future()
                done.set_result(kept)
                return done
            if ref.digest not in self._loading:
                token = object()
                self._loading[ref.digest] = (token, self._threads.submit(self._load, ref, token))
            return self._loading[ref.digest][1]

    def obtain(self, ref: AdapterRef) -> PackedAdapter:
        """Return the adapter, waiting for it. Raises UnknownAdapter, CorruptAdapter, UnsupportedAdapter."""
        return self.start(ref).result()

    def holds(self, digest: str) -> bool:
        """Whether an adapter is kept."""
        with self._lock:
            return digest in self._kept

    def discard(self, digest: str) -> bool:
        """Forget an adapter, also one whose read is still running (who waits for it gets it, nobody keeps it)."""
        with self._lock:
            is_loading = self._loading.pop(digest, None) is not None
            is_kept = digest in self._kept
            if is_kept:
                self._drop(digest)
            return is_kept or is_loading

    def stats(self) -> dict[str, object]:
        """Return counts and bytes."""
        with self._lock:
            return {
                "adapters_in_host": len(self._kept),
                "adapters_loading": len(self._loading),
                "adapter_host_bytes": self._kept_bytes,
                "adapter_host_budget_bytes": self._budget_bytes,
                "adapter_host_hits": self._num_hits,
                "adapter_reads": self._num_reads,
                "adapter_host_evictions": self._num_evictions,
            }

    def check_integrity(self) -> None:
        """Assert that bytes add up, the budget holds, and nothing is kept and read at the same time."""
        with self._lock:
            assert self._kept_bytes == sum(packed.num_bytes for packed in self._kept.values()), "bytes do not add up"
            assert self._kept_bytes <= self._budget_bytes, "the host tier is over its budget"
            assert all(digest == packed.digest for digest, packed in self._kept.items()), "kept under another digest"
            assert not self._kept.keys() & self._loading.keys(), "an adapter is read although it is kept"

    def _load(self, ref: AdapterRef, token: object) -> PackedAdapter:
        """On a load thread: read, then keep the result unless it was discarded meanwhile."""
        packed: PackedAdapter | None = None
        try:
            read = self._read(ref)
            if read.digest != ref.digest:
                raise CorruptAdapter(
                    f"adapter {ref.digest} was asked for and {ref.path} holds {read.digest}; fetch it again"
                )
            packed = read
        finally:
            with self._lock:
                self._num_reads += 1
                if self._loading.get(ref.digest, (None,))[0] is token:
                    del self._loading[ref.digest]
                    if packed is not None:
                        self._keep(packed)
        return packed

    def _keep(self, packed: PackedAdapter) -> None:
        if packed.num_bytes > self._budget_bytes:
            return
        while self._kept_bytes + packed.num_bytes > self._budget_bytes:
            self._drop(next(iter(self._kept)))
            self._num_evictions += 1
        self._kept[packed.digest] = packed
        self._kept_bytes += packed.num_bytes

    def _drop(self, digest: str) -> None:
        self._kept_bytes -= self._kept.pop(digest).num_bytes
