"""Base models that are refused: by name, with what works, before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_apps.engine.architecture import read_spec
from serve_apps.engine.errors import CorruptModel, UnsupportedModel
from tests.serve_apps.engine.engine_cases import engine_for


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
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic' .* default, linear, llama3, yarn",
        ),
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
    weights = copy / "model.safetensors"
    whole = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, weights)
    with pytest.raises(CorruptModel, match=f"lacks the tensor {name}"):
        engine_for(copy)
    save_file({**whole, name: torch.ones(3, 3)}, weights)
    with pytest.raises(CorruptModel, match=rf"{name} .* \[3, 3\]; its config says \[160, 64\]"):
        engine_for(copy)
    save_file({**whole, "model.layers.0.mlp.router.weight": torch.ones(3)}, weights)
    with pytest.raises(CorruptModel, match=r"mlp\.router\.weight"):
        engine_for(copy)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CorruptModel, match="not a readable safetensors file"):
        engine_for(copy)
    weights.unlink()
    with pytest.raises(CorruptModel, match="neither"):
        engine_for(copy)
