"""Base models that are refused: by name, with what works, before any weight is read."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.cuda.random_llama import Shape, write_checkpoint
from configs import env
from kernels.native import load
from serve_apps.engine import weights
from serve_apps.engine.architecture import read_spec
from serve_apps.engine.errors import CorruptModel, UnsupportedModel
from tests.serve_apps.engine.engine_cases import engine_for, request, run


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to spoil."""
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel .* LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "never_heard_of"}, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq."),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='spiral' .* default, linear, dynamic, yarn, longrope, llama3, proportional",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor .* 1.0"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention.* full_attention, sliding"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ({"num_attention_heads": 0}, r"config\.json is not readable as one of Llama"),
    ],
)
def test_unsupported_models(values: dict[str, Any], message: str, copy: Path) -> None:
    set_config(copy, **values)
    with pytest.raises(UnsupportedModel, match=message):
        read_spec(copy)


def test_end_tokens_come_from_both_configs(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert read_spec(copy).eos_token_ids == {0, 2}


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"config\.json"):
        read_spec(tmp_path)


def test_spoiled_weights_are_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, file)
    with pytest.raises(CorruptModel, match=f"lacks the tensor {name}"):
        engine_for(copy)
    save_file({**whole, name: torch.ones(3, 3)}, file)
    with pytest.raises(CorruptModel, match=rf"{name} .* \[3, 3\]; its config says \[160, 64\]"):
        engine_for(copy)
    save_file({**whole, "model.layers.0.mlp.router.weight": torch.ones(3)}, file)
    with pytest.raises(CorruptModel, match=r"mlp\.router\.weight"):
        engine_for(copy)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptModel, match="not a readable safetensors file"):
        engine_for(copy)
    file.unlink()
    with pytest.raises(CorruptModel, match="neither"):
        engine_for(copy)


def test_a_tensor_of_integers_is_refused(copy: Path) -> None:
    """Quantised weights whose config does not say so would be read as if each step were a one."""
    file = copy / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(file), name: torch.ones(160, 64, dtype=torch.int8)}, file)
    with pytest.raises(CorruptModel, match=rf"{name} .* torch\.int8; dequantise"):
        engine_for(copy)


def test_a_model_without_a_tokenizer_is_named(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CorruptModel, match=f"base_path={copy} has no readable tokenizer: "):
        engine_for(copy)


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_of_shards_is_named(index: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptModel, match=r"model\.safetensors\.index\.json is not an index of shards"):
        engine_for(copy)


def head_logprobs(folder: Path) -> tuple[list[float], list[float]]:
    """The best log-probabilities after a prompt: transformers' and the engine's."""
    prompt = [5, 6, 7, 8]
    (output,) = run(engine_for(folder), [request("r", prompt, max_tokens=1, logprobs=5)])["r"]
    assert output.logprobs is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    top = output.logprobs[0].top
    return [float(expected[token_id]) for token_id, _ in top], [logprob for _, logprob in top]


@pytest.mark.parametrize("native_kernels", ["c", "torch"])
@pytest.mark.parametrize("held", ["equal", "different", "the head alone"])
def test_a_tied_config_over_a_file_with_a_head(
    held: str, native_kernels: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 ties equal tensors, keeps different ones apart, and takes the one that is there."""
    if native_kernels == "torch":
        monkeypatch.setenv("TRAILMARK_NATIVE_KERNELS", "0")
    file = copy / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if held != "different" else embedding.flip(0).contiguous()
    if held == "the head alone":
        del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    expected, actual = head_logprobs(copy)
    assert actual == pytest.approx(expected, abs=1e-4)


def test_biases_that_the_config_does_not_have_are_not_added(copy: Path) -> None:
    """transformers passes over them; computing with them would be another model's answer, so they are named."""
    file = copy / "model.safetensors"
    sizes = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    biases = {f"model.layers.0.self_attn.{name}.bias": torch.ones(size) for name, size in sizes.items()}
    save_file({**load_file(file), **biases}, file)
    with pytest.raises(CorruptModel, match=r"does not use: model\.layers\.0\.self_attn\.k_proj\.bias"):
        engine_for(copy)


@pytest.mark.parametrize("is_native", [True, False])
def test_loading_holds_no_second_copy(is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 MB of weights: memory of our own (the mapped files are not) stays far from twice that.

    Beyond the weights there are the linear being packed and what the allocator keeps of those before it.
    """
    shape = Shape(hidden=512, intermediate=1536, layers=6, heads=8, kv_heads=4, head_dim=64, vocabulary=1024)
    spec = write_checkpoint(tmp_path, shape, dtype=torch.float32, device=torch.device("cpu"))
    native = load(env.cache_home()) if is_native else None
    if is_native and native is None:
        pytest.skip("no C compiler here")
    seen: list[int] = []
    read_into = weights.Checkpoint.read_into

    def watched(self: weights.Checkpoint, target: torch.Tensor, name: str) -> None:
        read_into(self, target, name)
        seen.append(own_bytes())

    monkeypatch.setattr(weights.Checkpoint, "read_into", watched)
    ctypes.CDLL(None).malloc_trim(0)  # what the checkpoint's making left
    before = own_bytes()
    loaded = weights.load_weights(tmp_path, spec, dtype=torch.float32, device=torch.device("cpu"), native=native)
    after = own_bytes()
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert len(loaded.layers) == 6 and after - before > 0.8 * num_bytes, "the weights are not in memory"
    assert max(seen) - before < 1.5 * num_bytes


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
