"""The engine against transformers on whatever device is here: the same numbers, and how many tokens per second.

    python -m benchmarks.gpu_check [--quick] [--check] [--out FILE] [--device cuda|cpu] [--only PART]

Needs torch, transformers, safetensors and numpy, and no network: the models are random and made on the spot. Parity is
judged in fp32 for each architecture, with four adapters and the base in one batch, against transformers with the
adapter merged into its weights. Speed is greedy decoding of one random Llama, engine against `generate`, both measured
in this run. The last line is one JSON object; `--check` exits 1 when a figure is under its floor.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.cuda.report import Figure
from configs import env
from serve_apps.engine.config import AdapterRef, EngineConfig, Output, Request, SamplingParams
from serve_apps.engine.engine import Engine

# Programs of their own, each in its own process; without a GPU at toy shapes, against oracles only.
PROGRAMS = ("cuda.kernel_checks", "cuda.kernel_times", "lora_kernels", "decode_floor", "many_adapters", "cold_load")
VOCABULARY_SIZE = 1024
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# Two orders of products differ by about 4e-5 in fp32; the bound is 1e-4.
MAX_LOGPROB_DIFFERENCE = 1e-4
ALPHA = 16
MODULES = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
RANKS = (4, 8, 16, 3)


def save_model(config: PreTrainedConfig, path: Path, *, dtype: torch.dtype) -> Any:
    """Save a random model and a tokenizer at `path`; return the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    words = {f"w{index}": index for index in range(VOCABULARY_SIZE)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(path)
    return model


def save_adapter(model: Any, path: Path, *, rank: int, seed: int) -> AdapterRef:
    """Save a PEFT adapter of random A and B for `model`; B is large enough to change greedy output."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(model.config.num_hidden_layers):
        for module, block in MODULES.items():
            name = f"model.layers.{layer}.{block}.{module}"
            out_size, in_size = model.get_submodule(name).weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, in_size, generator=generator) / in_size**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_size, rank, generator=generator) * 0.1
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": list(MODULES), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return AdapterRef(f"sha256:{path.name}", str(path))


def merge(model: Any, adapter: AdapterRef, *, sign: int) -> None:
    """Add (sign 1) or take away (sign -1) an adapter's product in the oracle's own weights."""
    from safetensors.torch import load_file

    tensors = load_file(Path(adapter.path) / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            weight = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
            delta = (b.double() @ a.double() * (ALPHA / a.shape[0])).to(weight.device, weight.dtype)
            weight.data += sign * delta


def run_all(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Output]]:
    """Run requests to their ends; outputs by request."""
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id].append(output)
            if output.error:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
    return outputs


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCABULARY_SIZE, (length,), generator=generator).tolist())


def check_parity(device: str, folder: Path) -> Iterator[Figure]:
    """Per family: base and four adapters in one batch, their log-probabilities against the merged oracle's."""
    for family, config_class in FAMILIES.items():
        path = folder / family
        model = save_model(config_class(**SMALL), path, dtype=torch.float32)
        adapters = [None] + [save_adapter(model, folder / f"{family}-r{rank}", rank=rank, seed=rank) for rank in RANKS]
        engine = Engine(EngineConfig(str(path), device=device, max_num_seqs=10, max_model_len=256, max_step_tokens=48))
        sampling = SamplingParams(max_tokens=24, logprobs=5, ignore_eos=True)
        requests = [
            Request(f"r{index}", prompt(20 + 7 * index, index), sampling, adapters[index % len(adapters)])
            for index in range(10)
        ]
        outputs = run_all(engine, requests)
        worst = max(difference(model.to(device), request, outputs[request.request_id]) for request in requests)
        yield Figure(f"parity {family}", worst, "max |logprob - transformers|", MAX_LOGPROB_DIFFERENCE, is_ceiling=True)


@torch.inference_mode()
def difference(model: Any, request: Request, outputs: list[Output]) -> float:
    """Return the largest gap between the engine's reported log-probabilities and the oracle's on the same tokens."""
    produced = [token for output in outputs for token in output.new_token_ids]
    if request.adapter is not None:
        merge(model, request.adapter, sign=1)
    token_ids = torch.tensor([[*request.prompt_token_ids, *produced]], device=model.device)
    logits = model(token_ids).logits[0, len(request.prompt_token_ids) - 1 : -1]
    if request.adapter is not None:
        merge(model, request.adapter, sign=-1)
    expected = logits.float().log_softmax(-1)
    gaps = [
        abs(float(expected[step, token]) - logprob)
        for step, output in enumerate(outputs)
        for entry in output.logprobs or ()
        for token, logprob in ((entry.token_id, entry.logprob), *entry.top)
    ]
    return max(gaps)


def speed_config(device: str, is_quick: bool) -> LlamaConfig:
    """Return the Llama whose speed is measured: 60 M parameters in the quick form, 1.2 G on a GPU."""
    hidden, layers = (2048, 16) if device == "cuda" and not is_quick else (512, 12)
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE if is_quick else 32_000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def check_speed(device: str, folder: Path, *, is_quick: bool) -> Iterator[Figure]:
    """Decode throughput of the base, of one shared adapter and of all-distinct adapters, against `generate`."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = save_model(speed_config(device, is_quick), folder / "speed", dtype=dtype)
    batches = (1, 8) if is_quick else (1, 8, 32)
    num_new = 32 if is_quick else 128
    adapters = [save_adapter(model, folder / f"a{i}", rank=RANKS[i % 4], seed=i) for i in range(max(batches))]
    model = model.to(device)
    name = str(dtype).removeprefix("torch.")
    engine = Engine(
        EngineConfig(
            str(folder / "speed"),
            dtype=name,
            device=device,
            max_num_seqs=32,
            max_step_tokens=4096,
            # The same prompts come again for every timing: found prefixes would be no work done.
            enable_prefix_cache=False,
        )
    )
    for batch in batches:
        theirs = best_of_two(lambda batch=batch: generate_transformers(model, batch, num_new))
        rows: dict[str, list[AdapterRef | None]] = {
            "base": [None] * batch,
            "one adapter": [adapters[0]] * batch,
            "distinct adapters": list(adapters[:batch]),
        }
        yield Figure(f"transformers, batch {batch}", batch * num_new / theirs, "tokens/s")
        for law, refs in rows.items():
            ours = best_of_two(lambda refs=refs: generate_engine(engine, refs, num_new))
            yield Figure(f"engine {law}, batch {batch}", len(refs) * num_new / ours, "tokens/s")
            floor = 1.0 if law == "base" and batch == 1 else None
            yield Figure(f"engine {law} / transformers base, batch {batch}", theirs / ours, "ratio", floor)


def run_programs(folder: Path, *, is_quick: bool, plot: Path | None = None) -> Iterator[Figure]:
    """Run the kernels' checks and the other programs that need a GPU; their figures, each with its program's name.

    `plot`: where `lora_kernels` draws its points.
    """
    for name in PROGRAMS:
        out = folder / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *(["--quick"] if is_quick else [])]
        if plot and name == "lora_kernels":
            command += ["--plot", str(plot)]
        done = subprocess.run(command, env=env.child_environment({}), stdout=subprocess.PIPE, text=True, check=False)
        yield Figure(f"{name}: exit status", done.returncode, "", 0, is_ceiling=True)
        for entry in json.loads(out.read_text())["figures"] if out.exists() else ():
            figure = Figure(**entry)
            yield replace(figure, name=f"{name}: {figure.name}")


def best_of_two(measure: Any) -> float:
    """Return the smaller of two timings in seconds, after one that warms up."""
    measure()
    return float(min(measure(), measure()))


def generate_engine(engine: Engine, refs: Sequence[AdapterRef | None], num_new: int) -> float:
    """Return the seconds for `num_new` tokens after 64-token prompts, one request per entry of `refs`."""
    sampling = SamplingParams(max_tokens=num_new, ignore_eos=True)
    requests = [Request(f"r{i}", prompt(64, i), sampling, adapter) for i, adapter in enumerate(refs)]
    for adapter in refs:
        if adapter is not None:
            engine.load(adapter)
    start = synchronised_time()
    run_all(engine, requests)
    return synchronised_time() - start


@torch.inference_mode()
def generate_transformers(model: Any, batch: int, num_new: int) -> float:
    """Return the seconds of `generate` for the same prompts, which are of one length, so nothing is padded."""
    token_ids = torch.tensor([prompt(64, i) for i in range(batch)], device=model.device)
    start = synchronised_time()
    model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
    )
    return synchronised_time() - start


def synchronised_time() -> float:
    """Return the wall clock in seconds once the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def hardware(device: str) -> str:
    """Name the device that ran."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both parts, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small model, short runs")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is under its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here, the plot of lora_kernels beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("parity", "speed", "programs"), help="one part instead of all three")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    peer = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"Trailmark's engine against {peer}, on {hardware(options.device)}; random weights")
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "parity": check_parity(options.device, folder),
            "speed": check_speed(options.device, folder, is_quick=options.quick),
            "programs": run_programs(
                folder, is_quick=options.quick, plot=options.out and options.out.with_suffix(".svg")
            ),
        }
        for figure in chain(*(part for name, part in parts.items() if options.only in (None, name))):
            figures.append(figure)
            print(figure.line, flush=True)
    report = {"hardware": hardware(options.device), "peer": peer, "figures": [asdict(figure) for figure in figures]}
    line = json.dumps(report)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
