"""The safety property: every row of any mix of adapters is what PEFT alone gives with that adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from serve_apps.engine.engine import Engine
from tests.serve_apps.engine.engine_cases import TIE, Oracle, engine_for, prompts, ref, request, run, tokens
from tests.tiny_model import build_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama untied, biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama no gqa, head_dim": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, head_dim=20),
    "llama3 rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "yarn rope": LlamaConfig(**SHAPE, rope_parameters=YARN_ROPE),
    "linear rope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "dynamic rope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "proportional rope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral sliding": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2 sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3 biases": Qwen3Config(**SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def save_random(config: PreTrainedConfig, path: Path, **options: Any) -> Any:
    """Save a model of random weights (norms and biases too) with a tokenizer, and return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(path, **options)
    build_tokenizer().save_pretrained(path)
    return model


def engine_logits(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of every position after feeding `token_ids` through the paged cache, one token a time."""
    recorded: list[torch.Tensor] = []
    forward = engine._runner.model.forward

    def recording(*args: Any) -> torch.Tensor:
        recorded.append(forward(*args))
        return recorded[-1]

    engine._runner.model.forward = recording  # type: ignore[method-assign]
    for length in range(1, len(token_ids) + 1):
        run(engine, [request(f"prefix{length}", token_ids[:length], max_tokens=1)])
    return torch.cat(recorded)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """fp32, <= 1e-4, for every architecture and option; prompts longer than the windows."""
    model = save_random(CONFIGS[name], tmp_path)
    token_ids = torch.randint(3, 512, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    actual = engine_logits(engine_for(tmp_path, max_step_tokens=8), token_ids)
    # max_step_tokens 8 cuts the longer prefixes into chunks: only each one's last logits are asked for.
    assert (actual - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("body", ["c", "torch", "triton"])
def test_longrope_takes_the_factors_of_the_whole_length(body: str, tmp_path: Path) -> None:
    """Each token is the one that transformers finds best after its whole prefix, on both sides of the original length.

    Answers that grow beyond it have their keys computed anew; what was cached before is not found again.
    """
    model = save_random(LlamaConfig(**SHAPE, rope_parameters=LONG_ROPE), tmp_path)
    engine = engine_for(tmp_path, max_step_tokens=8, native_kernels=body == "c")
    if body == "triton":
        engine._runner.model.cuda_forward = engine._runner.model.build_cuda_forward()
    whole = torch.randint(3, 512, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    asked = {str(length): whole[:length] for length in (9, 15, 16, 17, 24)}
    for _ in range(2):
        outputs = run(engine, [request(name, prompt, max_tokens=6) for name, prompt in asked.items()])
        for name, prompt in asked.items():
            for step, token in enumerate(produced := tokens(outputs[name])):
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + produced[:step]])).logits[0, -1]
                assert float(logits.max() - logits[token]) < TIE, f"token {step} after {len(prompt)}"
    assert int(str(engine.stats()["prefix_hit_tokens"])) > 0, "no prefix was found again"


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = save_random(CONFIGS["qwen2"], tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.inference_mode():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0]
    assert (engine_logits(engine_for(tmp_path), [5, 6, 7]) - expected).abs().max() <= 1e-4


def test_bfloat16_stays_near_float32(tiny_base: Path, oracle: Oracle) -> None:
    engine = engine_for(tiny_base, dtype="bfloat16")
    prompt = prompts(engine, 1)[0]
    expected = oracle.logits(prompt)[-1].log_softmax(-1)
    output = run(engine, [request("r", prompt, max_tokens=1, logprobs=5)])["r"][0]
    assert output.logprobs is not None
    for token, logprob in output.logprobs[0].top:
        if logprob > -5:
            assert abs(float(expected[token]) - logprob) < 0.15


MIXES = {
    "one": [1] * 8,
    "distinct": [1, 2, 3, 4],
    "distinct and base": [0, 4, 3, 0, 2, 1, 0, 0],
    "uniform": [1, 2, 3, 4, 1, 2, 3, 4],
    "zipf": [1, 1, 1, 1, 2, 2, 3, 4, 0, 1, 1, 2],
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batch_equals_peft_alone(
    mix: str, tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle
) -> None:
    """Greedy, token by token; more requests than seats, chunked prompts, so that steps mix prefill and decode."""
    engine = engine_for(tiny_base, max_num_seqs=6, max_step_tokens=24)
    folders = [None, *strong_adapters.values()]
    rows = [folders[index] for index in MIXES[mix]]
    asked = prompts(engine, len(rows))
    outputs = run(
        engine,
        [request(f"r{row}", asked[row], None if folder is None else ref(folder)) for row, folder in enumerate(rows)],
    )
    for row, folder in enumerate(rows):
        produced = tokens(outputs[f"r{row}"])
        assert len(produced) == 12
        oracle.explain(asked[row], produced, folder)
        assert outputs[f"r{row}"][-1].adapter_digest == (None if folder is None else ref(folder).digest)


def test_adapters_do_change_the_answer(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    """Else the parity above would prove nothing."""
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    refs = [None, *(ref(folder) for folder in strong_adapters.values())]
    outputs = run(engine, [request(f"r{index}", prompt, item) for index, item in enumerate(refs)])
    assert len({tuple(tokens(rows)) for rows in outputs.values()}) == len(refs)


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 20, "model.layers.0.mlp.up_proj": 1}},
    "all patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.k_proj": 7, "up_proj": 2},
        "alpha_pattern": {"k_proj": 3},
    },
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform and pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "regex": {"target_modules": r".*\.0\..*(q|up)_proj"},
    "first pattern of several": {"rank_pattern": {".*_proj": 2, "q_proj|v_proj": 6}, "alpha_pattern": {".*": 9}},
    "alternatives": {
        "rank_pattern": {r"layers\.[1-9]\.mlp\.(up|down)_proj|q_proj": 4},
        "alpha_pattern": {"^model.*v_proj$": 3},
    },
    "exclude by regex": {"exclude_modules": r".*\.1\..*"},
    "layers and full names": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "exclude": {"exclude_modules": ["model.layers.0.mlp.up_proj", "k_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("name", PEFT_OPTIONS)
def test_adapter_options_equal_peft(name: str, tiny_base: Path, tmp_path: Path) -> None:
    """Every honoured option of adapter_config.json, by the log-probabilities of one step against PEFT."""
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], **PEFT_OPTIONS[name]}
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in (value for key, value in model.named_parameters() if "lora_B" in key):
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    outputs = run(engine, [request("r", prompt, ref(tmp_path), max_tokens=1, logprobs=20)])["r"]
    assert outputs[0].logprobs is not None
    for token, logprob in outputs[0].logprobs[0].top:
        assert abs(float(expected[token]) - logprob) <= 1e-4
