"""Adapters on the engine's device: one flat buffer, least recently used out first, leases that pin.

Tiers: disk -> host (`HostTier`, threads) -> device (here). Only the thread that steps the engine moves anything on the
device, between steps, so a running step never sees an adapter move; other threads may read `stats`.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from kernels.lora import MODULES, LoraPool
from kernels.native import Native
from serve_apps.engine.arena import Arena
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import AdapterCacheFull, AdapterInUse, AdapterTooLarge
from serve_apps.engine.host_tier import HostTier
from serve_apps.engine.packed_adapter import PackedAdapter

# Adapters begin at multiples of this many bytes, a cache line, for loads as wide as the device has them.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Resident:
    """An adapter on the device: its row in the table and its bytes in the buffer, the last line's rest included."""

    digest: str
    adapter_row: int
    num_bytes: int


class Lease:
    """Keeps one adapter resident, in the same table row, until released."""

    def __init__(self, pool: "AdapterPool", resident: Resident) -> None:
        self.digest = resident.digest
        self.adapter_row = resident.adapter_row
        self._pool = pool
        self._is_released = False

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
    ) -> None:
        """Reserve `budget_bytes` on the device; on the CPU the system hands out pages on first use."""
        self._host = host
        self._budget_bytes = budget_bytes
        self._itemsize = dtype.itemsize
        self._arena = Arena(budget_bytes // dtype.itemsize, alignment=max(1, ALIGNMENT_BYTES // dtype.itemsize))
        host_table = torch.zeros(max_adapters, num_layers, len(MODULES), 3, dtype=torch.int64)
        self.lora = LoraPool(
            data=torch.empty(self._arena.size, dtype=dtype, device=device),
            table=host_table.to(device),
            host_table=host_table,
            native=native,
        )
        self._free_rows = list(range(max_adapters - 1, -1, -1))
        self._lock = threading.Lock()
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._num_leases: dict[str, int] = {}
        self._num_hits = self._num_loads = self._num_evictions = self._num_moved_bytes = 0
        # Grows whenever room may have appeared, so that a waiting request retries only when that can help.
        self.num_releases = 0

    def prefetch(self, ref: AdapterRef) -> None:
        """Make sure that an adapter is sound and in host memory. Raises EngineError. Safe to call from any thread."""
        with self._lock:
            if ref.digest in self._resident:
                return
        self._check_size(self._host.obtain(ref))

    def load(self, ref: AdapterRef) -> None:
        """Make an adapter resident without pinning it. Raises EngineError; AdapterCacheFull when all room is leased."""
        self._obtain(ref)

    def acquire(self, ref: AdapterRef) -> Lease:
        """Make an adapter resident and pin it. Raises as `load`."""
        resident = self._obtain(ref)
        with self._lock:
            self._num_leases[ref.digest] = self._num_leases.get(ref.digest, 0) + 1
        return Lease(self, resident)

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
                "adapter_bytes": (self._arena.size - self._arena.num_free) * self._itemsize,
                "adapter_budget_bytes": self._budget_bytes,
                "adapter_hits": self._num_hits,
                "adapter_loads": self._num_loads,
                "adapter_evictions": self._num_evictions,
                "adapter_moved_bytes": self._num_moved_bytes,
                **self._host.stats(),
            }

    def check_integrity(self) -> None:
        """Assert that bytes and rows add up, the budget holds, and whatever is leased is resident."""
        self._host.check_integrity()
        with self._lock:
            self._arena.check_integrity()
            taken = (self._arena.size - self._arena.num_free) * self._itemsize
            assert taken == sum(resident.num_bytes for resident in self._resident.values()), "bytes do not add up"
            assert taken <= self._budget_bytes, "over budget"
            rows = [resident.adapter_row for resident in self._resident.values()]
            assert sorted(rows + self._free_rows) == list(range(len(self.lora.host_table))), "a table row is lost"
            assert set(self._num_leases) <= set(self._resident), "a leased adapter is not resident"
            assert all(count > 0 for count in self._num_leases.values()), "a lease count is not positive"
            for row in self._free_rows:
                assert not self.lora.host_table[row].any(), "a free table row still names weights"

    def _obtain(self, ref: AdapterRef) -> Resident:
        with self._lock:
            if ref.digest in self._resident:
                self._num_hits += 1
                self._resident.move_to_end(ref.digest)
                return self._resident[ref.digest]
        packed = self._host.obtain(ref)
        with self._lock:
            return self._place(packed)

    def _place(self, packed: PackedAdapter) -> Resident:
        """Make room, copy, enter into the table."""
        num_bytes = self._check_size(packed)
        self._check_room(packed.digest, num_bytes)
        self._evict_for(num_bytes)
        start = self._arena.allocate(packed.digest, packed.data.numel())
        if start is None:
            self._compact(packed.data.numel())
            start = self._arena.allocate(packed.digest, packed.data.numel())
        assert start is not None, "no hole after compaction"
        resident = Resident(packed.digest, self._free_rows.pop(), num_bytes)
        self.lora.data[start : start + packed.data.numel()].copy_(packed.data)
        offsets = packed.table.clone()
        offsets[..., :2] += start * (packed.table[..., 2:] > 0)
        self._write_row(resident.adapter_row, offsets)
        self._resident[packed.digest] = resident
        self._num_loads += 1
        return resident

    def _check_size(self, packed: PackedAdapter) -> int:
        """Return the bytes that an adapter takes on the device. Raises AdapterTooLarge when it can never fit."""
        num_bytes = self._arena.rounded(packed.data.numel()) * self._itemsize
        if num_bytes > self._arena.size * self._itemsize:
            raise AdapterTooLarge(
                f"adapter {packed.digest} takes {num_bytes} bytes, adapter_cache_bytes={self._budget_bytes}; "
                "raise the budget"
            )
        return num_bytes

    def _check_room(self, digest: str, num_bytes: int) -> None:
        """Raise unless `num_bytes` and a row are there after evicting everything that is not leased."""
        leased = sum(self._resident[held].num_bytes for held in self._num_leases)
        if num_bytes + leased > self._arena.size * self._itemsize:
            raise AdapterCacheFull(
                f"adapter {digest} takes {num_bytes} bytes, but requests lease {leased} of {self._budget_bytes}; "
                "wait or raise adapter_cache_bytes"
            )
        if len(self._num_leases) >= len(self.lora.host_table):
            raise AdapterCacheFull(f"requests lease all {len(self._num_leases)} rows of the table of adapters; wait")

    def _evict_for(self, num_bytes: int) -> None:
        """Drop what was used longest ago and is not leased until `num_bytes` and a row are free."""
        for digest in list(self._resident):
            if self._arena.num_free * self._itemsize >= num_bytes and self._free_rows:
                return
            if digest not in self._num_leases:
                self._drop(digest)
                self._num_evictions += 1

    def _compact(self, size: int) -> None:
        """Move adapters together until one hole holds `size` elements, and point their table rows at the new places."""
        for move in self._arena.compact(size):
            source = self.lora.data[move.source : move.source + move.size]
            target = self.lora.data[move.target : move.target + move.size]
            target.copy_(source.clone() if move.source - move.target < move.size else source)
            row = self._resident[move.key].adapter_row
            offsets = self.lora.host_table[row].clone()
            offsets[..., :2] -= (move.source - move.target) * (offsets[..., 2:] > 0)
            self._write_row(row, offsets)
            self._num_moved_bytes += move.size * self._itemsize

    def _drop(self, digest: str) -> None:
        resident = self._resident.pop(digest)
        self._arena.free(digest)
        self._write_row(resident.adapter_row, torch.zeros_like(self.lora.host_table[0]))
        self._free_rows.append(resident.adapter_row)

    def _write_row(self, adapter_row: int, offsets: torch.Tensor) -> None:
        self.lora.host_table[adapter_row] = offsets
        if self.lora.table is not self.lora.host_table:
            self.lora.table[adapter_row].copy_(offsets)
