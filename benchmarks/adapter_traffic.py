"""What the programs on many adapters share: adapters by the thousand, who asks for which, and the report."""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.gpu_check import Figure
from serve_apps.engine.config import AdapterRef

LAWS = ("one", "uniform", "zipf", "distinct")
BLOCK_OF = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def smollm2_135m(*, vocab_size: int = 49152) -> LlamaConfig:
    """Return the shape of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def write_adapters(
    folder: Path, config: LlamaConfig, count: int, *, ranks: Sequence[int], modules: Sequence[str], scale: float = 0.02
) -> list[AdapterRef]:
    """Write `count` different PEFT adapters of random weights, adapter i of rank `ranks[i % len(ranks)]`."""
    generator = np.random.default_rng(0)
    refs: list[AdapterRef] = []
    for index in range(count):
        rank, path = ranks[index % len(ranks)], folder / f"adapter{index}"
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(config.num_hidden_layers):
            for module in modules:
                out_size, in_size = linear_shape(config, module)
                prefix = f"base_model.model.model.layers.{layer}.{BLOCK_OF.get(module, 'self_attn')}.{module}"
                a = generator.standard_normal((rank, in_size), dtype=np.float32) / in_size**0.5
                b = generator.standard_normal((out_size, rank), dtype=np.float32) * scale
                tensors[f"{prefix}.lora_A.weight"] = torch.from_numpy(a)
                tensors[f"{prefix}.lora_B.weight"] = torch.from_numpy(b)
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
        (path / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none", "task_type": "CAUSAL_LM"}))
        refs.append(AdapterRef(f"sha256:{path.name}", str(path)))
    return refs


def linear_shape(config: LlamaConfig, module: str) -> tuple[int, int]:
    """Return (output size, input size) of one of the seven linears."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"q_proj": (q_size, hidden), "k_proj": (kv_size, hidden), "v_proj": (kv_size, hidden)}
    shapes |= {"o_proj": (hidden, q_size), "down_proj": (hidden, inner)}
    return shapes.get(module, (inner, hidden))


def draw(law: str, num_adapters: int, count: int, *, seed: int) -> list[int]:
    """Return which adapter each of `count` requests asks for; "zipf" has exponent 1.0, its ranks shuffled."""
    generator = np.random.default_rng(seed)
    if law == "one":
        return [0] * count
    if law == "distinct":
        return [index % num_adapters for index in range(count)]
    weights = np.ones(num_adapters) if law == "uniform" else 1.0 / np.arange(1, num_adapters + 1)
    order = np.random.default_rng(1).permutation(num_adapters)
    return [int(order[index]) for index in generator.choice(num_adapters, size=count, p=weights / weights.sum())]


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that every benchmark takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="shorter, within 15 minutes on 2 cores")
    made.add_argument("--check", action="store_true", help="exit 1 when a figure misses its bound")
    made.add_argument("--out", type=Path, help="also write the JSON here")
    return made


def report(figures: Sequence[Figure], options: argparse.Namespace, **facts: Any) -> int:
    """Print the table and, as the last line, the JSON object; return the exit status."""
    for figure in figures:
        bound = "" if figure.floor is None else f"  ({'at most' if figure.is_ceiling else 'at least'} {figure.floor:g})"
        print(f"{figure.name:60} {figure.value:12.6g} {figure.unit}{bound}{'' if figure.is_good else '  MISSED'}")
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    line = json.dumps({"hardware": hardware, **facts, "figures": [asdict(figure) for figure in figures]})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0
