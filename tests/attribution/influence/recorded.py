"""The planted run once more, with a recorder: plain torch trains it and every state is written down by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attribution.influence.encode import encode_example
from attribution.influence.gradients import pad_batch, parameter_name
from tests.attribution.influence.planted import NUM_STEPS, SEED, Planted
from tests.tiny_model import LINEAR_MODULES

STATE_STEPS = (8, 16, 20, 28, 36, 40, 48, 56, 60)
"""The planted checkpoints (20, 40, 60) and enough between them for segments of about sqrt(60) updates."""


def record_run(planted: Planted, folder: Path) -> Planted:
    """Return the planted run with a trace of format 2 under `folder`."""
    trace = folder / "trace"
    shutil.copytree(planted.trace, trace)
    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    encoded = [encode_example(tokenizer, row.messages, max_length=64) for row in planted.rows]
    examples = pq.read_table(trace / "examples.parquet")
    for place, name in enumerate(("input_ids", "labels")):
        examples = examples.append_column(name, pa.array([row[place] for row in encoded], pa.list_(pa.int32())))
    pq.write_table(examples, trace / "examples.parquet")
    norms = _train(planted, encoded, trace)
    steps = pq.read_table(trace / "steps.parquet")
    pq.write_table(steps.append_column("grad_norm", pa.array(norms)), trace / "steps.parquet")
    (trace / "run.json").write_text(json.dumps(facts()))
    return replace(planted, trace=trace)


def facts(**changed: object) -> dict[str, object]:
    """What run.json says; `changed` overrides."""
    return {
        "v": 2,
        "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lora_dropout": 0.0,
        "rank": 8,
        "alpha": 16,
        "target_modules": list(LINEAR_MODULES),
        "seed": SEED,
        "dtype": "float32",
        "attention": "sdpa",
        "deterministic": False,
        "device": "cpu",
        "world_size": 1,
        "threads_per_worker": 1,
        "zero_stage": 2,
        "num_parameters": 0,
        "state_steps": list(STATE_STEPS),
        "attempts": [],
        "versions": {},
        **changed,
    }


def _train(planted: Planted, encoded: list, trace: Path) -> list[float]:
    torch.manual_seed(SEED)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEAR_MODULES))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(planted.base, dtype=torch.float32), config)
    parameters = {parameter_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    places = {row.example_id: place for place, row in enumerate(planted.rows)}
    model.train()
    _keep(get_peft_model_state_dict(model), trace / "checkpoints" / "0", "adapter_model")
    norms = []
    for step in pq.read_table(trace / "steps.parquet").to_pylist():
        optimizer.param_groups[0]["lr"] = step["lr"]
        input_ids, labels, mask = pad_batch([encoded[places[name]] for name in step["example_ids"]])
        optimizer.zero_grad()
        model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)))
        optimizer.step()
        if step["step"] in STATE_STEPS:
            folder = trace / "checkpoints" / str(step["step"])
            _keep(get_peft_model_state_dict(model), folder, "adapter_model")
            for moment in ("exp_avg", "exp_avg_sq"):
                _keep({name: optimizer.state[value][moment] for name, value in parameters.items()}, folder, moment)
    assert len(norms) == NUM_STEPS
    return norms


def _keep(tensors: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(plain, folder / f"{name}.safetensors")
