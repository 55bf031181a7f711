"""The CPU serving benchmark at toy size: every figure comes out, the floor adds up, --check judges."""

import json
from pathlib import Path

import pytest

from benchmarks import serving_cpu
from benchmarks.serving_cpu import Rates, floor_s
from benchmarks.serving_peers import Load, save_base
from serve_apps.engine.architecture import read_spec


def test_toy_run_prints_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--model", "toy", "--dtype", "float32", "--dtype", "bfloat16", "--threads", "1"]
    assert serving_cpu.main([*arguments, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert "peft" in result["peers"] and "1 threads" in result["hardware"]
    judged = [figure["name"] for figure in result["figures"] if figure["floor"] is not None]
    for dtype in ("float32", "bfloat16"):
        assert [name for name in judged if f"toy {dtype}" in name] == [
            f"toy {dtype}: base / transformers",
            f"toy {dtype}: one shared adapter / base",
            f"toy {dtype}: 4 distinct / base",
            f"toy {dtype}: base, of its floor",
            f"toy {dtype}: one adapter, of its floor",
            f"toy {dtype}: distinct, of its floor",
            f"toy {dtype}: distinct / PEFT mixed batch",
        ]
    assert all(figure["value"] > 0 for figure in result["figures"])


def test_check_fails_on_a_missed_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serving_cpu, "measure", lambda *_, **__: iter([serving_cpu.Figure("slow", 0.5, "x", floor=0.9)])
    )
    arguments = ["--model", "toy", "--dtype", "float32", "--threads", "1"]
    assert serving_cpu.main(arguments) == 0
    assert serving_cpu.main([*arguments, "--check"]) == 1


def test_floor_of_one_token_by_hand(tmp_path: Path) -> None:
    """Toy: per layer 32x32 q and o, 16x32 k and v, 48x32 gate and up, 32x48 down; 2 layers; vocabulary 256."""
    spec = read_spec(save_base("toy", tmp_path / "toy"))
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    head, load = 256 * 32, Load(batch=2, num_in=3, num_out=1)
    by_flops = Rates({"float32": 1.0}, copy=float("inf"))
    assert floor_s(spec, load, by_flops, dtype="float32", ranks=[]) == 2 * (6 * weights + 2 * head)
    rank_row = 2 * (2 * 64 + 2 * 48 + 3 * 80)
    with_lora = floor_s(spec, load, by_flops, dtype="float32", ranks=[1, 3])
    assert with_lora == 2 * (6 * weights + 2 * head) + 2 * 6 * rank_row * 2
    by_bytes = Rates({"float32": float("inf")}, copy=1.0)
    assert floor_s(spec, load, by_bytes, dtype="float32", ranks=[1, 3]) == 4 * (weights + head) + 4 * rank_row * 4


def test_every_turn_computes_its_prompts(tmp_path: Path) -> None:
    """Peers do, and all turns have the same prompts: a prefix found again would be work left out."""
    load = Load(batch=2, num_in=40, num_out=2)
    engine = serving_cpu._engine(save_base("toy", tmp_path / "toy"), "float32", load)
    for _ in range(2):
        serving_cpu.serve_s(engine, load, [])
    assert engine.stats()["num_prefill_tokens"] == 2 * 2 * 40
