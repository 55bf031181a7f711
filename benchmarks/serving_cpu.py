"""The engine on the CPU against transformers, PEFT's mixed batch and the machine's own limits, in one run.

    python -m benchmarks.serving_cpu [--quick] [--check] [--out FILE] [--model NAME] [--dtype NAME] [--threads N]

32 greedy requests of 64 tokens in and 64 out. Compared: our engine with no adapter, with one adapter for all requests
(rank 16) and with 32 distinct adapters (ranks 8, 16, 24, 32 in turn; all seven linears; adapters in fp32);
transformers' `generate` with no adapter; PEFT's `generate(adapter_names=...)` with the same 32 adapter files, ours
once more right after it. Variants and the machine's limits take turns, each figure is the median of its turns. The
floor is the time that the run's FLOPs take at the rate of the faster large product (torch's or ours), or its bytes at
the rate of a copy, whichever is longer, base and adapters added.
--quick takes 3 turns instead of 5, PEFT 1 instead of 3. Peers are the ones in this environment.
The last line is one JSON object; --check exits 1 when a figure is under its floor.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import peft
import torch
import transformers

from benchmarks.serving_peers import Load, generate_s, load_base, load_peft, save_adapter, save_base
from kernels.linear_cpu import linear, pack
from kernels.native import Native
from serve_apps.engine.architecture import LINEAR_MODULES, ModelSpec
from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
from serve_apps.engine.engine import Engine

MODELS, DTYPES = ("smollm2", "random60m"), ("float32", "bfloat16")
RANKS, SHARED_RANK = (8, 16, 24, 32), 16
MIN_OVER_TRANSFORMERS = {"float32": 1.1, "bfloat16": 1.3}
MIN_DISTINCT, MIN_SHARED, MIN_OVER_PEFT, MIN_OF_FLOOR = 0.65, 0.90, 5.0, 0.70


@dataclass(frozen=True)
class Figure:
    """One measured value and the least it should be (None: shown, not judged)."""

    name: str
    value: float
    unit: str
    floor: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether the figure keeps its bound."""
        return self.floor is None or self.value >= self.floor


@dataclass(frozen=True)
class Rates:
    """What this machine does at best, measured in this run: FLOP/s of large products by dtype, bytes/s of a copy."""

    flops: dict[str, float]
    copy: float


def elapsed_s(work: Callable[[], object], times: int = 1) -> float:
    """Return the seconds that one call takes, on the average over some."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def limits(dtype: str, native: Native | None, *, size: int) -> tuple[dict[str, Callable[[], float]], float, float]:
    """Return what times the machine's own limits, the FLOPs of each product and the bytes of the copy.

    A square product by torch and by our packed kernel in the dtype and in fp32, and a copy of 128 size^2 bytes.
    """
    source = torch.ones(16 * size * size)
    target = torch.empty_like(source)
    variants: dict[str, Callable[[], float]] = {"copy": lambda: elapsed_s(lambda: target.copy_(source), 3)}
    for name in {dtype, "float32"}:
        x = torch.randn(size, size).to(getattr(torch, name))
        variants[f"torch product {name}"] = partial(elapsed_s, partial(torch.mm, x, x), 2)
        if native is not None:
            variants[f"our product {name}"] = partial(elapsed_s, partial(linear, x, pack(x, native)), 2)
    return variants, 2.0 * size**3, 2.0 * source.nbytes


def floor_s(spec: ModelSpec, load: Load, rates: Rates, *, dtype: str, ranks: Sequence[int]) -> float:
    """Return the least time of a run: one prefill pass and a decode pass per further token.

    ranks: those of the distinct adapters in the batch; every row's adapter is one of them, in turn.
    """
    itemsize = getattr(torch, dtype).itemsize
    shapes = [spec.linear_shape(module) for module in LINEAR_MODULES]
    per_layer = sum(out_size * in_size for out_size, in_size in shapes)
    head = spec.vocab_size * spec.hidden_size
    rank_row = spec.num_layers * sum(out_size + in_size for out_size, in_size in shapes)
    total = 0.0
    for step in range(load.num_out):
        tokens = load.batch * (load.num_in if step == 0 else 1)
        weights = spec.num_layers * per_layer
        base_flops = 2 * (tokens * weights + load.batch * head)
        total += max(base_flops / rates.flops[dtype], (weights + head) * itemsize / rates.copy)
        keys = load.batch * (load.num_in + step) * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
        total += keys * itemsize / rates.copy if step else 0.0
        if ranks:
            lora_flops = 2 * tokens * rank_row * statistics.mean(ranks)
            total += max(lora_flops / rates.flops["float32"], 4 * rank_row * sum(ranks) / rates.copy)
    return total


def serve_s(engine: Engine, load: Load, adapters: Sequence[AdapterRef]) -> float:
    """Return the seconds that our engine takes for the batch; row i uses adapter i modulo their number."""
    sampling = SamplingParams(max_tokens=load.num_out, ignore_eos=True)
    prompts = load.prompts(engine.spec.vocab_size).tolist()
    for adapter in adapters:
        engine.load(adapter)
    began = time.perf_counter()
    for row, prompt in enumerate(prompts):
        adapter = adapters[row % len(adapters)] if adapters else None
        engine.add(Request(f"r{row}", tuple(prompt), sampling, adapter))
    num_tokens = 0
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None, output.error
            num_tokens += len(output.new_token_ids)
    seconds = time.perf_counter() - began
    assert num_tokens == load.tokens
    return seconds


def medians(variants: dict[str, Callable[[], float]], num_turns: int) -> dict[str, float]:
    """Run the variants in turns after one warm-up each; return each one's median seconds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(num_turns + 1):
        for name, run in variants.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    name: str, dtype: str, folder: Path, *, load: Load, num_turns: int, peft_turns: int, size: int
) -> Iterator[Figure]:
    """Yield the figures of one model in one dtype."""
    base_path = folder / name
    if not base_path.exists():
        save_base(name, base_path)
    base = load_base(base_path, getattr(torch, dtype))
    ranks = [RANKS[index % len(RANKS)] for index in range(load.batch)]
    adapters = [_adapter(base, folder / f"{name}-a{index}", rank, index) for index, rank in enumerate(ranks)]
    shared = _adapter(base, folder / f"{name}-shared", SHARED_RANK, 999)
    engine = _engine(base_path, dtype, load)
    timed_limits, product_flops, copy_bytes = limits(dtype, engine.pool.lora.native, size=size)
    seconds = medians(
        {
            "base": lambda: serve_s(engine, load, []),
            "transformers": lambda: generate_s(base, load),
            "one adapter": lambda: serve_s(engine, load, [shared]),
            "distinct": lambda: serve_s(engine, load, adapters),
            **timed_limits,
        },
        num_turns,
    )
    label = f"{name} {dtype}"
    rate = {variant: load.tokens / seconds[variant] for variant in ("base", "transformers", "one adapter", "distinct")}
    for variant, value in rate.items():
        yield Figure(f"{label}: {variant}", value, "tok/s")
    yield Figure(
        f"{label}: base / transformers", rate["base"] / rate["transformers"], "x", MIN_OVER_TRANSFORMERS[dtype]
    )
    yield Figure(f"{label}: one shared adapter / base", rate["one adapter"] / rate["base"], "x", MIN_SHARED)
    yield Figure(f"{label}: {load.batch} distinct / base", rate["distinct"] / rate["base"], "x", MIN_DISTINCT)
    products = {kind: [value for key, value in seconds.items() if f"product {kind}" in key] for kind in DTYPES}
    flops = {kind: product_flops / min(values) for kind, values in products.items() if values}
    rates = Rates(flops, copy_bytes / seconds["copy"])
    yield Figure(f"{label}: large product", rates.flops[dtype] / 1e9, "GFLOP/s")
    yield Figure(f"{label}: copy", rates.copy / 1e9, "GB/s")
    for variant, used in (("base", []), ("one adapter", [SHARED_RANK]), ("distinct", ranks)):
        least = floor_s(engine.spec, load, rates, dtype=dtype, ranks=used)
        yield Figure(f"{label}: {variant}, of its floor", least / seconds[variant], "x", MIN_OF_FLOOR)
    mixed = load_peft(base_path, adapters, getattr(torch, dtype))
    names = [Path(adapter.path).name for adapter in adapters]
    generate_s(mixed, replace(load, num_out=2), names)
    peft_s = statistics.median(generate_s(mixed, load, names) for _ in range(peft_turns))
    ours_s = statistics.median(serve_s(engine, load, adapters) for _ in range(peft_turns))
    yield Figure(f"{label}: PEFT mixed batch", load.tokens / peft_s, "tok/s")
    yield Figure(f"{label}: distinct / PEFT mixed batch", peft_s / ours_s, "x", MIN_OVER_PEFT)


def _adapter(base: torch.nn.Module, folder: Path, rank: int, seed: int) -> AdapterRef:
    if folder.exists():
        return AdapterRef(f"sha256:{folder.name}", str(folder))
    return save_adapter(base, folder, rank=rank, seed=seed)


def _engine(base_path: Path, dtype: str, load: Load) -> Engine:
    return Engine(
        EngineConfig(
            str(base_path),
            dtype=dtype,
            max_num_seqs=load.batch,
            max_model_len=load.num_in + load.num_out + 1,
            adapter_cache_bytes=2 << 30,
            adapter_host_bytes=2 << 30,
            num_threads=torch.get_num_threads(),
            # Every turn serves the same prompts; the peers compute them each time, and so must we.
            enable_prefix_cache=False,
        )
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 5, PEFT 1 instead of 3")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is under its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--model", action="append", choices=(*MODELS, "toy"), help="only this model (repeatable)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype (repeatable)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both sides")
    parser.add_argument("--work", type=Path, help="folder for models and adapters, kept; a temporary one by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    peers = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    hardware = f"{_processor()}, {options.threads} threads, load average {os.getloadavg()[0]:.1f} at the start"
    print(f"our engine against {peers}\non {hardware}; medians of turns")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.model or MODELS:
            sizes = {"load": Load(), "size": 2048}
            if name == "toy":
                sizes = {"load": Load(batch=4, num_in=8, num_out=6), "size": 64}
            turns = {"num_turns": 3 if options.quick else 5, "peft_turns": 1 if options.quick else 3}
            for dtype in options.dtype or DTYPES:
                for figure in measure(name, dtype, options.work or Path(scratch), **sizes, **turns):
                    figures.append(figure)
                    bound = "" if figure.floor is None else f"  (at least {figure.floor:g})"
                    missed = "" if figure.is_good else "  MISSED"
                    print(f"{figure.name:56} {figure.value:9.2f} {figure.unit}{bound}{missed}", flush=True)
    line = json.dumps({"hardware": hardware, "peers": peers, "figures": [asdict(figure) for figure in figures]})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = " ".join(line for line in lines if line.startswith("flags"))
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{names[0] if names else platform.machine()} ({', '.join(known)})"


if __name__ == "__main__":
    sys.exit(main())
