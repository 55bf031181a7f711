"""One decode step of a Llama-3.1-8B of random weights, against the bytes that it must read.

    python -m benchmarks.decode_floor [--quick] [--check] [--out FILE]

Batch 64, 1024 tokens of context each, bf16, through the engine's forward and its CUDA graphs; without adapters, with
64 distinct adapters of rank 16 on all seven linears (popularity: all distinct) and with one for all. The floor is the
weights, the adapters touched, and the keys and values, each byte read once, at the rate of a copy measured in this run
(bytes read plus bytes written). What LoRA costs a step of the base model is that step by the engine's way, buffers
refilled, over the bare forward captured in a graph of its own. The last line is one JSON object.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda.device import event_time_s, measure_rates
from benchmarks.cuda.random_llama import LLAMA_8B, TOY, random_model, random_pool, weight_bytes, write_config
from benchmarks.cuda.report import Figure, Options, run
from kernels.lora import LoraStep
from kernels.ops import AttentionPlan, AttentionRun, PagedBatch
from serve_apps.engine.architecture import ModelSpec
from serve_apps.engine.batch import StepBatch
from serve_apps.engine.graphs import Captured, CudaCapture, DecodeGraphs
from serve_apps.engine.kv_cache import KvCache
from serve_apps.engine.model import Model

MIN_BASE, MIN_DISTINCT, MAX_IDLE_COST = 0.85, 0.80, 1.015
MAX_TOY_DIFFERENCE = 1e-4
BLOCK_SIZE, RANK = 16, 16
BATCH, CONTEXT, CONTEXT_QUICK = 64, 1024, 256


class Bench:
    """A model, its cache filled at random, adapters, and steps in which every sequence decodes one token."""

    def __init__(
        self, spec: ModelSpec, *, batch: int, context_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.batch, self.context_len, self.device = spec, batch, context_len, device
        self.model: Model = random_model(spec, max_positions=context_len + 1, dtype=dtype, device=device)
        self.blocks_each = -(-context_len // BLOCK_SIZE)
        num_blocks = batch * self.blocks_each
        self.kv = KvCache(spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=device)
        for layer in range(spec.num_layers):
            for cache in self.kv.layer(layer):
                cache.normal_()
        generator = torch.Generator().manual_seed(0)
        self.tables = torch.randperm(num_blocks, generator=generator).view(batch, -1)
        self.pool = random_pool(spec, [RANK] * batch, dtype=dtype, device=device)

    def forward(self, step: StepBatch) -> Tensor:
        """Return the step's logits."""
        return self.model.forward(step, self.kv)

    def step(self, adapter_rows: Sequence[int]) -> StepBatch:
        """Lay out one decode step; runs and segments too, so that torch can compute it as well."""
        position = self.context_len - 1
        slots = self.tables.repeat_interleave(BLOCK_SIZE, 1) * BLOCK_SIZE
        slots += torch.arange(BLOCK_SIZE).repeat(self.blocks_each)
        device = self.device
        paged = PagedBatch(
            self.tables.to(device, torch.int32),
            torch.full((self.batch,), self.context_len, dtype=torch.int32, device=device),
            torch.arange(self.batch + 1, dtype=torch.int32, device=device),
            BLOCK_SIZE,
            has_decode=True,
            has_chunks=False,
        )
        runs = tuple(
            AttentionRun(row, 1, self.context_len, 0, slots[row, : self.context_len].to(device))
            for row in range(self.batch)
        )
        segments = [(row, token, token + 1) for token, row in enumerate(adapter_rows) if row >= 0]
        return StepBatch(
            token_ids=torch.arange(self.batch, device=device),
            positions=torch.full((self.batch,), position, device=device),
            slot_mapping=slots[:, position].to(device),
            logit_rows=torch.arange(self.batch, device=device),
            attention=AttentionPlan(runs, paged=paged),
            lora_pool=self.pool,
            lora=LoraStep(
                torch.tensor(adapter_rows, dtype=torch.int32, device=device),
                torch.tensor(segments, dtype=torch.int32).view(-1, 3),
            ),
            lora_copies=(),
        )

    def graphs(self, capture: Callable[[Callable[[], Tensor]], Captured]) -> DecodeGraphs:
        """Return the engine's graphs over this model."""
        return DecodeGraphs(
            self.forward,
            capture,
            lora_pool=self.pool,
            max_batch=self.batch,
            max_blocks=self.blocks_each,
            block_size=BLOCK_SIZE,
            device=self.device,
        )

    def num_bytes(self, num_adapters: int) -> int:
        """Return the bytes a step must read: weights, so many adapters, keys and values of every context."""
        keys_and_values = sum(cache.nbytes for layer in range(self.spec.num_layers) for cache in self.kv.layer(layer))
        read = keys_and_values * self.context_len // (self.blocks_each * BLOCK_SIZE)
        return weight_bytes(self.model) + self.pool.data.nbytes // self.batch * num_adapters + read


def figures(options: Options) -> Iterator[Figure]:
    """Yield the figures."""
    with tempfile.TemporaryDirectory() as folder:
        spec = write_config(Path(folder), TOY if options.is_toy else LLAMA_8B)
    with torch.inference_mode():
        yield from toy_figures(spec, options) if options.is_toy else timed_figures(spec, options)


def toy_figures(spec: ModelSpec, options: Options) -> Iterator[Figure]:
    """Hold the Triton forward, by way of graphs' buffers, against torch's over the same cache."""
    bench = Bench(spec, batch=3, context_len=21, dtype=torch.float32, device=options.device)
    capture = CudaCapture(options.device) if options.device.type == "cuda" else run_again
    graphs = bench.graphs(capture)
    for law, rows in (("base", [-1] * 3), ("distinct", [0, 1, 2]), ("one", [1] * 3)):
        step = bench.step(rows)
        actual = graphs.run(step)
        assert actual is not None
        actual, fused = actual.clone(), bench.model.cuda_forward
        bench.model.cuda_forward = None
        expected = bench.forward(replace(step, attention=replace(step.attention, paged=None)))
        bench.model.cuda_forward = fused
        worst = float((actual - expected).abs().max())
        yield Figure(f"{law}: difference", worst, "max |logit - torch|", MAX_TOY_DIFFERENCE, is_ceiling=True)
    yield Figure("bytes of a step", bench.num_bytes(3), "bytes")


def run_again(compute: Callable[[], Tensor]) -> Captured:
    """Stand for a graph where there is none: compute again from the same buffers."""
    logits = compute()

    def replay() -> None:
        logits.copy_(compute())

    return Captured(replay, logits)


def timed_figures(spec: ModelSpec, options: Options) -> Iterator[Figure]:
    """Time steps by the engine's way against the bytes they must read."""
    rates = measure_rates()
    yield Figure("copy on the device", rates.copy_bytes_per_s / 1e12, "TB/s")
    context_len = CONTEXT_QUICK if options.is_quick else CONTEXT
    bench = Bench(spec, batch=BATCH, context_len=context_len, dtype=torch.bfloat16, device=options.device)
    graphs = bench.graphs(CudaCapture(options.device))
    times = {}
    laws = {
        "base": ([-1] * BATCH, 0, MIN_BASE),
        f"{BATCH} distinct r16": (list(range(BATCH)), BATCH, MIN_DISTINCT),
        "one r16": ([1] * BATCH, 1, None),
    }
    for law, (rows, num_adapters, floor) in laws.items():
        step = bench.step(rows)
        times[law] = event_time_s(lambda step=step: graphs.run(step), num_runs=50)
        floor_s = rates.floor_s(bench.num_bytes(num_adapters))
        yield Figure(f"{law}: bytes", bench.num_bytes(num_adapters) / 1e9, "GB")
        yield Figure(f"{law}: step", times[law] * 1e3, "ms")
        yield Figure(f"{law}: tokens", BATCH / times[law], "tokens/s")
        yield Figure(f"{law}: of the byte floor", floor_s / times[law], "ratio", floor)
    base = bench.step([-1] * BATCH)
    bare_s = event_time_s(CudaCapture(options.device)(lambda: bench.forward(base)).replay, num_runs=50)
    cost = times["base"] / bare_s
    yield Figure("base step by the engine / bare forward", cost, "ratio", MAX_IDLE_COST, is_ceiling=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return run(__doc__ or "", figures, arguments, peer="the bytes that a step must read")


if __name__ == "__main__":
    sys.exit(main())
