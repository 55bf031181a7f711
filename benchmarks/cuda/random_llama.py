"""Llamas of random weights: in memory for the forward alone, as a folder for the engine; and adapters for them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kernels.lora import MODULES, LoraPool
from serve_apps.engine.architecture import ModelSpec, read_spec
from serve_apps.engine.bench import write_random_adapter
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.model import Layer, Linear, Model, Weights

NUM_WORDS = 256


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128_256)
TOY = Shape(64, 96, 2, 4, 2, 16, NUM_WORDS)


def write_config(folder: Path, shape: Shape) -> ModelSpec:
    """Write config and tokenizer; return what the engine reads from them."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    words = {f"w{index}": index for index in range(NUM_WORDS)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    return read_spec(folder)


def write_checkpoint(folder: Path, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> ModelSpec:
    """Write a whole model, one shard per layer, each made on `device`: 8B is 16 GB and never twice in memory."""
    spec = write_config(folder, shape)
    index: dict[str, str] = {}

    def save(name: str, sizes: dict[str, tuple[int, ...]]) -> None:
        tensors = {key: random_weight(size, dtype=dtype, device=device).cpu() for key, size in sizes.items()}
        save_file(tensors, folder / name)
        index.update(dict.fromkeys(tensors, name))

    table = (shape.vocabulary, shape.hidden)
    save(
        "ends.safetensors",
        {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[1:]},
    )
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        sizes: dict[str, tuple[int, ...]] = {
            f"{prefix}.{'self_attn' if module in MODULES[:4] else 'mlp'}.{module}.weight": spec.linear_shape(module)
            for module in MODULES
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        save(f"layer-{layer}.safetensors", {**sizes, **{f"{prefix}.{norm}.weight": table[1:] for norm in norms}})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return spec


def random_weight(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ones for a norm, else numbers that keep the size of what they multiply."""
    if len(size) == 1:
        return torch.ones(size, dtype=dtype, device=device)
    return torch.randn(size, dtype=dtype, device=device) / size[-1] ** 0.5


def random_model(spec: ModelSpec, *, max_positions: int, dtype: torch.dtype, device: torch.device) -> Model:
    """Return a model whose weights were never on disk; it runs over the Triton kernels on any device."""

    def linear(*linears: str) -> Linear:
        rows = sum(spec.linear_shape(name)[0] for name in linears)
        return Linear(random_weight((rows, spec.linear_shape(linears[0])[1]), dtype=dtype, device=device).t())

    norm = torch.ones(spec.hidden_size, dtype=dtype, device=device)
    table = (spec.vocab_size, spec.hidden_size)
    layers = tuple(
        Layer(
            input_norm=norm,
            qkv=linear("q_proj", "k_proj", "v_proj"),
            q_norm=None,
            k_norm=None,
            o=linear("o_proj"),
            post_norm=norm,
            gate_up=linear("gate_proj", "up_proj"),
            down=linear("down_proj"),
        )
        for _ in range(spec.num_layers)
    )
    ends = [random_weight(table, dtype=dtype, device=device) for _ in range(2)]
    model = Model(spec, Weights(ends[0], layers, norm, ends[1]), max_positions=max_positions)
    model.cuda_forward = model.build_cuda_forward()
    return model


def weight_bytes(model: Model) -> int:
    """Return the bytes of weights that every step reads: all but the embedding, of which it reads a row per token."""
    weights = model.weights
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return sum(tensor.nbytes for tensor in (weights.lm_head, *(linear.weight_IO for linear in linears)))


def random_pool(
    spec: ModelSpec, ranks: Sequence[int], *, dtype: torch.dtype, device: torch.device, modules: Sequence[str] = MODULES
) -> LoraPool:
    """Return one adapter per rank, one after the other, on the linears named in every layer."""
    table = torch.zeros(len(ranks), spec.num_layers, len(MODULES), 3, dtype=torch.int64)
    end = 0
    for row, rank in enumerate(ranks):
        for layer in range(spec.num_layers):
            for name in modules:
                out_size, in_size = spec.linear_shape(name)
                entry = (end, end + rank * in_size, rank)
                table[row, layer, MODULES.index(name)] = torch.tensor(entry)
                end += rank * (in_size + out_size)
    data = torch.randn(end, dtype=dtype, device=device).mul_(0.02)
    return LoraPool(data, table.to(device), table, alignment=8)


def write_adapters(
    folder: Path, spec: ModelSpec, count: int, *, rank: int, modules: Sequence[str], num_files: int = 8
) -> list[AdapterRef]:
    """Write `count` adapters, `num_files` of them with weights of their own and the others linked to those files."""
    first = [
        write_random_adapter(folder / f"a{index}", spec, rank=rank, modules=modules, seed=index)
        for index in range(min(count, num_files))
    ]
    for index in range(num_files, count):
        source, target = Path(first[index % num_files].path), folder / f"a{index}"
        target.mkdir()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.link(source / name, target / name)
    return [AdapterRef(f"bench:{index}", str(folder / f"a{index}")) for index in range(count)]
