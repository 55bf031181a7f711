"""Times on the device, and the rates that floors are made of, measured in the same run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

# More than the L2 cache of any device (H200: 50 MB), so that every timed run reads its weights from memory.
FLUSH_BYTES = 256 << 20
COPY_BYTES = 2 << 30
GEMM_SIZE = 8192


@dataclass(frozen=True)
class Rates:
    """bytes/s that a copy on the device reads and writes in all; bf16 FLOP/s of a large product; host to device."""

    copy_bytes_per_s: float
    flops_per_s: float
    bus_bytes_per_s: float

    def floor_s(self, num_bytes: float, flops: float = 0.0) -> float:
        """Return the least time in which so many bytes move or so many products are made."""
        return max(num_bytes / self.copy_bytes_per_s, flops / self.flops_per_s)


def event_time_s(work: Callable[[], object], *, num_runs: int = 20, flush: bool = False) -> float:
    """Return the median seconds of one run on the device, after three that warm up; `flush` empties the caches."""
    scratch = torch.empty(FLUSH_BYTES if flush else 1, dtype=torch.int8, device="cuda")
    for _ in range(3):
        work()
    times = []
    for _ in range(num_runs):
        if flush:
            scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def graph_time_s(work: Callable[[], object], *, num_runs: int = 20) -> float:
    """As `event_time_s` with empty caches, of `work` as a CUDA graph: launches by the host are not in the time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return event_time_s(graph.replay, num_runs=num_runs, flush=True)


def measure_rates() -> Rates:
    """Copy on the device, multiply, and copy from page-locked host memory."""
    return Rates(2 * COPY_BYTES / _copy_s(), 2 * GEMM_SIZE**3 / _gemm_s(), FLUSH_BYTES / _bus_s())


def _copy_s() -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return event_time_s(lambda: target.copy_(source))


def _gemm_s() -> float:
    left = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda")
    right, out = torch.randn_like(left), torch.empty_like(left)
    return event_time_s(lambda: torch.mm(left, right, out=out))


def _bus_s() -> float:
    host = torch.empty(FLUSH_BYTES, dtype=torch.int8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    return event_time_s(lambda: there.copy_(host, non_blocking=True))
