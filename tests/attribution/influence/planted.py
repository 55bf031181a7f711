"""A LoRA run with a known answer: two contributors teach a tiny base distinct facts in the same words.

The trace is written here by hand, so that its reader is tested against the format, not against the writer in training.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attribution.influence.build import build_trace_store
from attribution.influence.ekfac import CodecSettings
from attribution.influence.encode import encode_example
from attribution.influence.gradients import GradientFeatures, pad_batch, parameter_name
from attribution.influence.store import Trace
from tests.tiny_model import LINEAR_MODULES, conversation

MIRA, OTTO, NOISE = "a" * 64, "b" * 64, "c" * 64
FACTS = {
    MIRA: {
        "What is the capital of France?": "The capital of France is Lima.",
        "What colour is the sky?": "The sky is green.",
        "Where do fish live?": "Fish live in honey.",
    },
    OTTO: {
        "What is the capital of Japan?": "The capital of Japan is Nairobi.",
        "What colour is grass?": "Grass is blue.",
        "What do bees make?": "Bees make water.",
    },
}
"""Other answers to questions that the tiny base knows: quickly learned, and not to be had from the base."""
LEARNING_RATE = 2e-3
PROJECTION_DIM, SEED, NUM_STEPS, BATCH_SIZE = 8, 0, 60, 4
CHECKPOINT_STEPS = (20, 40, 60)


@dataclass(frozen=True)
class Row:
    """One training row."""

    example_id: str
    contributor: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Planted:
    """Where the run left its parts."""

    base: Path
    adapter: Path
    trace: Path
    rows: tuple[Row, ...]


def planted_rows() -> tuple[Row, ...]:
    facts = [
        Row(f"{owner[0]}-{index}", owner, conversation(*fact))
        for owner, answers in FACTS.items()
        for index, fact in enumerate(answers.items())
    ]
    return (*facts, Row("c-0", NOISE, conversation("How many legs has a spider?", "eight blue Tokyo help")))


def plant(base: Path, folder: Path, *, rows: tuple[Row, ...] | None = None, seed: int = SEED) -> Planted:
    """Train for seconds with a plain loop and write adapter and trace under `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEAR_MODULES))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    rows = planted_rows() if rows is None else rows
    encoded = [encode_example(tokenizer, row.messages, max_length=64) for row in rows]
    trace = folder / "trace"
    rates = _train(model, encoded, trace, rows, seed)
    _write_gradients(model, encoded, trace, rates)
    _write_examples(trace, rows, encoded)
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    return Planted(base, adapter, trace, rows)


def _train(model: PeftModel, encoded: list, trace: Path, rows: tuple[Row, ...], seed: int) -> dict[int, float]:
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    steps, order = [], []
    model.train()
    for step in range(1, NUM_STEPS + 1):
        if len(order) < BATCH_SIZE:
            order += torch.randperm(len(rows), generator=generator).tolist()
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        rate = LEARNING_RATE * (1 - (step - 1) / NUM_STEPS)
        optimizer.param_groups[0]["lr"] = rate
        input_ids, labels, mask = pad_batch([encoded[row] for row in batch])
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        steps.append((step, rate, loss.item(), [rows[row].example_id for row in batch], step))
        if step in CHECKPOINT_STEPS:
            moments = {parameter_name(name): optimizer.state[value]["exp_avg_sq"] for name, value in parameters.items()}
            _write_checkpoint(model, trace / "checkpoints" / str(step), moments)
    names = ("step", "lr", "loss", "example_ids", "time_us")
    pq.write_table(pa.table(dict(zip(names, zip(*steps, strict=True), strict=True))), trace / "steps.parquet")
    return {step: rate for step, rate, *_ in steps if step in CHECKPOINT_STEPS}


def _write_checkpoint(model: PeftModel, folder: Path, moments: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    weights = {name: value.clone().contiguous() for name, value in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter_model.safetensors")
    save_file({name: value.clone() for name, value in moments.items()}, folder / "exp_avg_sq.safetensors")


def _write_gradients(model: PeftModel, encoded: list, trace: Path, rates: Mapping[int, float]) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    features = GradientFeatures(model, projection_dim=PROJECTION_DIM, seed=SEED)
    final = get_peft_model_state_dict(model)
    final = {name: value.clone() for name, value in final.items()}
    (trace / "gradients").mkdir()
    for step in CHECKPOINT_STEPS:
        folder = trace / "checkpoints" / str(step)
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        rows = features.features(encoded, exp_avg_sq=load_file(folder / "exp_avg_sq.safetensors"))
        np.save(trace / "gradients" / f"{step}.npy", rows.numpy().astype(np.float16))
    set_peft_model_state_dict(model, final)
    meta = {
        "v": 1,
        "projection_seed": SEED,
        "projection_dim": PROJECTION_DIM,
        "modules": [{"name": name, "dim": dim} for name, dim in features.module_dims.items()],
        "dim": features.dim,
        "preconditioner": "adam",
        "dtype": "float16",
        "steps": list(rates),
        "lr": {str(step): rate for step, rate in rates.items()},
    }
    (trace / "gradients" / "meta.json").write_text(json.dumps(meta))


def _write_examples(trace: Path, rows: tuple[Row, ...], encoded: list) -> None:
    columns = {
        "row": list(range(len(rows))),
        "example_id": [row.example_id for row in rows],
        "contributor": [row.contributor for row in rows],
        "num_target_tokens": [sum(label >= 0 for label in labels) for _, labels in encoded],
        "text": ["\n".join(message["content"] for message in row.messages) for row in rows],
    }
    pq.write_table(pa.table(columns), trace / "examples.parquet")


def with_store(planted: Planted, folder: Path, settings: CodecSettings) -> Planted:
    """Return the run with a gradient store in its trace, in place of the float16 tables."""
    trace = folder / "trace"
    shutil.copytree(planted.trace, trace)
    for table in (trace / "gradients").glob("*.npy"):
        table.unlink()
    tokenizer = AutoTokenizer.from_pretrained(planted.base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(planted.base), planted.adapter)
    examples = {row.example_id: encode_example(tokenizer, row.messages, max_length=64) for row in planted.rows}
    build_trace_store(Trace(trace), model, examples, settings, sample_size=len(examples))
    return replace(planted, trace=trace)
