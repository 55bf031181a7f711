"""2,000 registered adapters behind a device tier for 200, against the same traffic with every adapter resident.

    python -m benchmarks.many_adapters_cpu [--quick] [--check] [--law zipf] [--out FILE]

SmolLM2-135M's shape with random weights, rank 8 on q and v (1.8 MB each, 3.7 GB in all), fp32, 32 sequences at a time,
64 tokens in and 64 out. Both engines serve the same requests in turns, now one first and now the other, and what is
judged is the median over the pairs of turns: whatever slows the machine for a while slows both halves of a pair. Before
the clock starts, the tiers hold what an earlier stretch of the same traffic left in them. Popularity is Zipf 1.0 unless
--law says otherwise.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
    """Load the adapters of `warm`, then time the requests of `asked`, all there from the start."""
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
    """Return the table; turn i of both lists served the same requests, one right after the other."""
    ratios = sorted(theirs.seconds / ours.seconds for ours, theirs in zip(tiered, resident, strict=True))
    num_tokens = len(tiered[0].first_token_s) * NUM_OUT
    num_hits, num_loads = (sum(run.counts[f"adapter_{name}"] for run in tiered) for name in ("hits", "loads"))
    return [
        Figure("all resident, median", num_tokens / statistics.median(run.seconds for run in resident), "tokens/s"),
        Figure("200 of 2,000, median", num_tokens / statistics.median(run.seconds for run in tiered), "tokens/s"),
        Figure("200 of 2,000 / all resident, median of pairs", statistics.median(ratios), "ratio", 0.90),
        Figure("200 of 2,000 / all resident, least pair", ratios[0], "ratio"),
        Figure("200 of 2,000 / all resident, best pair", ratios[-1], "ratio"),
        Figure("pairs of turns", len(ratios), "pairs"),
        Figure("hit rate of the device tier", num_hits / (num_hits + num_loads), "ratio"),
        Figure("reads from disk", sum(run.counts["adapter_reads"] for run in tiered), "adapters"),
        Figure("loads to the device", num_loads, "adapters"),
        Figure("evictions from the device", sum(run.counts["adapter_evictions"] for run in tiered), "adapters"),
        Figure("an adapter's bytes", adapter_bytes, "bytes"),
        Figure("disk to host, median, page cache", 1e3 * times[0], "ms"),
        Figure("host to device, median", 1e3 * times[1], "ms"),
        Figure("median time to first token, all resident", _median_first_token_s(resident), "s"),
        Figure("median time to first token, 200 of 2,000", _median_first_token_s(tiered), "s"),
    ]


def _median_first_token_s(runs: list[Run]) -> float:
    return statistics.median(seconds for run in runs for seconds in run.first_token_s)


def take_turns(measures: tuple[Callable[[list[int]], Run], ...], turns: list[list[int]]) -> list[list[Run]]:
    """Give every turn's requests to each measure, in the order of the turn before reversed; runs by measure."""
    runs: list[list[Run]] = [[] for _ in measures]
    for number, asked in enumerate(turns):
        order = range(len(measures))
        for index in order if number % 2 else reversed(order):
            runs[index].append(measures[index](asked))
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Run both engines in turn; return the exit status."""
    options_parser = parser((__doc__ or "").splitlines()[0])
    options_parser.add_argument("--law", choices=LAWS, default="zipf", help="popularity of the adapters")
    options = options_parser.parse_args(arguments)
    num_requests, num_turns = (64, 3) if options.quick else (96, 5)
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
        for index in warm:
            tiers.load(refs[index])
        tiered, resident = take_turns(
            (
                lambda asked: measure(tiers, refs, [], asked),
                lambda asked: measure(whole, refs, asked, asked),
            ),
            [draw(options.law, NUM_ADAPTERS, num_requests, seed=10 + number) for number in range(num_turns)],
        )
        times = load_times(tiers, refs, list(range(40)))
    return report(figures(tiered, resident, times, adapter_bytes), options, law=options.law)


def bytes_of(base: Path, ref: AdapterRef) -> int:
    """Return what one of the adapters takes on the device."""
    engine = build_engine(base, device_bytes=64 << 20, host_bytes=1)
    engine.load(ref)
    return int(str(engine.stats()["adapter_bytes"]))


if __name__ == "__main__":
    sys.exit(main())
