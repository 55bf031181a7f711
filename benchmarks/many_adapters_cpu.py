"""2,000 registered adapters behind a device tier for 200, against the same traffic with every adapter resident.

    python -m benchmarks.many_adapters_cpu [--quick] [--check] [--law zipf] [--out FILE]

SmolLM2-135M's shape with random weights, rank 8 on q and v (1.8 MB each, 3.7 GB in all), fp32, 32 sequences at a time,
64 tokens in and 64 out. Both engines see the same requests; before the clock starts, the tiers hold what an earlier
stretch of the same traffic left in them. Popularity is Zipf 1.0 unless --law says otherwise.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.adapter_traffic import LAWS, draw, parser, report, smollm2_135m, write_adapters
from benchmarks.gpu_check import VOCABULARY_SIZE, Figure, prompt, save_model
from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
from serve_apps.engine.engine import Engine

NUM_ADAPTERS, NUM_RESIDENT, RANK, MODULES = 2000, 200, 8, ("q_proj", "v_proj")
NUM_IN, NUM_OUT, NUM_SEATS = 64, 64, 32
HOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Run:
    """One run of the traffic: seconds, time to first token of each request, and the engine's counters during it."""

    seconds: float
    first_token_s: list[float]
    counts: dict[str, float]


def build_engine(base: Path, *, device_bytes: int, host_bytes: int) -> Engine:
    """Build an engine with room for so many bytes of adapters; found prefixes would be no work done, so none are."""
    return Engine(
        EngineConfig(
            str(base),
            max_num_seqs=NUM_SEATS,
            max_model_len=NUM_IN + NUM_OUT,
            adapter_cache_bytes=device_bytes,
            adapter_host_bytes=host_bytes,
            enable_prefix_cache=False,
        )
    )


def measure(engine: Engine, refs: list[AdapterRef], warm: list[int], asked: list[int]) -> Run:
    """Bring the tiers to the state that `warm` leaves, then time the requests of `asked`, all there from the start."""
    for index in warm:
        engine.load(refs[index])
    sampling = SamplingParams(max_tokens=NUM_OUT, ignore_eos=True)
    requests = [
        Request(f"r{number}", prompt(NUM_IN, number), sampling, refs[index]) for number, index in enumerate(asked)
    ]
    before = counters(engine)
    first: dict[str, float] = {}
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            if output.error:
                raise RuntimeError(f"{output.request_id}: {output.error}")
            first.setdefault(output.request_id, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    after = counters(engine)
    return Run(seconds, list(first.values()), {name: after[name] - before[name] for name in before})


def counters(engine: Engine) -> dict[str, float]:
    """Return the counters of the tiers."""
    names = ("adapter_hits", "adapter_loads", "adapter_host_hits", "adapter_reads", "adapter_evictions")
    stats = engine.stats()
    return {name: float(str(stats[name])) for name in names}


def load_times(engine: Engine, refs: list[AdapterRef], sample: list[int]) -> tuple[float, float]:
    """Return the median seconds of disk to host (files in the page cache) and of host to device."""
    reads, copies = [], []
    for index in sample:
        engine.unload(refs[index].digest)
        start = time.perf_counter()
        engine.prefetch(refs[index])
        middle = time.perf_counter()
        engine.load(refs[index])
        reads.append(middle - start)
        copies.append(time.perf_counter() - middle)
    return statistics.median(reads), statistics.median(copies)


def figures(tiered: list[Run], resident: list[Run], times: tuple[float, float], adapter_bytes: int) -> list[Figure]:
    """Return the table, from the best run of each."""
    ours, theirs = min(tiered, key=lambda run: run.seconds), min(resident, key=lambda run: run.seconds)
    num_tokens = len(ours.first_token_s) * NUM_OUT
    num_leases = ours.counts["adapter_hits"] + ours.counts["adapter_loads"]
    return [
        Figure("all resident", num_tokens / theirs.seconds, "tokens/s"),
        Figure("200 of 2,000 on the device", num_tokens / ours.seconds, "tokens/s"),
        Figure("200 of 2,000 / all resident", theirs.seconds / ours.seconds, "ratio", 0.90),
        Figure("hit rate of the device tier", ours.counts["adapter_hits"] / num_leases, "ratio"),
        Figure("reads from disk", ours.counts["adapter_reads"], "adapters"),
        Figure("loads to the device", ours.counts["adapter_loads"], "adapters"),
        Figure("evictions from the device", ours.counts["adapter_evictions"], "adapters"),
        Figure("an adapter's bytes", adapter_bytes, "bytes"),
        Figure("disk to host, median, page cache", 1e3 * times[0], "ms"),
        Figure("host to device, median", 1e3 * times[1], "ms"),
        Figure("median time to first token, all resident", statistics.median(theirs.first_token_s), "s"),
        Figure("median time to first token, 200 of 2,000", statistics.median(ours.first_token_s), "s"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run both engines in turn; return the exit status."""
    options_parser = parser((__doc__ or "").splitlines()[0])
    options_parser.add_argument("--law", choices=LAWS, default="zipf", help="popularity of the adapters")
    options = options_parser.parse_args(arguments)
    num_requests, num_runs = (64, 2) if options.quick else (256, 3)
    transformers.utils.logging.set_verbosity_error()
    print(f"{NUM_ADAPTERS} adapters, {options.law} popularity; device tier for {NUM_RESIDENT} against all resident")
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), smollm2_135m(vocab_size=VOCABULARY_SIZE)
        save_model(config, folder / "base", dtype=torch.float32)
        refs = write_adapters(folder / "adapters", config, NUM_ADAPTERS, ranks=(RANK,), modules=MODULES)
        os.sync()  # else 3.7 GB are written back while the runs are timed
        warm = draw(options.law, NUM_ADAPTERS, 2 * NUM_RESIDENT if options.quick else 6 * NUM_RESIDENT, seed=1)
        adapter_bytes = bytes_of(folder / "base", refs[0])
        tiers = build_engine(folder / "base", device_bytes=NUM_RESIDENT * adapter_bytes, host_bytes=HOST_BYTES)
        whole = build_engine(folder / "base", device_bytes=NUM_ADAPTERS * adapter_bytes, host_bytes=1)
        tiered, resident = [], []
        for number in range(num_runs):
            asked = draw(options.law, NUM_ADAPTERS, num_requests, seed=10 + number)
            tiered.append(measure(tiers, refs, warm, asked))
            resident.append(measure(whole, refs, [*asked, *warm], asked))
        times = load_times(tiers, refs, list(range(40)))
    return report(figures(tiered, resident, times, adapter_bytes), options, law=options.law)


def bytes_of(base: Path, ref: AdapterRef) -> int:
    """Return what one of the adapters takes on the device."""
    engine = build_engine(base, device_bytes=64 << 20, host_bytes=1)
    engine.load(ref)
    return int(str(engine.stats()["adapter_bytes"]))


if __name__ == "__main__":
    sys.exit(main())
