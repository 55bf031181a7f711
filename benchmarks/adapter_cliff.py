"""8, 16, then 64 adapters over room for 8: what the time to first token becomes.

    python -m benchmarks.adapter_cliff [--quick] [--check] [--out FILE]

A random Llama of 33 M parameters, rank 16 on all seven linears, fp32; requests of 32 tokens in and 16 out arrive at
random at half the rate that the engine can serve with 8 adapters, and each picks one of the adapters alike. The host
tier holds 16 adapters, so with 64 most requests read from disk. A peer's median grew 158-fold on its own hardware where
adapters outnumbered its slots; here it may grow by the time that a load takes.
"""

import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig

from benchmarks.adapter_traffic import draw, parser, report, write_adapters
from benchmarks.gpu_check import VOCABULARY_SIZE, Figure, prompt, save_model
from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
from serve_apps.engine.engine import Engine

ROOM, NUM_IN, NUM_OUT, RANK = 8, 32, 16, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Latency:
    """Times to first token, in seconds, and the share of requests whose adapter was not on the device."""

    first_token_s: list[float]
    miss_rate: float

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.first_token_s)


def build(folder: Path, num_adapters: int) -> tuple[Path, list[AdapterRef], int]:
    """Write model and adapters; return them with an adapter's bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    save_model(config, folder / "base", dtype=torch.float32)
    refs = write_adapters(folder / "adapters", config, num_adapters, ranks=(RANK,), modules=MODULES)
    engine = Engine(EngineConfig(str(folder / "base")))
    engine.load(refs[0])
    return folder / "base", refs, int(str(engine.stats()["adapter_bytes"]))


def request(number: int, ref: AdapterRef) -> Request:
    """Return one request; no two prompts are alike."""
    return Request(f"r{number}", prompt(NUM_IN, number), SamplingParams(max_tokens=NUM_OUT, ignore_eos=True), ref)


def seconds_per_request(engine: Engine, refs: list[AdapterRef], count: int) -> float:
    """Return the time that one request takes when all are there at once and all adapters are resident."""
    for number in range(count):
        engine.add(request(-1 - number, refs[number % ROOM]))
    start = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    return (time.perf_counter() - start) / count


def measure(engine: Engine, refs: list[AdapterRef], *, gap_s: float, count: int) -> Latency:
    """Let `count` requests arrive `gap_s` apart on average and take their times to first token."""
    chooser = random.Random(0)
    arrivals: list[float] = []
    for _ in range(count):
        arrivals.append((arrivals[-1] if arrivals else 0.0) + chooser.expovariate(1 / gap_s))
    asked = draw("uniform", len(refs), count, seed=5)
    loads = int(str(engine.stats()["adapter_loads"]))
    first: dict[str, float] = {}
    num_added = 0
    start = time.perf_counter()
    while num_added < count or engine.has_unfinished:
        now = time.perf_counter() - start
        while num_added < count and arrivals[num_added] <= now:
            engine.add(request(num_added, refs[asked[num_added]]))
            num_added += 1
        if not engine.has_unfinished:
            time.sleep(max(0.0, arrivals[num_added] - now))
            continue
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            if output.new_token_ids and output.request_id not in first:
                first[output.request_id] = time.perf_counter() - start - arrivals[int(output.request_id[1:])]
    return Latency(list(first.values()), (int(str(engine.stats()["adapter_loads"])) - loads) / count)


def load_seconds(engine: Engine, refs: list[AdapterRef]) -> float:
    """Return the median time from disk (page cache) to device of an adapter alone."""
    times = []
    for ref in refs:
        engine.unload(ref.digest)
        start = time.perf_counter()
        engine.load(ref)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    """Run the three sizes; return the exit status."""
    options = parser((__doc__ or "").splitlines()[0]).parse_args(arguments)
    count = 60 if options.quick else 300
    sizes = (8, 16, 64)
    transformers.utils.logging.set_verbosity_error()
    print(f"{', '.join(map(str, sizes))} adapters over room for {ROOM}, uniform popularity, half the engine's capacity")
    with tempfile.TemporaryDirectory() as name:
        base, refs, adapter_bytes = build(Path(name), max(sizes))
        engine = Engine(
            EngineConfig(
                str(base),
                max_num_seqs=ROOM,
                max_model_len=NUM_IN + NUM_OUT,
                adapter_cache_bytes=ROOM * adapter_bytes,
                adapter_host_bytes=2 * ROOM * adapter_bytes,
                enable_prefix_cache=False,
            )
        )
        seconds_per_request(engine, refs, 2 * ROOM)
        gap_s = 2 * seconds_per_request(engine, refs, 4 * ROOM)
        load_s = load_seconds(engine, refs[:16])
        found = {size: measure(engine, refs[:size], gap_s=gap_s, count=count) for size in sizes}
    return report(figures(found, gap_s=gap_s, load_s=load_s, adapter_bytes=adapter_bytes), options, law="uniform")


def figures(found: dict[int, Latency], *, gap_s: float, load_s: float, adapter_bytes: int) -> list[Figure]:
    """Return the table: what grows must stay within a few loads, and everybody is served."""
    table = [
        Figure("an adapter's bytes", adapter_bytes, "bytes"),
        Figure("mean gap between arrivals", 1e3 * gap_s, "ms"),
        Figure("an adapter from disk to device, alone", 1e3 * load_s, "ms"),
    ]
    base = found[min(found)]
    for size, latency in found.items():
        table += [
            Figure(f"{size} adapters: missing on the device", latency.miss_rate, "of requests"),
            Figure(f"{size} adapters: median time to first token", 1e3 * latency.median, "ms"),
            Figure(f"{size} adapters: worst time to first token", 1e3 * max(latency.first_token_s), "ms"),
            Figure(f"{size} / 8 adapters, median", latency.median / base.median, "ratio"),
        ]
    worst = found[max(found)]
    # While it is read, steps go on and share the cores, so a load takes longer than alone.
    growth = (worst.median - base.median) / load_s
    table.append(Figure("64 adapters: growth of the median in loads", growth, "loads alone", 4.0, is_ceiling=True))
    table.append(
        Figure("64 adapters: worst / median", max(worst.first_token_s) / worst.median, "ratio", 20.0, is_ceiling=True)
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
