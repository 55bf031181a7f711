"""Adapters on the engine's device: one flat buffer, least recently used out first, leases that pin.

Tiers: disk -> host (`HostTier`, threads) -> device (here). Only the thread that steps the engine moves anything on the
device, between steps, so a running step never sees an adapter move; other threads may read `stats`.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from kernels.native import Native
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import AdapterCacheFull, AdapterInUse, AdapterTooLarge
from serve_apps.engine.host_tier import HostTier
from serve_apps.engine.lora_memory import LayerCopies, LoraMemory
from serve_apps.engine.packed_adapter import PackedAdapter


@dataclass(frozen=True)
class Resident:
    """An adapter on the device: its row in the table and its bytes in the buffer, the last line's rest included."""

    digest: str
    content_digest: str
    adapter_row: int
    num_bytes: int


class Lease:
    """Keeps one adapter resident, in the same table row, until released."""

    def __init__(self, pool: "AdapterPool", resident: Resident) -> None:
        self.digest = resident.digest
        self.content_digest = resident.content_digest
        self.adapter_row = resident.adapter_row
        self.num_bytes = resident.num_bytes
        self._pool = pool
        self._is_released = False

    @property
    def copies(self) -> LayerCopies | None:
        """The copy that brings the adapter to the device; None once it is there."""
        return self._pool.copies_of(self.digest)

    def release(self) -> None:
        """Let the pool evict the adapter again once nobody else leases it. A second call does nothing."""
        if not self._is_released:
            self._is_released = True
            self._pool.end_lease(self.digest)


class AdapterPool:
    """The device tier, by digest.

    An adapter is in host memory, whole and checked, before room is made for it: an unknown or corrupt one never costs
    a resident one its place.
    """

    def __init__(
        self,
        host: HostTier,
        *,
        num_layers: int,
        budget_bytes: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device,
        native: Native | None = None,
        alignment: int = 1,
    ) -> None:
        """Reserve `budget_bytes` on the device; on the CPU the system hands out pages on first use."""
        self._host = host
        self._budget_bytes = budget_bytes
        self._memory = LoraMemory(
            budget_bytes=budget_bytes,
            max_adapters=max_adapters,
            num_layers=num_layers,
            dtype=dtype,
            device=device,
            native=native,
            alignment=alignment,
        )
        self.lora = self._memory.lora
        self._free_rows = list(range(max_adapters - 1, -1, -1))
        self._lock = threading.Lock()
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._num_leases: dict[str, int] = {}
        self._copies: dict[str, LayerCopies] = {}
        self._num_hits = self._num_loads = self._num_evictions = 0
        # Grows whenever room may have appeared, so that a waiting request retries only when that can help.
        self.num_releases = 0

    def prefetch(self, ref: AdapterRef) -> None:
        """Make sure that an adapter is sound and in host memory. Raises EngineError. Safe to call from any thread."""
        if self.resident_bytes(ref.digest) is None:
            self.check_size(ref.digest, self._host.obtain(ref).data.numel())

    def is_known(self, digest: str) -> bool:
        """Whether an adapter is on the device or in host memory, so that nothing about it needs checking."""
        return self.resident_bytes(digest) is not None or self._host.holds(digest)

    def check_size(self, digest: str, num_weights: int) -> int:
        """Return the bytes that an adapter takes on the device. Raises AdapterTooLarge when it can never fit."""
        num_bytes = self._memory.bytes_of(num_weights)
        if num_bytes > self._memory.capacity_bytes:
            raise AdapterTooLarge(
                f"adapter {digest} takes {num_bytes} bytes, adapter_cache_bytes={self._budget_bytes}; raise the budget"
            )
        return num_bytes

    def start(self, ref: AdapterRef) -> "Future[PackedAdapter]":
        """Have an adapter brought to host memory; safe to call from any thread."""
        return self._host.start(ref)

    def resident_bytes(self, digest: str) -> int | None:
        """Return what an adapter takes on the device; None when it is not there."""
        with self._lock:
            resident = self._resident.get(digest)
            return None if resident is None else resident.num_bytes

    def copies_of(self, digest: str) -> LayerCopies | None:
        """Return the copy that brings a resident adapter; None once it is there."""
        with self._lock:
            copies = self._copies.get(digest)
            if copies is not None and copies.is_done:
                del self._copies[digest]
                return None
            return copies

    def lease(self, digest: str) -> Lease:
        """Pin a resident adapter."""
        with self._lock:
            self._num_hits += 1
            return self._pin(digest)

    def place(self, packed: PackedAdapter) -> Lease:
        """Copy an adapter to the device, evicting others, and pin it. Raises AdapterTooLarge, AdapterCacheFull."""
        with self._lock:
            if packed.digest not in self._resident:
                self._place(packed)
            return self._pin(packed.digest)

    def load(self, ref: AdapterRef) -> None:
        """Make an adapter resident without pinning it. Raises EngineError; AdapterCacheFull when all room is leased."""
        self.acquire(ref).release()

    def acquire(self, ref: AdapterRef) -> Lease:
        """Make an adapter resident and pin it, waiting for its read. Raises as `load`."""
        if self.resident_bytes(ref.digest) is not None:
            return self.lease(ref.digest)
        return self.place(self._host.obtain(ref))

    def end_lease(self, digest: str) -> None:
        """Undo one acquire; called by `Lease.release`."""
        with self._lock:
            assert self._num_leases.get(digest, 0) > 0, f"lease of {digest} ended twice"
            self._num_leases[digest] -= 1
            if not self._num_leases[digest]:
                del self._num_leases[digest]
            self.num_releases += 1

    def unload(self, digest: str) -> bool:
        """Free an adapter on the device and in host memory; False when it was in neither. Raises AdapterInUse."""
        with self._lock:
            if digest in self._num_leases:
                raise AdapterInUse(
                    f"adapter {digest} serves {self._num_leases[digest]} running requests; abort them or wait"
                )
            is_resident = digest in self._resident
            if is_resident:
                self._drop(digest)
                self.num_releases += 1
        return self._host.discard(digest) or is_resident

    def stats(self) -> dict[str, object]:
        """Return counts, bytes and the resident digests, least recently used first."""
        with self._lock:
            return {
                "adapters_resident": list(self._resident),
                "adapters_leased": len(self._num_leases),
                "adapter_bytes": self._memory.capacity_bytes - self._memory.free_bytes,
                "adapter_budget_bytes": self._budget_bytes,
                "adapter_hits": self._num_hits,
                "adapter_loads": self._num_loads,
                "adapter_evictions": self._num_evictions,
                "adapter_moved_bytes": self._memory.num_moved_bytes,
                **self._host.stats(),
            }

    def check_integrity(self) -> None:
        """Assert that bytes and rows add up, the budget holds, and whatever is leased is resident."""
        self._host.check_integrity()
        with self._lock:
            self._memory.arena.check_integrity()
            taken = self._memory.capacity_bytes - self._memory.free_bytes
            assert taken == sum(resident.num_bytes for resident in self._resident.values()), "bytes do not add up"
            assert taken <= self._budget_bytes, "over budget"
            rows = [resident.adapter_row for resident in self._resident.values()]
            assert sorted(rows + self._free_rows) == list(range(len(self.lora.host_table))), "a table row is lost"
            assert set(self._num_leases) <= set(self._resident), "a leased adapter is not resident"
            assert all(count > 0 for count in self._num_leases.values()), "a lease count is not positive"
            for row in self._free_rows:
                assert not self.lora.host_table[row].any(), "a free table row still names weights"

    def _pin(self, digest: str) -> Lease:
        self._resident.move_to_end(digest)
        self._num_leases[digest] = self._num_leases.get(digest, 0) + 1
        return Lease(self, self._resident[digest])

    def _place(self, packed: PackedAdapter) -> None:
        """Make room, copy, enter into the table."""
        num_bytes = self.check_size(packed.digest, packed.data.numel())
        self._check_room(packed.digest, num_bytes)
        self._evict_for(num_bytes)
        row = self._free_rows.pop()
        copies = self._memory.write(packed, row, row_of=lambda digest: self._resident[digest].adapter_row)
        if copies is not None:
            self._copies[packed.digest] = copies
        self._resident[packed.digest] = Resident(packed.digest, packed.content_digest, row, num_bytes)
        self._num_loads += 1

    def _check_room(self, digest: str, num_bytes: int) -> None:
        """Raise unless `num_bytes` and a row are there after evicting everything that is not leased."""
        leased = sum(self._resident[held].num_bytes for held in self._num_leases)
        if num_bytes + leased > self._memory.capacity_bytes:
            raise AdapterCacheFull(
                f"adapter {digest} takes {num_bytes} bytes, but requests lease {leased} of {self._budget_bytes}; "
                "wait or raise adapter_cache_bytes"
            )
        if len(self._num_leases) >= len(self.lora.host_table):
            raise AdapterCacheFull(f"requests lease all {len(self._num_leases)} rows of the table of adapters; wait")

    def _evict_for(self, num_bytes: int) -> None:
        """Drop what was used longest ago and is not leased until `num_bytes` and a row are free."""
        for digest in list(self._resident):
            if self._memory.free_bytes >= num_bytes and self._free_rows:
                return
            if digest not in self._num_leases:
                self._drop(digest)
                self._num_evictions += 1

    def _drop(self, digest: str) -> None:
        resident = self._resident.pop(digest)
        self._copies.pop(digest, None)
        self._memory.erase(digest, resident.adapter_row)
        self._free_rows.append(resident.adapter_row)
