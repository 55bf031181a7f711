"""The forward over the C kernels against transformers and against the forward over torch; what decides between them."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kernels.native import Native
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
