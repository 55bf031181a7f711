"""One checkpoint for any number of workers: whole adapter weights, both Adam moments and the step, with digests last.

DeepSpeed's own checkpoint holds one shard per rank and refuses another world size; an adapter is small enough to
gather. The data cursor is the step number, and learning rate and dropout are pure functions of it: no more is saved.
DeepSpeed is imported where an engine is given: who only reads or writes the files needs none.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.train.lora import ADAPTER_WEIGHTS_FILE, trainable

MANIFEST_FILE = "manifest.json"
EXP_AVG_FILE = "exp_avg.safetensors"
EXP_AVG_SQ_FILE = "exp_avg_sq.safetensors"

Tensors = dict[str, Tensor]


class CheckpointError(Exception):
    """A checkpoint is not whole."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` updates; every tensor whole, float32, by PEFT's saved name."""

    step: int
    weights: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors

    def files(self) -> dict[str, Tensors]:
        return {ADAPTER_WEIGHTS_FILE: self.weights, EXP_AVG_FILE: self.exp_avg, EXP_AVG_SQ_FILE: self.exp_avg_sq}


def gather(engine: Any, *, step: int) -> Checkpoint:
    """Collect the state from all ranks. Collective: every rank calls it and every rank gets all of it."""
    weights, exp_avg, exp_avg_sq = (_gather(engine, key) for key in (None, "exp_avg", "exp_avg_sq"))
    return Checkpoint(step, weights, exp_avg, exp_avg_sq)


def gather_weights(engine: Any) -> Tensors:
    """Collect the weights from all ranks, whole, float32. Collective."""
    return _gather(engine, None)


def save_weights(weights: Tensors, folder: Path) -> None:
    """Write weights alone, as `save` writes a whole state; it is not one to resume from."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / ADAPTER_WEIGHTS_FILE, {"format": "pt"})


def gather_flat(engine: Any, key: str | None, names: Sequence[str]) -> Tensor:
    """Return float32 [p] on the engine's device: weights (`key` None) or an Adam moment, in the order of `names`.

    Each rank lays the fragments that ZeRO gave it into zeros and one sum makes them whole: DeepSpeed's own getters sum
    every parameter alone, hundreds of messages for one adapter. Collective.
    """
    parameters = trainable(engine.module)
    flat = torch.zeros(sum(_numel(parameters[name]) for name in names), device=engine.device)
    start = 0
    for name in names:
        offset, fragment = _fragment(parameters[name], key)
        flat[start + offset : start + offset + fragment.numel()] = fragment
        start += _numel(parameters[name])
    torch.distributed.all_reduce(flat)
    return flat


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the files, then the manifest, under a temporary name, then rename: a folder that exists is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in checkpoint.files().items():
        save_file(tensors, partial / name, {"format": "pt"})
    digests = {name: _sha256(partial / name) for name in checkpoint.files()}
    manifest = {"v": 1, "step": checkpoint.step, "sha256": digests}
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError naming the file whose bytes are not those that were written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: {error}") from error
    for name, digest in manifest["sha256"].items():
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: its bytes do not match the manifest")
    return Checkpoint(
        step=manifest["step"],
        weights=load_file(folder / ADAPTER_WEIGHTS_FILE),
        exp_avg=load_file(folder / EXP_AVG_FILE),
        exp_avg_sq=load_file(folder / EXP_AVG_SQ_FILE),
    )


def restore(engine: Any, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into a fresh engine, at any world size. Collective.

    ZeRO makes Adam's state in its first step, so one step is taken with a zero gradient and a zero rate. Master copy
    and module copy are separate in ZeRO: setting only the master leaves the next forward on stale weights.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _materialise(engine)
    for name, parameter in trainable(engine.module).items():
        safe_set_full_fp32_param(parameter, checkpoint.weights[name].to(engine.device))
        safe_set_full_optimizer_state(parameter, checkpoint.exp_avg[name].to(engine.device), "exp_avg")
        safe_set_full_optimizer_state(parameter, checkpoint.exp_avg_sq[name].to(engine.device), "exp_avg_sq")
        _set_module_copy(parameter, checkpoint.weights[name])
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(checkpoint.step))


def _materialise(engine: Any) -> None:
    groups = engine.optimizer.optimizer.param_groups
    before = [(group["lr"], group["weight_decay"]) for group in groups]
    for group in groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    token = torch.zeros(1, 1, dtype=torch.long, device=engine.device)
    engine.backward(engine(input_ids=token, use_cache=False).logits.float().sum() * 0.0)
    engine.step()
    for group, (rate, decay) in zip(groups, before, strict=True):
        group["lr"], group["weight_decay"] = rate, decay


def _set_module_copy(parameter: torch.nn.Parameter, weight: Tensor) -> None:
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(weight)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(weight)


def _fragment(parameter: Any, key: str | None) -> tuple[int, Tensor]:
    """Return (offset in the flattened parameter, float32 values) of what this rank keeps of it."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    if hasattr(parameter, "ds_id"):
        rank, size = torch.distributed.get_rank(), parameter.ds_tensor.ds_numel
        local = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        # The last rank's part is padded to the length of the others'.
        return min(rank * size, parameter.ds_numel), local.flatten()[: max(0, parameter.ds_numel - rank * size)]
    if parameter._hp_mapping is None:  # another rank keeps all of it
        return 0, torch.zeros(0)
    return parameter._hp_mapping.lp_fragment_address.start, parameter._hp_mapping.get_hp_fragment(key)


def _numel(parameter: Any) -> int:
    """A parameter that ZeRO-3 has taken apart says it is empty."""
    return int(parameter.ds_numel if hasattr(parameter, "ds_id") else parameter.numel())


def _gather(engine: Any, key: str | None) -> Tensors:
    parameters = trainable(engine.module)
    flat = gather_flat(engine, key, list(parameters)).cpu()
    parts = flat.split([_numel(parameter) for parameter in parameters.values()])
    shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters.values())
    return {name: part.reshape(shape).clone() for name, part, shape in zip(parameters, parts, shapes, strict=True)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
