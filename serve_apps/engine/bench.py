"""One measurement of an engine in this process: so many sequences at once, adapters by a stated popularity law."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from serve_apps.engine.architecture import ModelSpec
from serve_apps.engine.config import AdapterRef, Request, SamplingParams
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import EngineError, InvalidRequest

Law = Literal["one", "uniform", "zipf", "distinct"]
LAWS: tuple[str, ...] = get_args(Law)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is asked of the engine: all sequences arrive at once. Lengths in tokens; no adapters: the base model."""

    num_sequences: int
    input_tokens: int
    output_tokens: int
    law: Law = "one"
    num_adapters: int = 0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise InvalidRequest(f"law={self.law!r} is none; use one of {', '.join(LAWS)}")
        if self.law == "distinct" and 0 < self.num_adapters < self.num_sequences:
            raise InvalidRequest(
                f"law='distinct' gives each of {self.num_sequences} sequences its own adapter, and there are "
                f"{self.num_adapters}; make as many, or use uniform"
            )


@dataclass(frozen=True)
class Measured:
    """What came of it. Times in seconds from the arrival of all; latencies in milliseconds by percentile."""

    num_output_tokens: int
    num_distinct_adapters: int
    wall_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    first_token_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    stats: dict[str, object] = field(default_factory=dict)


def choose_adapters(load: Load) -> list[int | None]:
    """Return, by sequence, the index of its adapter; None for the base model.

    one: all take the first; uniform: each takes any; zipf: index i with weight 1 / (i + 1) (exponent 1.0); distinct:
    each its own.
    """
    if not load.num_adapters:
        return [None] * load.num_sequences
    if load.law == "one":
        return [0] * load.num_sequences
    if load.law == "distinct":
        return list(range(load.num_sequences))
    weights = [1 / (index + 1) if load.law == "zipf" else 1.0 for index in range(load.num_adapters)]
    return list(random.Random(load.seed).choices(range(load.num_adapters), weights, k=load.num_sequences))


def requests_of(load: Load, adapters: Sequence[AdapterRef], *, vocab_size: int) -> list[Request]:
    """Return requests of random tokens that run to their last token."""
    generator = random.Random(load.seed)
    return [
        Request(
            request_id=f"bench-{index}",
            prompt_token_ids=tuple(generator.randrange(vocab_size) for _ in range(load.input_tokens)),
            sampling=SamplingParams(
                max_tokens=load.output_tokens, temperature=load.temperature, seed=index, ignore_eos=True
            ),
            adapter=None if choice is None else adapters[choice],
        )
        for index, choice in enumerate(choose_adapters(load))
    ]


def measure(engine: Engine, requests: Sequence[Request]) -> Measured:
    """Run the requests to their end and time every token. EngineError when one fails."""
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    times: dict[str, list[float]] = {request.request_id: [] for request in requests}
    num_output = 0
    while engine.has_unfinished:
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            if output.error:
                raise EngineError(f"{output.request_id} failed: {output.error}")
            times[output.request_id] += [now] * len(output.new_token_ids)
            num_output += len(output.new_token_ids)
    wall_s = time.perf_counter() - started
    first_s = [each[0] for each in times.values()]
    gaps_s = [later - earlier for each in times.values() for earlier, later in pairwise(each)]
    return Measured(
        num_output_tokens=num_output,
        num_distinct_adapters=len({request.adapter.digest for request in requests if request.adapter}),
        wall_s=wall_s,
        tokens_per_s=num_output / wall_s,
        prompt_tokens_per_s=sum(len(request.prompt_token_ids) for request in requests) / max(first_s),
        first_token_ms=percentiles_ms(first_s),
        inter_token_ms=percentiles_ms(gaps_s),
        stats=engine.stats(),
    )


def percentiles_ms(times_s: Sequence[float]) -> dict[str, float]:
    """Return {"p50", "p90", "p99", "max"} in milliseconds: the smallest time that so many per cent do not exceed."""
    ordered = sorted(times_s)
    if not ordered:
        return {}
    found = {f"p{each}": ordered[max(0, -(-each * len(ordered) // 100) - 1)] * 1e3 for each in PERCENTILES}
    return {**found, "max": ordered[-1] * 1e3}


def warm_up(engine: Engine, requests: Sequence[Request]) -> None:
    """Run every prompt for two tokens, so that adapters are loaded and lazily built things stand."""
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    for request in requests:
        prompt = request.prompt_token_ids
        engine.add(Request(f"warm-{request.request_id}", prompt, short, request.adapter))
    while engine.has_unfinished:
        engine.step()


def write_random_adapter(folder: Path, spec: ModelSpec, *, rank: int, modules: Sequence[str], seed: int) -> AdapterRef:
    """Save a PEFT adapter of random fp32 weights for a base of `spec`."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for module in modules:
            out_size, in_size = spec.linear_shape(module)
            block = "self_attn" if module in ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            # Scales that keep B A x small beside W x, so that text does not run into infinities.
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, in_size, generator=generator) / in_size**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out_size, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return AdapterRef(f"bench:rank-{rank}-seed-{seed}", str(folder))
