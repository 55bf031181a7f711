"""An adapter from host memory to its first token, against the bus, and what that does to the others.

    python -m benchmarks.cold_load [--quick] [--check] [--out FILE]

A Llama-3.1-8B of random weights in bf16; adapters of rank 16 on all seven linears, 84 MB each, in page-locked host
memory. Cold: a request of one token in and one out whose adapter is not on the device. Warm: the same request again.
The bus time is the adapter's bytes at the rate of a page-locked copy measured in this run. Judged is the time that the
adapter adds, cold minus warm, because a step of this base alone takes longer than the bus; the whole is shown. Then 32
requests decode while every eighth step a cold adapter is asked for. The last line is one JSON object.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.cuda.device import measure_rates
from benchmarks.cuda.random_llama import LLAMA_8B, TOY, write_adapters, write_checkpoint
from benchmarks.cuda.report import Figure, Options, run
from kernels.lora import MODULES
from serve_apps.engine.bench import percentiles_ms
from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
from serve_apps.engine.engine import Engine

MAX_OF_BUS, MAX_P99_GROWTH = 2.0, 1.10
NUM_RESIDENT, NUM_DECODING, STEPS_PER_LOAD, NUM_STEPS = 8, 32, 8, 400
PROMPT = (1, 2, 3)


def figures(options: Options) -> Iterator[Figure]:
    """Yield the figures."""
    rank, count = (2, 12) if options.is_toy else (16, 24 if options.is_quick else 64)
    dtype = torch.float32 if options.is_toy else torch.bfloat16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = write_checkpoint(
            folder / "base", TOY if options.is_toy else LLAMA_8B, dtype=dtype, device=options.device
        )
        adapters = write_adapters(folder, spec, count, rank=rank, modules=MODULES)
        num_bytes = spec.num_layers * sum(rank * sum(spec.linear_shape(each)) for each in MODULES) * dtype.itemsize
        engine = Engine(
            EngineConfig(
                str(folder / "base"),
                dtype=str(dtype).removeprefix("torch."),
                device=options.device.type,
                max_num_seqs=NUM_DECODING + 1,
                max_model_len=1024,
                adapter_cache_bytes=NUM_RESIDENT * (num_bytes + 64),
                adapter_host_bytes=(count + 1) * (num_bytes + 4096),
                max_resident_adapters=NUM_RESIDENT,
                enable_prefix_cache=False,
            )
        )
        for adapter in adapters:
            engine.prefetch(adapter)
        yield from alone(engine, adapters, num_bytes, options)
        yield from beside_others(engine, adapters, options)


def alone(engine: Engine, adapters: Sequence[AdapterRef], num_bytes: int, options: Options) -> Iterator[Figure]:
    """One request at a time, its adapter cold and then warm; by the time it comes round again it is cold again."""
    first_token_s(engine, None)
    first_token_s(engine, adapters[0])
    loads = num_loads(engine)
    times = [(first_token_s(engine, adapter), first_token_s(engine, adapter)) for adapter in adapters[1:]]
    yield Figure("cold requests that copied their adapter", (num_loads(engine) - loads) / len(times), "ratio", 1.0)
    if options.is_toy:
        return
    bus_s = num_bytes / measure_rates().bus_bytes_per_s
    cold_s, warm_s = (median(each) for each in zip(*times, strict=True))
    yield Figure("adapter", num_bytes / 1e6, "MB")
    yield Figure("adapter over the bus", bus_s * 1e3, "ms")
    yield Figure("first token, cold", cold_s * 1e3, "ms")
    yield Figure("first token, warm", warm_s * 1e3, "ms")
    yield Figure("first token, cold / bus", cold_s / bus_s, "ratio")
    yield Figure("added by the load / bus", (cold_s - warm_s) / bus_s, "ratio", MAX_OF_BUS, is_ceiling=True)


def first_token_s(engine: Engine, adapter: AdapterRef | None) -> float:
    """Return the seconds from a request's arrival to its only token."""
    began = time.perf_counter()
    engine.add(Request("alone", PROMPT[:1], SamplingParams(max_tokens=1, ignore_eos=True), adapter))
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - began


def beside_others(engine: Engine, adapters: Sequence[AdapterRef], options: Options) -> Iterator[Figure]:
    """Decode without and with cold loads, twice each in turn; the p99 of the others' gaps between tokens."""
    num_steps = 24 if options.is_toy else NUM_STEPS
    gaps: dict[bool, list[float]] = {False: [], True: []}
    decode(engine, adapters, num_steps=num_steps // 4, with_loads=True)
    loads = num_loads(engine)
    for with_loads in (False, True, False, True):
        gaps[with_loads] += decode(engine, adapters, num_steps=num_steps, with_loads=with_loads)
    yield Figure("adapters copied meanwhile", num_loads(engine) - loads, "loads", 1.0)
    if options.is_toy:
        return
    quiet, busy = (percentiles_ms(gaps[with_loads])["p99"] for with_loads in (False, True))
    yield Figure("gap between tokens p99, no loads", quiet, "ms")
    yield Figure("gap between tokens p99, cold loads", busy, "ms")
    yield Figure("gap between tokens p99, growth", busy / quiet, "ratio", MAX_P99_GROWTH, is_ceiling=True)


def decode(engine: Engine, adapters: Sequence[AdapterRef], *, num_steps: int, with_loads: bool) -> list[float]:
    """Decode with the base model; return the seconds between steps that gave every decoding request a token."""
    sampling = SamplingParams(max_tokens=num_steps, ignore_eos=True)
    for index in range(NUM_DECODING):
        engine.add(Request(f"decoding-{index}", PROMPT, sampling))
    engine.step()
    gaps, num_cold, last = [], 0, time.perf_counter()
    for step in range(num_steps - 1):
        if with_loads and step % STEPS_PER_LOAD == 0:
            adapter = adapters[num_cold % len(adapters)]
            engine.add(Request(f"cold-{num_cold}", PROMPT, SamplingParams(max_tokens=1, ignore_eos=True), adapter))
            num_cold += 1
        given = {output.request_id for output in engine.step()}
        now = time.perf_counter()
        if any(name.startswith("decoding") for name in given):
            gaps.append(now - last)
            last = now
    while engine.has_unfinished:
        engine.step()
    return gaps


def num_loads(engine: Engine) -> int:
    """Return how many adapters were copied to the device so far."""
    return int(str(engine.stats()["adapter_loads"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return run(__doc__ or "", figures, arguments, peer="the bus, and the same engine without loads")


if __name__ == "__main__":
    sys.exit(main())
