"""Thousands of adapters behind one engine: throughput and waiting against the base model under the same traffic.

    python -m benchmarks.many_adapters [--quick] [--check] [--out FILE]

A Llama-3.1-8B of random weights in bf16; 2,000 registered adapters of rank 8 on q, k, v and o (13.6 MB each), all in
host memory, room for 500 on the device; 64 requests in flight, each 128 tokens in and 64 out, a new one as one ends.
Which adapter a request takes: Zipf with exponent 1.0, then uniform. Each law runs once to warm the device's adapters
and then is measured. Eight files' worth of random weights stand for the 2,000. The last line is one JSON object.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cuda.random_llama import LLAMA_8B, NUM_WORDS, TOY, Shape, write_adapters, write_checkpoint
from benchmarks.cuda.report import Figure, Options, run
from serve_apps.engine.bench import percentiles_ms
from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
from serve_apps.engine.engine import Engine

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MIN_OF_BASE, MAX_FIRST_TOKEN = 0.90, 2.0
NUM_READERS = 4


@dataclass(frozen=True)
class Traffic:
    """`num_resident` adapters fit on the device; `concurrency` requests are in flight until `num_requests` are done."""

    shape: Shape
    num_adapters: int
    num_resident: int
    rank: int
    concurrency: int
    num_requests: int
    input_tokens: int
    output_tokens: int


FULL = Traffic(LLAMA_8B, 2000, 500, 8, 64, 1024, 128, 64)
QUICK = Traffic(LLAMA_8B, 200, 100, 8, 64, 256, 128, 64)
SMALL = Traffic(TOY, 10, 4, 2, 3, 12, 5, 3)


@dataclass(frozen=True)
class Measured:
    """What one law's requests came to."""

    tokens_per_s: float
    first_token_p99_ms: float
    num_output_tokens: int
    num_loads: int
    num_hits: int


def figures(options: Options) -> Iterator[Figure]:
    """Yield the figures of every law."""
    traffic = SMALL if options.is_toy else QUICK if options.is_quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = torch.float32 if options.is_toy else torch.bfloat16
        spec = write_checkpoint(folder / "base", traffic.shape, dtype=dtype, device=options.device)
        adapters = write_adapters(folder, spec, traffic.num_adapters, rank=traffic.rank, modules=MODULES)
        num_weights = spec.num_layers * sum(traffic.rank * sum(spec.linear_shape(module)) for module in MODULES)
        engine = build_engine(folder / "base", traffic, adapter_bytes=num_weights * dtype.itemsize, options=options)
        began = time.perf_counter()
        with ThreadPoolExecutor(NUM_READERS) as readers:
            list(readers.map(engine.prefetch, adapters))
        prefetch_s = time.perf_counter() - began
        if not options.is_toy:
            yield Figure("adapter", num_weights * dtype.itemsize / 1e6, "MB")
            yield Figure("all adapters from disk to host", prefetch_s, "s")
        yield from compare(engine, adapters, traffic, is_toy=options.is_toy)


def build_engine(base: Path, traffic: Traffic, *, adapter_bytes: int, options: Options) -> Engine:
    """Room for all adapters in host memory and for `num_resident` on the device."""
    return Engine(
        EngineConfig(
            str(base),
            dtype="float32" if options.is_toy else "bfloat16",
            device=options.device.type,
            max_num_seqs=traffic.concurrency,
            max_model_len=traffic.input_tokens + traffic.output_tokens + 1,
            max_step_tokens=max(1024, traffic.concurrency) if not options.is_toy else 16,
            adapter_cache_bytes=traffic.num_resident * (adapter_bytes + 64),
            adapter_host_bytes=(traffic.num_adapters + 1) * (adapter_bytes + 4096),
            max_resident_adapters=traffic.num_resident,
            enable_prefix_cache=False,
        )
    )


def compare(engine: Engine, adapters: Sequence[AdapterRef], traffic: Traffic, *, is_toy: bool) -> Iterator[Figure]:
    """Run the base, Zipf and uniform, each once to warm up and once to measure."""
    results = {}
    for law in ("base", "zipf", "uniform"):
        serve(engine, requests_of(law, adapters, traffic, seed=1), concurrency=traffic.concurrency)
        results[law] = serve(engine, requests_of(law, adapters, traffic, seed=2), concurrency=traffic.concurrency)
    expected = traffic.num_requests * traffic.output_tokens
    for law, result in results.items():
        yield Figure(f"{law}: output", result.num_output_tokens / expected, "of what was asked for", 1.0)
        if law != "base":
            yield Figure(f"{law}: adapters copied to the device", result.num_loads, "loads")
            share = result.num_hits / max(1, result.num_hits + result.num_loads)
            yield Figure(f"{law}: found on the device", share, "ratio")
    if is_toy:
        return
    base = results["base"]
    for law, result in results.items():
        yield Figure(f"{law}: throughput", result.tokens_per_s, "tokens/s")
        yield Figure(f"{law}: p99 time to first token", result.first_token_p99_ms, "ms")
        if law != "base":
            floor, ceiling = (MIN_OF_BASE, MAX_FIRST_TOKEN) if law == "zipf" else (None, None)
            yield Figure(f"{law}: throughput / base", result.tokens_per_s / base.tokens_per_s, "ratio", floor)
            waiting = result.first_token_p99_ms / base.first_token_p99_ms
            yield Figure(f"{law}: p99 time to first token / base", waiting, "ratio", ceiling, is_ceiling=True)


def requests_of(law: str, adapters: Sequence[AdapterRef], traffic: Traffic, *, seed: int) -> list[Request]:
    """Return random prompts; under zipf adapter i is taken with weight 1 / (i + 1)."""
    generator = random.Random(seed)
    weights = [1 / (index + 1) if law == "zipf" else 1.0 for index in range(len(adapters))]
    chosen = generator.choices(adapters, weights, k=traffic.num_requests)
    sampling = SamplingParams(max_tokens=traffic.output_tokens, ignore_eos=True)
    return [
        Request(
            f"{law}-{seed}-{index}",
            tuple(generator.randrange(NUM_WORDS) for _ in range(traffic.input_tokens)),
            sampling,
            None if law == "base" else adapter,
        )
        for index, adapter in enumerate(chosen)
    ]


def serve(engine: Engine, requests: Sequence[Request], *, concurrency: int) -> Measured:
    """Keep `concurrency` requests in flight; a request's time to its first token begins when it is added."""
    before = engine.stats()
    waiting, added_at, first_s = list(reversed(requests)), {}, {}
    num_running = num_output = 0
    began = time.perf_counter()
    while waiting or engine.has_unfinished:
        while waiting and num_running < concurrency:
            request = waiting.pop()
            added_at[request.request_id] = time.perf_counter()
            engine.add(request)
            num_running += 1
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
            first_s.setdefault(output.request_id, now - added_at[output.request_id])
            num_output += len(output.new_token_ids)
            num_running -= output.finished
    wall_s, after = time.perf_counter() - began, engine.stats()
    return Measured(
        tokens_per_s=num_output / wall_s,
        first_token_p99_ms=percentiles_ms(list(first_s.values()))["p99"],
        num_output_tokens=num_output,
        num_loads=int(str(after["adapter_loads"])) - int(str(before["adapter_loads"])),
        num_hits=int(str(after["adapter_hits"])) - int(str(before["adapter_hits"])),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return run(__doc__ or "", figures, arguments, peer="the same engine and traffic without adapters")


if __name__ == "__main__":
    sys.exit(main())
