"""The forward over the C kernels against transformers and against the forward over torch; what decides between them."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kernels.lora import MODULES
from kernels.native import Native
from serve_apps.engine.architecture import read_spec
from serve_apps.engine.bench import write_random_adapter
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.cpu_forward import can_run
from serve_apps.engine.engine import Engine
from serve_apps.engine.runner import resolve_dtype
from tests.serve_apps.engine.engine_cases import engine_for, prompts, ref, request, run, tokens
from tests.serve_apps.engine.test_parity import CONFIGS, engine_logits, save_random

CPU = torch.device("cpu")


def config_for_c(name: str) -> PreTrainedConfig:
    """A config of `CONFIGS` with heads of a size that the kernels compute."""
    config = copy.deepcopy(CONFIGS[name])
    config.head_dim = 32 if "head_dim" in name else 16
    return config


def runs_in_c(engine: Engine) -> bool:
    return engine._runner.model._cpu_forward is not None


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler() -> None:
    from configs import env
    from kernels.native import load

    if load(env.cache_home()) is None:
        pytest.skip("no C compiler here")


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """<= 1e-4 for every architecture and option; prompts longer than the windows, in chunks."""
    model = save_random(config_for_c(name), tmp_path)
    token_ids = torch.randint(3, 512, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    engine = engine_for(tmp_path, max_step_tokens=8)
    assert runs_in_c(engine)
    assert (engine_logits(engine, token_ids) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("native_kernels", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_as_near_to_fp32_as_transformers(name: str, native_kernels: bool, tmp_path: Path) -> None:
    """Against fp32 products of the same bf16 weights: at most 1.5 times the mean error that transformers makes."""
    save_random(config_for_c(name), tmp_path)
    token_ids = torch.randint(3, 512, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    options = {"attn_implementation": "eager", "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options).eval()
    with torch.inference_mode():
        theirs = model(torch.tensor([token_ids])).logits[0].float()
        exact = model.float()(torch.tensor([token_ids])).logits[0]
    engine = engine_for(tmp_path, dtype="bfloat16", max_step_tokens=8, native_kernels=native_kernels)
    assert runs_in_c(engine) == native_kernels
    ours = engine_logits(engine, token_ids)
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("native_kernels", [True, False])
@pytest.mark.parametrize("name", ["llama untied, biases", "llama3 rope", "mistral sliding", "qwen2", "qwen3"])
def test_bf16_of_a_mixed_batch_is_as_near_to_fp32_as_peft(name: str, native_kernels: bool, tmp_path: Path) -> None:
    """Teacher-forced: log-probabilities along the tokens chosen, the base and adapters in one batch, each by itself."""
    save_random(config_for_c(name), tmp_path)
    adapters: list[AdapterRef | None] = [None]
    for rank in (3, 8):
        adapters.append(
            write_random_adapter(tmp_path / f"r{rank}", read_spec(tmp_path), rank=rank, modules=MODULES, seed=rank)
        )
    limits = {"max_step_tokens": 16, "native_kernels": native_kernels}
    engine = engine_for(tmp_path, dtype="bfloat16", **limits)
    asked = [torch.randint(3, 512, (9 + 2 * row,), generator=torch.Generator().manual_seed(row)) for row in range(6)]
    outputs = run(
        engine,
        [request(f"r{row}", asked[row].tolist(), adapters[row % 3], logprobs=20, max_tokens=6) for row in range(6)],
    )
    ours, theirs, of_base = [], [], []
    for row in range(6):
        token_ids = torch.tensor([[*asked[row].tolist(), *tokens(outputs[f"r{row}"])]])
        half, exact = forced_logprobs(tmp_path, adapters[row % 3], token_ids, num_new=6)
        base = forced_logprobs(tmp_path, None, token_ids, num_new=6)[1]
        for step, output in enumerate(outputs[f"r{row}"]):
            assert output.logprobs is not None
            ids = torch.tensor([token for token, _ in output.logprobs[0].top])
            told = torch.tensor([logprob for _, logprob in output.logprobs[0].top])
            ours.append(told - exact[step, ids])
            theirs.append(half[step, ids] - exact[step, ids])
            of_base += [base[step, ids] - exact[step, ids]] if row % 3 else []
    allowed = 1.5 * torch.cat(theirs).abs().mean()
    assert torch.cat(ours).abs().mean() <= allowed
    assert torch.cat(of_base).abs().mean() > 3 * allowed, "adapters left out would not be seen"


def forced_logprobs(
    base: Path, adapter: AdapterRef | None, token_ids: torch.Tensor, *, num_new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PEFT's log-probabilities of the last tokens in bf16, and in fp32 of the same bf16 base weights."""
    options = {"attn_implementation": "eager", "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **options)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.path)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        each = model.eval() if dtype == torch.bfloat16 else model.float()
        with torch.inference_mode():
            found.append(each(token_ids).logits[0, -num_new - 1 : -1].float().log_softmax(-1))
    return found[0], found[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_has_the_same_logprobs_alone_and_in_any_batch(
    dtype: str, tiny_base: Path, strong_adapters: dict[str, Path]
) -> None:
    """To the bit: chunked prefill, decode beside others, other adapters, one thread and two."""
    folders = [None, *strong_adapters.values(), None]
    logprobs: list[list[object]] = []
    for num_threads, max_num_seqs, max_step_tokens in ((1, 1, 512), (1, 6, 24), (2, 4, 9)):
        limits = {"max_num_seqs": max_num_seqs, "max_step_tokens": max_step_tokens, "num_threads": num_threads}
        engine = engine_for(tiny_base, dtype=dtype, **limits)
        assert runs_in_c(engine)
        asked = prompts(engine, len(folders))
        requests = [
            request(f"r{row}", asked[row], None if folder is None else ref(folder), logprobs=3)
            for row, folder in enumerate(folders)
        ]
        outputs = run(engine, requests)
        logprobs.append([output.logprobs for row in range(len(folders)) for output in outputs[f"r{row}"]])
    torch.set_num_threads(1)
    assert logprobs[0] == logprobs[1] == logprobs[2]


def test_torch_computes_the_same_tokens(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    folder = strong_adapters["strong-r8-all"]
    produced = []
    for native_kernels in (True, False):
        engine = engine_for(tiny_base, native_kernels=native_kernels)
        assert runs_in_c(engine) == native_kernels
        produced.append(tokens(run(engine, [request("r", prompts(engine, 1)[0], ref(folder))])["r"]))
    assert produced[0] == produced[1]


def test_the_environment_turns_them_off(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_NATIVE_KERNELS", "0")
    assert not runs_in_c(engine_for(tiny_base))


def test_without_a_compiler_torch_serves_after_one_warning(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kernels.native.COMPILERS", ())
    with caplog.at_level(logging.WARNING):
        engine = engine_for(tiny_base)
    assert not runs_in_c(engine)
    assert len([record for record in caplog.records if "no C compiler" in record.message]) == 1
    assert len(tokens(run(engine, [request("r", prompts(engine, 1)[0])])["r"])) == 12


def test_which_shapes_run_in_c(tiny_base: Path) -> None:
    spec = engine_for(tiny_base).spec
    assert can_run(spec, torch.float32) and can_run(spec, torch.bfloat16) and not can_run(spec, torch.float16)


def test_auto_dtype_follows_the_processor(tiny_base: Path) -> None:
    from configs import env
    from kernels.native import load

    native: Native | None = load(env.cache_home())
    assert native is not None
    expected = torch.bfloat16 if native.has_bf16_dot else torch.float32
    assert resolve_dtype("auto", CPU, native) == expected
    assert resolve_dtype("auto", CPU, None) == torch.float32
    assert engine_for(tiny_base, dtype="auto")._runner.dtype == expected
