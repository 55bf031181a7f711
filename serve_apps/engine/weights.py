"""Loads a Hugging Face folder's safetensors into packed weights, tensor by tensor: never two copies of the model."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.large_pages import LargePages
from kernels.linear_cpu import PackedWeight, pack
from kernels.native import Native
from serve_apps.engine.architecture import GROUPS, ModelSpec
from serve_apps.engine.errors import CorruptModel
from serve_apps.engine.model import Layer, Linear, Weights

Packer = Callable[[Tensor], PackedWeight]
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint:
    """The tensors of a model folder by name, whether in one file or in shards."""

    def __init__(self, base_path: Path, stack: ExitStack) -> None:
        """Open every shard; files stay open until `stack` closes. Raises CorruptModel naming the file."""
        self._base_path = base_path
        self._files: dict[str, Any] = {}
        for shard in _shards(base_path):
            try:
                handle = stack.enter_context(safe_open(str(base_path / shard), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CorruptModel(f"{base_path / shard} is not a readable safetensors file: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))
        self._unread = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read_into(self, target: Tensor, name: str) -> None:
        """Copy tensor `name` into `target`, which fixes shape, dtype and device. Raises CorruptModel naming it."""
        if name not in self._files:
            raise CorruptModel(f"{self._base_path} lacks the tensor {name}")
        found = self._files[name].get_tensor(name)
        if not found.is_floating_point():
            raise CorruptModel(f"tensor {name} in {self._base_path} is {found.dtype}; dequantise it first")
        if found.shape != target.shape:
            raise CorruptModel(
                f"tensor {name} in {self._base_path} is {list(found.shape)}; its config says {list(target.shape)}"
            )
        target.copy_(found)
        self._unread.discard(name)

    def are_one(self, name: str, other: str) -> bool:
        """Whether two names that the config ties stand for one tensor; then reading either will do.

        As in transformers 5: one of them may be missing, and two tensors that differ are not tied whatever the config
        says.
        """
        files, names = self._files, (name, other)
        if files.keys() >= set(names) and not torch.equal(*(files[each].get_tensor(each) for each in names)):
            return False
        self._unread -= {name, other}
        return True

    def check_all_read(self, *, ignore: tuple[str, ...]) -> None:
        """Raise CorruptModel when a tensor has no place in the forward: leaving it out would be silently wrong."""
        left = sorted(name for name in self._unread if not name.endswith(ignore))
        if left:
            raise CorruptModel(
                f"{self._base_path} holds tensors that the architecture does not use: {', '.join(left[:5])}"
            )


def load_weights(
    base_path: Path, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, native: Native | None = None
) -> Weights:
    """Read all weights in `dtype` on `device`; with `native` in the packed form that its kernels multiply by."""

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    packer = None if native is None else partial(pack, native=native, pages=LargePages(native))
    with ExitStack() as stack:
        checkpoint = Checkpoint(base_path, stack)
        embedding = new(spec.vocab_size, spec.hidden_size)
        tied = spec.tied and checkpoint.are_one(EMBEDDING, LM_HEAD)
        is_headed = tied and EMBEDDING not in checkpoint and LM_HEAD in checkpoint
        checkpoint.read_into(embedding, LM_HEAD if is_headed else EMBEDDING)
        if packer is not None and tied:
            embedding = packer(embedding)
        layers = tuple(_read_layer(checkpoint, spec, index, new, packer) for index in range(spec.num_layers))
        norm = new(spec.hidden_size)
        checkpoint.read_into(norm, "model.norm.weight")
        lm_head = embedding
        if not tied:
            lm_head = new(spec.vocab_size, spec.hidden_size)
            checkpoint.read_into(lm_head, LM_HEAD)
            lm_head = lm_head if packer is None else packer(lm_head)
        checkpoint.check_all_read(ignore=("rotary_emb.inv_freq",))
    return Weights(embedding, layers, norm, lm_head)


def _shards(base_path: Path) -> list[str]:
    if (base_path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if (base_path / INDEX_FILE).is_file():
        try:
            return sorted(set(json.loads((base_path / INDEX_FILE).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptModel(f"{base_path / INDEX_FILE} is not an index of shards: {error!r}") from error
    raise CorruptModel(f"{base_path} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as safetensors")


def _read_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int, new: Any, packer: Packer | None) -> Layer:
    prefix = f"model.layers.{index}."

    def vector(name: str, size: int) -> Tensor:
        target = new(size)
        checkpoint.read_into(target, prefix + name)
        return target

    def packed(group: str, block: str) -> Linear:
        is_biased = group in spec.biased
        where = f"{prefix}{block}."
        return _read_packed(checkpoint, spec, where, modules=GROUPS[group], is_biased=is_biased, new=new, packer=packer)

    return Layer(
        input_norm=vector("input_layernorm.weight", spec.hidden_size),
        qkv=packed("qkv", "self_attn"),
        q_norm=vector("self_attn.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
        k_norm=vector("self_attn.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        o=packed("o", "self_attn"),
        post_norm=vector("post_attention_layernorm.weight", spec.hidden_size),
        gate_up=packed("gate_up", "mlp"),
        down=packed("down", "mlp"),
    )


def _read_packed(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    prefix: str,
    *,
    modules: tuple[str, ...],
    is_biased: bool,
    new: Any,
    packer: Packer | None,
) -> Linear:
    """Read linears that share their input into one weight, rows of the first above rows of the next."""
    sizes = [spec.linear_shape(module)[0] for module in modules]
    in_size = spec.linear_shape(modules[0])[1]
    weight_OI = _new_weight(sum(sizes), in_size, new) if packer is None else new(sum(sizes), in_size)
    has_bias = is_biased and f"{prefix}{modules[0]}.bias" in checkpoint
    bias = new(sum(sizes)) if has_bias else None
    start = 0
    for module, size in zip(modules, sizes, strict=True):
        checkpoint.read_into(weight_OI[start : start + size], f"{prefix}{module}.weight")
        if bias is not None:
            checkpoint.read_into(bias[start : start + size], f"{prefix}{module}.bias")
        start += size
    return Linear(weight_OI.t() if packer is None else packer(weight_OI), bias)


def _new_weight(out_size: int, in_size: int, new: Any) -> Tensor:
    """Return an empty [O, I] weight in the memory order that multiplies fastest.

    MKL on this project's CPUs, fp32, 1 to 4 rows: a weight wider than its input takes 0.5 to 0.8 of the time when the
    output lies contiguous, a narrower one up to 1.2 (3072x576 and 576x1536, one thread).
    """
    transposed: Tensor = new(in_size, out_size).t()
    if transposed.device.type == "cpu" and out_size > in_size:
        return transposed
    weight: Tensor = new(out_size, in_size)
    return weight
