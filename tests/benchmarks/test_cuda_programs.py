"""The programs that need a GPU: complete at toy sizes, and their timed ways walked through with a clock at rest.

The clock is a stand-in, so these tests say nothing about speed and judge no floor of it.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import cold_load, decode_floor, gpu_check, lora_kernels, many_adapters
from benchmarks.cuda import kernel_checks, kernel_times, random_llama, report
from benchmarks.cuda.device import Rates
from benchmarks.cuda.report import Figure, Options

PROGRAMS = {
    module.__name__.rpartition(".")[2]: module
    for module in (lora_kernels, decode_floor, many_adapters, cold_load, kernel_times)
}
RATES = Rates(copy_bytes_per_s=1e12, flops_per_s=1e14, bus_bytes_per_s=5e10)
ONE_MS = 1e-3


@pytest.mark.parametrize("name", [*PROGRAMS, "kernel_checks"])
def test_toy_shapes_keep_their_bounds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = PROGRAMS.get(name, kernel_checks)
    assert module.main(["--toy", "--check", "--out", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["is_toy"] and len(found["figures"]) == len(printed) - 3
    assert any(figure["floor"] is not None for figure in found["figures"]), "nothing was judged"
    assert not any(figure["unit"] in ("us", "ms", "tokens/s") for figure in found["figures"]), "a toy was timed"


def test_gpu_check_gathers_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process each, for only a fresh one can turn the interpreter on; what fails to run is a missed figure."""
    monkeypatch.setattr(gpu_check, "PROGRAMS", ("lora_kernels", "no_such_program"))
    found = list(gpu_check.run_programs(tmp_path, is_quick=True))
    assert [figure.is_good for figure in found] == [True] * 9 + [False]
    assert found[1].name.startswith("lora_kernels: rank 2, 1 adapters")
    assert found[-1].name == "no_such_program: exit status"


def test_a_missed_bound_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    def program(options: Options) -> Iterator[Figure]:
        yield Figure("speed", 0.5, "ratio", 0.7)
        yield Figure("growth", 1.0, "ratio", 1.1, is_ceiling=True)

    assert report.run("A doc.", program, ["--check"], peer="nobody") == 1
    assert report.run("A doc.", program, [], peer="nobody") == 0
    assert [line.endswith("MISSED") for line in capsys.readouterr().out.splitlines()[2:4]] == [True, False]


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what only a GPU can do: events, graphs and rates. Everything else runs."""

    def run_once(work: Callable[[], object], **_: object) -> float:
        work()
        return ONE_MS

    for module in PROGRAMS.values():
        for name, stand_in in (
            ("event_time_s", run_once),
            ("graph_time_s", run_once),
            ("measure_rates", lambda: RATES),
            ("LLAMA_8B", random_llama.TOY),
            ("CudaCapture", lambda device: decode_floor.run_again),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


def timed(module: ModuleType) -> dict[str, Figure]:
    """Run a program's timed way on the CPU; figures by name."""
    options = Options(torch.device("cpu"), is_quick=True, is_toy=False)
    return {figure.name: figure for figure in module.figures(options)}


def test_decode_floor_counts_every_byte_once(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_floor, "BATCH", 2)
    monkeypatch.setattr(decode_floor, "CONTEXT_QUICK", 20)
    found = timed(decode_floor)
    toy = random_llama.TOY
    linears = toy.hidden * (2 * toy.hidden + 2 * toy.kv_heads * toy.head_dim) + 3 * toy.hidden * toy.intermediate
    lora = 16 * (9 * toy.hidden + 2 * toy.kv_heads * toy.head_dim + 3 * toy.intermediate)
    weights = 2 * (toy.layers * linears + toy.vocabulary * toy.hidden)
    keys_and_values = 2 * 2 * toy.layers * 2 * 20 * toy.kv_heads * toy.head_dim
    assert found["base: bytes"].value * 1e9 == pytest.approx(weights + keys_and_values)
    distinct = found["2 distinct r16: bytes"].value * 1e9 - found["base: bytes"].value * 1e9
    assert distinct == pytest.approx(2 * 2 * toy.layers * lora)
    floor_s = (weights + keys_and_values) / RATES.copy_bytes_per_s
    assert found["base: of the byte floor"].value == pytest.approx(floor_s / ONE_MS)
    assert found["base: of the byte floor"].floor == 0.85
    assert found["base step by the engine / bare forward"].value == 1.0


def test_kernel_times_counts_bytes_and_flops(still_clock: None) -> None:
    toy = random_llama.TOY
    shapes = ((2, 5, 12),)
    made = kernel_times.cases(toy, (3,), shapes, dtype=torch.float32, device=torch.device("cpu"))
    found = {figure.name: figure for case in made for figure in kernel_times.timed(case, RATES)}
    for name, num_bytes in {
        "add + rms_norm, 3 tokens": 4 * 4 * 3 * toy.hidden,
        "silu_mul, 3 tokens": 4 * 3 * 3 * toy.intermediate,
        "kv_write, 3 tokens": 2 * 4 * 3 * toy.kv_heads * toy.head_dim,
        "sampling, top_p 0.9, 3 rows": 4 * 3 * toy.vocabulary,
        # 12 tokens fill one block of 16.
        "paged_attention, 2 x 5 rows of 12": 4 * toy.head_dim * (2 * 32 * toy.kv_heads + 2 * 10 * toy.heads),
    }.items():
        assert found[f"{name}: of the roofline"].value == pytest.approx(num_bytes / RATES.copy_bytes_per_s / ONE_MS)
    (case,) = (
        case
        for case in kernel_times.cases(toy, (3,), shapes, dtype=torch.float32, device=torch.device("cpu"))
        if case.flops and case.name.startswith("paged_attention")
    )
    # Row i of 5 sees 8 + i of 12 keys; a product and a sum each for scores and for values.
    assert case.flops == 2 * (8 + 9 + 10 + 11 + 12) * toy.heads * toy.head_dim * 4
    assert found["paged_attention, 2 x 5 rows of 12: gather + torch / ours"].value == 1.0


def test_lora_kernels_measures_and_plots(still_clock: None, tmp_path: Path) -> None:
    case = lora_kernels.Case(9, 8, (2, 4), sizes=(64, (48, 16, 16)), device=torch.device("cpu"))
    points: list[tuple[float, float]] = []
    found = {figure.name.partition(": ")[2]: figure for figure in case.measure(RATES, points)}
    ranks = [(2, 4)[adapter % 2] for adapter in range(8)]
    num_bytes = 4 * (sum(rank * (3 * 64 + 80) for rank in ranks) + 9 * (64 + 2 * 80))
    assert found["of the roofline"].value == pytest.approx(num_bytes / RATES.copy_bytes_per_s / ONE_MS)
    assert (found["of the roofline"].floor, found["torch.bmm / ours"].floor) == (0.70, 3.0)
    lora_kernels.plot(points, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<circle") == 1


def test_many_adapters_and_cold_load_judge_what_they_say(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the engine is real and so are these times; only that every figure is there is asserted."""
    monkeypatch.setattr(many_adapters, "QUICK", many_adapters.SMALL)
    found = timed(many_adapters)
    assert found["zipf: throughput / base"].floor == 0.90
    assert found["zipf: p99 time to first token / base"].floor == 2.0
    assert found["uniform: throughput / base"].floor is None
    monkeypatch.setattr(cold_load, "NUM_STEPS", 24)
    monkeypatch.setattr(cold_load, "NUM_DECODING", 4)
    found = timed(cold_load)
    assert found["cold requests that copied their adapter"].value == 1.0
    assert found["added by the load / bus"].floor == 2.0
    assert found["gap between tokens p99, growth"].floor == 1.10
    assert found["adapter"].value * 1e6 / RATES.bus_bytes_per_s == pytest.approx(
        found["adapter over the bus"].value / 1e3
    )
