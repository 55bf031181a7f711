"""Cold adapters beside running requests, through the whole engine: nobody waits for another's disk."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_apps.engine.adapter import WEIGHTS_FILE
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import AdapterTooLarge
from serve_apps.engine.packed_adapter import PackedAdapter
from tests.serve_apps.engine.engine_cases import Oracle, engine_for, prompts, ref, request, run, tokens


class Gate:
    """Holds every read of an engine back until it is opened."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        host: Any = engine.pool._host
        read = host._read

        def gated(adapter: AdapterRef) -> PackedAdapter:
            assert self.open.wait(30)
            return read(adapter)

        monkeypatch.setattr(host, "_read", gated)


def test_others_finish_while_an_adapter_is_read(
    tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = engine_for(tiny_base), strong_adapters["strong-r8-all"]
    gate = Gate(engine, monkeypatch)
    asked = prompts(engine, 3)
    engine.add(request("cold", asked[0], ref(folder)))
    engine.add(request("base", asked[1]))
    finished: list[str] = []
    while "base" not in finished:
        finished += [output.request_id for output in engine.step() if output.finished]
        engine.check_integrity()
    assert finished == ["base"] and engine.stats()["adapters_loading"] == 1
    gate.open.set()
    outputs = run(engine)
    oracle.explain(asked[0], tokens(outputs["cold"]), folder)


def test_an_abort_during_the_read_frees_the_request_and_the_adapter_serves_the_next(
    tiny_base: Path, strong_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = engine_for(tiny_base), ref(strong_adapters["strong-r8-all"])
    gate = Gate(engine, monkeypatch)
    prompt = prompts(engine, 1)[0]
    engine.add(request("gone", prompt, adapter))
    assert engine.step() == []
    last = engine.abort("gone")
    assert last is not None and last.finish_reason == "abort" and last.adapter_digest is None
    assert not engine.has_unfinished
    engine.add(request("next", prompt, adapter))
    gate.open.set()
    assert run(engine)["next"][-1].finish_reason == "length"
    assert engine.stats()["adapter_reads"] == 1


def test_what_only_the_whole_file_tells_ends_the_request_with_an_error(
    tiny_base: Path, strong_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A NaN: the head of the file is sound, so the request is taken, and fails alone; nothing is evicted."""
    engine = engine_for(tiny_base)
    prompt, sound = prompts(engine, 1)[0], ref(strong_adapters["strong-r1-qv"])
    engine.load(sound)
    for name in ("adapter_config.json", WEIGHTS_FILE):
        (tmp_path / name).write_bytes((strong_adapters["strong-r8-all"] / name).read_bytes())
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    outputs = run(engine, [request("bad", prompt, ref(tmp_path)), request("good", prompt, sound)])
    assert outputs["bad"][-1].finish_reason == "error" and name in str(outputs["bad"][-1].error)
    assert outputs["good"][-1].finish_reason == "length"
    assert engine.stats()["adapter_evictions"] == 0


def test_an_adapter_too_large_is_refused_at_once(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    engine = engine_for(tiny_base, adapter_cache_bytes=5000)
    with pytest.raises(AdapterTooLarge, match="adapter_cache_bytes=5000"):
        engine.add(request("r", [5, 6], ref(strong_adapters["strong-r8-all"])))
    with pytest.raises(AdapterTooLarge, match="adapter_cache_bytes=5000"):
        engine.prefetch(ref(strong_adapters["strong-r8-all"]))
    assert not engine.has_unfinished


def test_weights_that_overflow_a_narrow_dtype_are_refused(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    """B times its scaling, beyond what float16 holds; float32 serves it."""
    folder = strong_adapters["strong-r1-qv"]
    tensors = load_file(folder / WEIGHTS_FILE)
    large = {name: tensor * (60000 if "lora_B" in name else 1) for name, tensor in tensors.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in large.values())
    copy = folder.parent / "large"
    copy.mkdir(exist_ok=True)
    (copy / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(large, copy / WEIGHTS_FILE)
    engine = engine_for(tiny_base, adapter_dtype="float16")
    last = run(engine, [request("r", [5, 6], ref(copy))])["r"][-1]
    assert last.finish_reason == "error" and "wider adapter_dtype" in str(last.error)
    engine_for(tiny_base).prefetch(ref(copy))
