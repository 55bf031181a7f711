"""The trained model: a frozen base with PEFT LoRA, its export to PEFT's own files, and the proof that they reload."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from attribution.influence.gradients import pad_batch, parameter_name
from configs.schema import TrainSettings
from pipelines.train.data import Example

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"


def load_base(
    path: str, *, dtype: str, device: torch.device | str = "cpu", attention: Literal["sdpa", "eager"] = "sdpa"
) -> nn.Module:
    """Load the frozen base. `dtype` is a torch dtype's name, `attention` the name transformers has for how it runs."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
    )
    model.config.use_cache = False
    return model.to(device)  # type: ignore[no-any-return]


def build_model(base: nn.Module, *, base_name: str, settings: TrainSettings) -> PeftModel:
    """Attach a fresh adapter; its float32 weights follow from the seed. Raises ValueError for unknown modules."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        lora_dropout=settings.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    # A path would differ between machines and end up in a digest; the digest of the base stands in the manifest.
    model.peft_config["default"].base_model_name_or_path = base_name
    assert isinstance(model, PeftModel)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by the names PEFT saves them under."""
    return {parameter_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def export_adapter(model: PeftModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write PEFT's two files, byte-equal for equal weights. Raises ValueError for an empty or misshapen tensor."""
    rank = model.peft_config["default"].r
    for name, weight in weights.items():
        if weight.numel() == 0 or rank not in weight.shape:
            raise ValueError(
                f"{name}: shape {tuple(weight.shape)} is not that of a rank-{rank} factor; the gather failed"
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / ADAPTER_WEIGHTS_FILE, {"format": "pt"})
    config: dict[str, Any] = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    # PEFT keeps sets, whose order changes from process to process.
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def reload_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """Load exported files the way any user would, gradients enabled for the features of the trace."""
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    return model.eval()


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter in place. Raises KeyError unless names match exactly."""
    parameters = trainable(model)
    if parameters.keys() != weights.keys():
        raise KeyError(
            f"adapter weights: names differ from the model's: {sorted(parameters.keys() ^ weights.keys())[:4]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder or checkpoint."""
    return load_file(folder / ADAPTER_WEIGHTS_FILE)


def probe_logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return float32 logits [real tokens of all examples, vocabulary] on the CPU, without dropout."""
    device = next(model.parameters()).device
    input_ids, _, mask = pad_batch([example.encoded for example in examples], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float().cpu()
    model.train(was_training)
    assert isinstance(logits, Tensor)
    return logits
