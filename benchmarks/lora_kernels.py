"""LoRA shrink and expand of q/k/v in one step, against their roofline and a gathered torch.bmm.

    python -m benchmarks.lora_kernels [--quick] [--check] [--out FILE] [--plot FILE.svg]

1 to 8192 tokens, 1 to 256 adapters (tokens spread evenly over them, in random order), ranks 8, 16, 64 and mixed, the
shapes of Llama-3.1-8B in bf16. The roofline is the bytes of the adapters touched, of x once and of y twice at the rate
of a copy, or the FLOPs at the rate of a large product, both measured in this run; the peer gathers every token's A and
B (padded to the largest rank) and multiplies with torch.bmm. Times are medians of CUDA graph replays with cold caches,
the work list, which a step builds once for all layers, apart. The last line is one JSON object.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda.device import Rates, graph_time_s, measure_rates
from benchmarks.cuda.report import Figure, Options, run
from kernels.lora import LoraPool, LoraStep

MIN_OF_ROOFLINE, MIN_OVER_BMM = 0.70, 3.0
# The roofline is judged where it takes at least this long, the peer from this many adapters on.
MIN_JUDGED_S, MIN_JUDGED_ADAPTERS = 20e-6, 8
MAX_DIFFERENCE = {torch.bfloat16: 6e-2, torch.float32: 2e-4}
# What the peer may gather, its three modules together; 8192 tokens of rank 64 are 19 GB. Larger points have no peer.
MAX_GATHER_BYTES = 24 << 30
MIXED = (8, 16, 32, 64)


def figures(options: Options) -> Iterator[Figure]:
    """Yield the figures of every point."""
    if options.is_toy:
        for num_tokens, num_adapters, ranks in product((1, 9), (1, 3), ((2,), (3, 8))):
            case = Case(num_tokens, num_adapters, ranks, sizes=(64, (48, 16, 16)), device=options.device)
            yield case.difference()
        return
    rates = measure_rates()
    yield Figure("copy on the device", rates.copy_bytes_per_s / 1e12, "TB/s")
    yield Figure("bf16 product", rates.flops_per_s / 1e12, "TFLOP/s")
    tokens = (1, 16, 64, 256, 8192) if options.is_quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
    adapters = (1, 8, 64) if options.is_quick else (1, 2, 8, 32, 64, 128, 256)
    points: list[tuple[float, float]] = []
    for ranks, num_adapters, num_tokens in product(((8,), (16,), (64,), MIXED), adapters, tokens):
        if num_adapters <= num_tokens:
            case = Case(num_tokens, num_adapters, ranks, sizes=(4096, (4096, 1024, 1024)), device=options.device)
            yield from case.measure(rates, points)
    if options.plot:
        plot(points, options.plot)


class Case:
    """One point: adapters in a pool, tokens in random order, and the same adapters padded for the peer."""

    def __init__(
        self,
        num_tokens: int,
        num_adapters: int,
        ranks: Sequence[int],
        *,
        sizes: tuple[int, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        """`ranks` are given out in turn; `sizes`: of the input and of the outputs of q, k and v."""
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.in_size, self.out_sizes = sizes
        self.bounds = [0, *accumulate(self.out_sizes)]
        self.ranks = [ranks[index % len(ranks)] for index in range(num_adapters)]
        label = "mixed" if len(ranks) > 1 else str(ranks[0])
        self.name = f"rank {label}, {num_adapters} adapters, {num_tokens} tokens"
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(num_tokens, generator=generator) % num_adapters
        self.rows = order.to(device, torch.int32)
        self.x = torch.randn(num_tokens, self.in_size, generator=generator).to(device, self.dtype)
        self.y = torch.randn(num_tokens, self.bounds[-1], generator=generator).to(device, self.dtype)
        self.pool = self._pool(device)

    def _pool(self, device: torch.device) -> LoraPool:
        table = torch.zeros(len(self.ranks), 1, 7, 3, dtype=torch.int64)
        end = 0
        for row, rank in enumerate(self.ranks):
            for module, out_size in enumerate(self.out_sizes):
                table[row, 0, module] = torch.tensor([end, end + rank * self.in_size, rank])
                end += rank * (self.in_size + out_size)
        data = torch.randn(end, dtype=self.dtype, device=device) / math.sqrt(self.in_size)
        return LoraPool(data, table.to(device), table, alignment=8)

    def ours(self, y: Tensor, step: LoraStep) -> None:
        """Add LoRA to y by the kernels."""
        from kernels.lora_triton import lora_add_triton_

        lora_add_triton_(y, self.x, pool=self.pool, step=step, layer=0, modules=range(3), out_bounds=self.bounds)

    def step(self) -> LoraStep:
        """Return the step with its work list."""
        from kernels.lora_triton import with_work

        return with_work(LoraStep(self.rows, torch.zeros(1, 3, dtype=torch.int32)))

    def padded(self) -> list[tuple[Tensor, Tensor]]:
        """Return, per module, A [adapters, largest rank, I] and B [adapters, largest rank, O], zeros beyond a rank."""
        pairs = []
        for module, out_size in enumerate(self.out_sizes):
            shape = (len(self.ranks), max(self.ranks))
            a = torch.zeros(*shape, self.in_size, dtype=self.dtype, device=self.x.device)
            b = torch.zeros(*shape, out_size, dtype=self.dtype, device=self.x.device)
            for row in range(len(self.ranks)):
                a_start, b_start, rank = self.pool.host_table[row, 0, module].tolist()
                a[row, :rank] = self.pool.data[a_start : a_start + rank * self.in_size].view(rank, -1)
                b[row, :rank] = self.pool.data[b_start : b_start + rank * out_size].view(rank, -1)
            pairs.append((a, b))
        return pairs

    def peer(self, y: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Add LoRA to y by gathered products."""
        for module, (a, b) in enumerate(pairs):
            shrunk = torch.bmm(a[self.rows], self.x[:, :, None])
            y[:, self.bounds[module] : self.bounds[module + 1]] += torch.bmm(shrunk.mT, b[self.rows])[:, 0]

    def difference(self) -> Figure:
        """Hold the kernels against the peer."""
        ours, theirs = self.y.clone(), self.y.clone()
        self.ours(ours, self.step())
        self.peer(theirs, self.padded())
        worst = float((ours.float() - theirs.float()).abs().max())
        return Figure(f"{self.name}: difference", worst, "max |y - bmm|", MAX_DIFFERENCE[self.dtype], is_ceiling=True)

    def measure(self, rates: Rates, points: list[tuple[float, float]]) -> Iterator[Figure]:
        """Time ours, the work list and the peer."""
        from kernels.lora_triton import with_work

        step, y = self.step(), self.y.clone()
        ours_s = graph_time_s(lambda: self.ours(y, step))
        width, num_tokens = sum(self.out_sizes), self.x.shape[0]
        weights = sum(rank * (3 * self.in_size + width) for rank in self.ranks)
        per_token = sum(self.ranks[row] * (3 * self.in_size + width) for row in self.rows.tolist())
        num_bytes = (weights + num_tokens * (self.in_size + 2 * width)) * self.dtype.itemsize
        floor_s = rates.floor_s(num_bytes, 2 * per_token)
        points.append((floor_s * 1e6, ours_s * 1e6))
        yield Figure(f"{self.name}: shrink + expand", ours_s * 1e6, "us")
        floor = MIN_OF_ROOFLINE if ours_s > MIN_JUDGED_S else None
        yield Figure(f"{self.name}: of the roofline", floor_s / ours_s, "ratio", floor)
        bare = LoraStep(self.rows, torch.zeros(1, 3, dtype=torch.int32))
        yield Figure(f"{self.name}: work list", graph_time_s(lambda: with_work(bare, step.work)) * 1e6, "us")
        gather = num_tokens * max(self.ranks) * (3 * self.in_size + width) * self.dtype.itemsize
        if gather <= MAX_GATHER_BYTES:
            yield self.difference()
            pairs = self.padded()
            peer_s = graph_time_s(lambda: self.peer(y, pairs))
            least = MIN_OVER_BMM if len(self.ranks) >= MIN_JUDGED_ADAPTERS else None
            yield Figure(f"{self.name}: torch.bmm / ours", peer_s / ours_s, "ratio", least)


def plot(points: Sequence[tuple[float, float]], path: Path) -> None:
    """Draw time over roofline time, both in microseconds on logarithmic axes, the diagonal being the roofline."""
    highest = max(max(point) for point in points)
    decades = max(1, math.ceil(math.log10(highest)))
    side = 480

    def place(value: float) -> float:
        return side * max(0.0, math.log10(max(value, 1.0))) / decades

    dots = "".join(f'<circle cx="{40 + place(x):.1f}" cy="{side - place(y) + 10:.1f}" r="3"/>' for x, y in points)
    ticks = "".join(
        f'<text x="{40 + place(10.0**d):.0f}" y="{side + 28}">{10**d}</text>'
        f'<text x="2" y="{side + 10 - place(10.0**d):.0f}">{10**d}</text>'
        for d in range(decades + 1)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side + 80}" height="{side + 50}" font-size="11">'
        f'<line x1="40" y1="{side + 10}" x2="{side + 40}" y2="10" stroke="gray"/>{dots}{ticks}'
        f'<text x="120" y="{side + 45}">time of the roofline, us (up: time of shrink + expand, us)</text></svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return run(__doc__ or "", figures, arguments, peer=f"gathered torch.bmm, torch {torch.__version__}")


if __name__ == "__main__":
    sys.exit(main())
