"""Reads a base model's config into what the forward needs, and refuses by name what it cannot compute."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_apps.engine.errors import CorruptModel, UnsupportedModel

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
LAYER_TYPES = ("full_attention", "sliding_attention")
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Linears that read the same input, in packing order.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a Llama-family model. `windows[i]` is layer i's sliding window in tokens, None for all.

    `biased` names the `GROUPS` whose linears may have biases. Sequences of more than `long_from` tokens take
    `long_inverse_frequencies` for all their positions (longrope); None where one set serves every length.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tied: bool
    qk_norm: bool
    max_positions: int
    windows: tuple[int | None, ...]
    inverse_frequencies: Tensor
    rope_scaling: float
    long_inverse_frequencies: Tensor | None
    long_from: int | None
    biased: frozenset[str]
    eos_token_ids: frozenset[int]

    def linear_shape(self, module: str) -> tuple[int, int]:
        """Return (output size, input size) of one of the seven linears."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q_size, self.hidden_size),
            "k_proj": (kv_size, self.hidden_size),
            "v_proj": (kv_size, self.hidden_size),
            "o_proj": (self.hidden_size, q_size),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[module]


def read_spec(base_path: Path) -> ModelSpec:
    """Read config.json (and generation_config.json's end tokens) of a Hugging Face folder.

    Raises UnsupportedModel naming what is not computed and what is, CorruptModel when there is no readable config.
    """
    from transformers import AutoConfig

    if not (base_path / "config.json").is_file():
        raise CorruptModel(f"base_path={base_path} has no config.json; give the folder of a Hugging Face model")
    try:
        config: Any = AutoConfig.from_pretrained(str(base_path), local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ArithmeticError) as error:
        raise UnsupportedModel(f"{base_path}/config.json is not readable as one of {_supported()}: {error}") from error
    _refuse_unsupported(config, base_path)
    inverse_frequencies, rope_scaling = _rope(config)
    long_from, long_inverse_frequencies = _long_rope(config)
    return ModelSpec(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qk_norm=config.model_type == "qwen3",
        max_positions=config.max_position_embeddings,
        windows=_windows(config),
        inverse_frequencies=inverse_frequencies,
        rope_scaling=rope_scaling,
        long_inverse_frequencies=long_inverse_frequencies,
        long_from=long_from,
        biased=_biased(config),
        eos_token_ids=_eos_token_ids(config, base_path),
    )


def _supported() -> str:
    return ", ".join(sorted(ARCHITECTURES.values()))


def _refuse_unsupported(config: Any, base_path: Path) -> None:
    """Raise UnsupportedModel for the first thing in the config that the forward does not compute."""
    named = (config.architectures or [ARCHITECTURES.get(config.model_type, config.model_type)])[0]
    if ARCHITECTURES.get(config.model_type) != named:
        raise UnsupportedModel(f"architecture {named} ({base_path}) is not served; what works: {_supported()}")
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise UnsupportedModel(
            f"{base_path} is quantised ({method}); dequantise it to float32 or bfloat16 safetensors first"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act={config.hidden_act!r} ({base_path}) is not computed; what works: silu")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModel(
            f"rope_type={rope_type!r} ({base_path}) is not computed; what works: {', '.join(ROPE_TYPES)}"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor ({base_path}) is not computed; what works: 1.0")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if odd:
        raise UnsupportedModel(
            f"layer_types {odd} ({base_path}) are not computed; what works: {', '.join(LAYER_TYPES)}"
        )
    if config.num_attention_heads % (config.num_key_value_heads or config.num_attention_heads):
        raise UnsupportedModel(
            f"num_attention_heads={config.num_attention_heads} ({base_path}) is no multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Return each layer's window: Mistral slides everywhere, Qwen where its layer_types say so, Llama nowhere."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    num_layers: int = config.num_hidden_layers
    if config.model_type == "llama" or window is None:
        return (None,) * num_layers
    if config.model_type == "mistral" or kinds is None:
        return (window,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _biased(config: Any) -> frozenset[str]:
    """Return the groups of linears that have biases by the config; transformers passes over others in a file."""
    if config.model_type == "qwen2":
        return frozenset({"qkv"})
    names = {"attention_bias": ("qkv", "o"), "mlp_bias": ("gate_up", "down")}
    return frozenset(group for name, groups in names.items() if getattr(config, name, False) for group in groups)


def _rope(config: Any) -> tuple[Tensor, float]:
    """Return inverse frequencies [head_dim / 2] (fp32) and the factor on cos and sin, by transformers' functions.

    Those of "dynamic" change only beyond `max_position_embeddings`, which no sequence here exceeds.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
        return frequencies.float(), float(scaling)
    # transformers keeps the default formula in each model's rotary class: https://arxiv.org/abs/2104.09864, eq. 15.
    head_dim = _head_dim(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0


def _long_rope(config: Any) -> tuple[int | None, Tensor | None]:
    """Return the length beyond which longrope takes its long factors, and their inverse frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters["rope_type"] != "longrope":
        return None, None
    original: int = config.rope_parameters["original_max_position_embeddings"]
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=original + 1)
    return original, frequencies.float()


def _eos_token_ids(config: Any, base_path: Path) -> frozenset[int]:
    """Return the ids that end a sequence: the generation config's where there is one, and the model config's."""
    from transformers import GenerationConfig

    found: set[int] = set()
    sources = [config.eos_token_id]
    if (base_path / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(str(base_path), local_files_only=True).eos_token_id)
    for value in sources:
        if value is not None:
            found.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(found)
