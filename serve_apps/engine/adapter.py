"""Reads one PEFT LoRA folder into rank rows, and refuses what would be computed wrongly.

Honoured: r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, target_modules (list, regex or "all-linear"),
exclude_modules, layers_to_transform, layers_pattern; any subset of the seven linears. Source of the rules: peft 0.21.2,
functions `check_target_module_exists` (tuners/tuners_utils.py), `update_layer` (tuners/lora/layer.py),
`get_pattern_key`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor

from kernels.lora import MAX_RANK
from serve_apps.engine.adapter_fields import check_fields
from serve_apps.engine.architecture import LINEAR_MODULES, ModelSpec
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import CorruptAdapter, UnknownAdapter, UnsupportedAdapter
from serve_apps.engine.packed_adapter import LoraWeights, PackedAdapter, pack

CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
WHAT_WORKS = (
    f"what works: LoRA A and B on any of {', '.join(LINEAR_MODULES)}, with rank_pattern, alpha_pattern and rsLoRA"
)
# How training starts or is regularised, and bookkeeping: no effect on the forward pass of saved weights.
HARMLESS_FIELDS = frozenset(
    {
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)
HONOURED_FIELDS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
FEATURE_NAMES = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (whole layers beside LoRA)",
    "lora_bias": "a bias on LoRA B",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
}
# Initialisations that leave the base model as it is; the others (PiSSA, OLoRA, LoftQ, ...) change its weights.
BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
ALL_LINEAR = "all-linear"
FLOATING_DTYPES = ("F64", "F32", "F16", "BF16")
TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<linear>\w+))\.lora_(?P<side>[AB])\.weight"
)


def inspect_adapter(ref: AdapterRef, spec: ModelSpec) -> int:
    """Check all that the config and the head of the weights tell, in a millisecond or so; return the number of weights.

    Raises as `read_adapter`, which alone sees values that are not finite and files that differ from their manifest.
    """
    folder = _folder(ref)
    config = _config(_read_file(folder / CONFIG_FILE), folder)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
                part = handle.get_slice(name)
                dtype = torch.float32 if part.get_dtype() in FLOATING_DTYPES else torch.int8
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise _not_whole(folder / WEIGHTS_FILE, error) from error
    modules = _modules(config, tensors, spec, folder)
    return sum(module.a.numel() + module.b.numel() for module in modules.values())


def read_adapter(ref: AdapterRef, spec: ModelSpec, *, dtype: torch.dtype, pin: bool = False) -> PackedAdapter:
    """Read, check and pack the adapter at `ref.path`. Raises UnknownAdapter, CorruptAdapter or UnsupportedAdapter."""
    folder = _folder(ref)
    contents = {name: _read_file(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    digest, content_digest = _digests(folder, ref.digest, contents)
    config = _config(contents[CONFIG_FILE], folder)
    try:
        tensors = load_safetensors(contents[WEIGHTS_FILE])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _not_whole(folder / WEIGHTS_FILE, error) from error
    modules = _modules(config, tensors, spec, folder)
    packed = pack(digest, modules, content_digest=content_digest, num_layers=spec.num_layers, dtype=dtype, pin=pin)
    if not bool(torch.isfinite(packed.data).all()):
        _refuse_not_finite(tensors, folder, dtype)
    return packed


def _not_whole(path: Path, error: Exception) -> CorruptAdapter:
    """Say what is wrong with a file that safetensors refuses, naming the first tensor that lies beyond its end."""
    try:
        with path.open("rb") as file:
            head_size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(head_size, path.stat().st_size)))
        size = path.stat().st_size - 8 - head_size
        ends = {name: entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"}
        beyond = [name for name in sorted(ends, key=lambda name: ends[name]) if ends[name] > size]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        beyond = []
    where = f"; it ends inside tensor {beyond[0]}" if beyond else ""
    return CorruptAdapter(f"{path} is not a whole safetensors file: {error}{where}")


def _folder(ref: AdapterRef) -> Path:
    folder = Path(ref.path)
    if not (folder / CONFIG_FILE).is_file():
        raise UnknownAdapter(
            f"adapter {ref.digest} has no {CONFIG_FILE} at {folder}; give the folder of a PEFT LoRA adapter"
        )
    return folder


def _config(content: bytes, folder: Path) -> dict[str, Any]:
    """Parse adapter_config.json and refuse what is not computed."""
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CorruptAdapter(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptAdapter(f"{folder / CONFIG_FILE} is not a JSON object")
    _refuse_unsupported(config, folder)
    check_fields(config, folder / CONFIG_FILE)
    return config


def _refuse_not_finite(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Raise CorruptAdapter naming the tensor that made a packed adapter infinite or NaN."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptAdapter(f"tensor {name} in {folder} holds values that are not finite numbers")
    raise CorruptAdapter(f"the weights in {folder} overflow {dtype} once scaled; use a wider adapter_dtype")


def _read_file(path: Path) -> bytes:
    """Read once: what is hashed is what is parsed, so a file swapped in between cannot slip through."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptAdapter(f"{path} cannot be read: {error.strerror}") from error


def _digests(folder: Path, digest: str, contents: dict[str, bytes]) -> tuple[str, str]:
    """Return the digest of what was read, and one that differs whenever the content does.

    A folder of the content-addressed store is held against its manifest, whose digest is both. One without a manifest
    keeps `digest`, which says nothing about its content.
    """
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return digest, f"files {json.dumps(hashes, sort_keys=True)}"
    manifest_bytes = _read_file(path)
    manifest_digest = f"sha256:{hashlib.sha256(manifest_bytes).hexdigest()}"
    if manifest_digest != digest:
        raise CorruptAdapter(f"{path} does not hash to the adapter's digest {digest}; fetch the adapter again")
    recorded = {entry["path"]: entry["sha256"] for entry in json.loads(manifest_bytes)["files"]}
    for name, found in hashes.items():
        if str(recorded.get(name, "")).removeprefix("sha256:") != found:
            raise CorruptAdapter(
                f"{folder / name} has changed since it was stored: sha256 {found} is not in its manifest"
            )
    return manifest_digest, manifest_digest


def _refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    """Raise UnsupportedAdapter for the first field that changes the result in a way not computed here."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"peft_type={config.get('peft_type')!r} in {folder} is not served; {WHAT_WORKS}")
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(
            f"bias={config['bias']!r} in {folder} (trained base biases) is not served; use bias='none'; {WHAT_WORKS}"
        )
    init = config.get("init_lora_weights", True)
    if init not in BASE_KEEPING_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights={init!r} in {folder} changes the base model's weights; convert it to plain LoRA with "
            f"save_pretrained(path_initial_model_for_weight_conversion=...); {WHAT_WORKS}"
        )
    for name, value in config.items():
        if value and name not in HARMLESS_FIELDS and name not in HONOURED_FIELDS:
            feature = FEATURE_NAMES.get(name, name)
            raise UnsupportedAdapter(f"{feature} ({name}={value!r} in {folder}) is not served; {WHAT_WORKS}")


def _modules(
    config: dict[str, Any], tensors: dict[str, Tensor], spec: ModelSpec, folder: Path
) -> dict[tuple[int, str], LoraWeights]:
    """Match the file's tensors with what the config targets, each with its rank and scaling; both must say the same."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None or match["linear"] not in LINEAR_MODULES or int(match["layer"]) >= spec.num_layers:
            raise UnsupportedAdapter(
                f"tensor {name} in {folder} has no place in a {spec.num_layers}-layer {spec.model_type}; {WHAT_WORKS}"
            )
        found.setdefault((int(match["layer"]), match["linear"]), {})[match["side"]] = tensor
    expected = {(layer, linear): name for layer, linear, name in _module_names(spec) if _is_target(config, name)}
    if not expected:
        raise UnsupportedAdapter(
            f"target_modules={config.get('target_modules')!r} in {folder} names no linear of this model; {WHAT_WORKS}"
        )
    for key in expected.keys() ^ found.keys():
        layer, linear = key
        where = "is not in the file" if key in expected else "is in the file but not targeted by the config"
        raise CorruptAdapter(f"{folder}: LoRA of layer {layer} {linear} {where}")
    return {key: _module(config, expected[key], sides, spec=spec, folder=folder) for key, sides in found.items()}


def _module_names(spec: ModelSpec) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, linear, the module's full name in transformers)."""
    for layer in range(spec.num_layers):
        for linear in LINEAR_MODULES:
            block = "self_attn" if linear in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield layer, linear, f"model.layers.{layer}.{block}.{linear}"


def _is_target(config: dict[str, Any], name: str) -> bool:
    """Say whether PEFT would adapt the module `name` under this config."""
    excluded = config.get("exclude_modules")
    if excluded and _names_match(excluded, name):
        return False
    targets = config.get("target_modules") or []
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return True
    if not _names_match(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str) or name in targets:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _names_match(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _module(
    config: dict[str, Any], name: str, sides: dict[str, Tensor], *, spec: ModelSpec, folder: Path
) -> LoraWeights:
    """Check one module's A and B and compute its scaling."""
    rank: int = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if rank < 1:
        raise CorruptAdapter(f"{folder}: rank {rank} of {name} is not positive")
    if rank > MAX_RANK:
        raise UnsupportedAdapter(f"rank {rank} of {name} in {folder} is over {MAX_RANK}; {WHAT_WORKS}")
    out_size, in_size = spec.linear_shape(name.rsplit(".", 1)[1])
    for side, shape in (("A", (rank, in_size)), ("B", (out_size, rank))):
        tensor = sides.get(side)
        if tensor is None:
            raise CorruptAdapter(f"{folder} lacks the tensor {name}.lora_{side}.weight")
        if tuple(tensor.shape) != shape:
            raise CorruptAdapter(
                f"tensor {name}.lora_{side}.weight in {folder} is {list(tensor.shape)}; config says {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise CorruptAdapter(f"tensor {name}.lora_{side}.weight in {folder} is {tensor.dtype}, not floating point")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraWeights(sides["A"], sides["B"], scaling)
