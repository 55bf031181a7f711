"""Turn a GGUF file of the Llama architecture into a Hugging Face folder.

GGUF stores q and k with their rotary halves interleaved (llama.cpp's `permute`), and keeps the tokenizer as lists; both
are undone here. Quantised weights are dequantised exactly by the `gguf` package and written as float32, so the folder
holds the values that llama.cpp computes with: a 4-bit checkpoint stays as coarse as it was.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

# GGUF block tensor -> Hugging Face module, for the Llama architecture.
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # GGUF's token_type of special tokens
_PRE_TOKENIZERS = ("smollm", "gpt-2")


def convert_gguf(source: Path, target: Path) -> dict[str, Any]:
    """Write `target` as a Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Returns facts for the record: name, architecture, licence, quantisation, num_parameters.
    Raises UserError when the architecture or tokenizer is one this converter does not undo.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(source))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unknown(source, fields)
    target.mkdir(parents=True, exist_ok=True)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    num_parameters = _write_weights(reader, fields, target)
    _write_json(target / "config.json", _model_config(fields, tied=tied))
    _write_json(target / "generation_config.json", _generation_config(fields))
    _write_tokenizer(fields, target)
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors if tensor.tensor_type.name != "F32"})
    return {
        "name": str(fields.get("general.basename") or source.stem),
        "architecture": "LlamaForCausalLM",
        "licence": str(fields.get("general.license", "unknown")),
        "quantisation": "+".join(kinds) or "F32",
        "num_parameters": num_parameters,
    }


def _refuse_unknown(source: Path, fields: dict[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"base: {source.name} has architecture {architecture!r}; the GGUF road takes 'llama'. "
            "Give a Hugging Face folder for other architectures."
        )
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"base: {source.name} has tokenizer {model!r} with pre-tokenizer {pre!r}; the GGUF road takes 'gpt2' with "
            f"{' or '.join(_PRE_TOKENIZERS)}. Give a Hugging Face folder instead."
        )


def _write_weights(reader: "GGUFReader", fields: dict[str, Any], target: Path) -> int:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    weights: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = _hugging_face_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = fields["llama.attention.head_count"] if "q_proj" in name else _num_kv_heads(fields)
            values = unpermute(values, heads)
        weights[name] = np.ascontiguousarray(values)
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    return sum(values.size for values in weights.values())


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs: [heads * dim, in] from (pair, half) order back to (half, pair)."""
    rows, columns = weight.shape
    half = rows // num_heads // 2
    return weight.reshape(num_heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _hugging_face_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_BLOCK_TENSORS[parts[2]]}.{parts[3]}"
    return f"{_TOP_TENSORS[parts[0]]}.{parts[1]}"


def _num_kv_heads(fields: dict[str, Any]) -> int:
    return int(fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]))


def _model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": _num_kv_heads(fields),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = list(fields["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(str(target))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
