"""The forward over the Triton kernels, and graphs of its decode step that replay under other adapters and batches.

Without a GPU the kernels run in the interpreter, and a recorded step is run again from its buffers, which is what a
CUDA graph does: what is stale in the buffers is stale in the answers.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve_apps.engine.engine import Engine
from serve_apps.engine.graphs import Captured, CudaCapture, buckets_up_to
from tests.serve_apps.engine.engine_cases import Oracle, engine_for, ref, request, run, tokens


class Recorder:
    """Records like a CUDA graph: `compute` sees its arguments once, and every replay writes the same tensor."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Captured:
        logits = compute()

        def replay() -> None:
            self.num_replays += 1
            logits.copy_(compute())

        return Captured(replay, logits)


def triton_engine(base: Path, *, max_batch: int | None = None) -> tuple[Engine, Recorder]:
    """An engine whose forward is the GPU's; with `max_batch`, decode steps come from recordings."""
    engine = engine_for(base, native_kernels=False, adapter_dtype="float32")
    engine._runner.model.cuda_forward = engine._runner.model.build_cuda_forward()
    recorder = Recorder()
    if max_batch is not None:
        engine._runner.graphs = engine._runner.build_graphs(recorder, max_batch=max_batch)
    return engine, recorder


@pytest.mark.parametrize("max_batch", [None, 3])
def test_mixed_adapters_equal_peft(
    max_batch: int | None, tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle
) -> None:
    """Requests join and leave between replays, so adapter sets, batch sizes and padding all change."""
    engine, recorder = triton_engine(tiny_base, max_batch=max_batch)
    rows = [None, *strong_adapters.values()]
    requests = [
        request(f"r{index}", range(3 + index, 9 + 2 * index), path and ref(path), max_tokens=5 - index)
        for index, path in enumerate(rows)
    ]
    outputs = run(engine, requests[:3])
    outputs |= run(engine, requests[3:])
    for item, path in zip(requests, rows, strict=True):
        oracle.explain(list(item.prompt_token_ids), tokens(outputs[item.request_id]), path)
    if max_batch is not None:
        assert engine._runner.graphs is not None
        assert recorder.num_replays > engine._runner.graphs.num_captured, "no recording was used twice"


def test_a_step_with_prefill_is_not_replayed(tiny_base: Path) -> None:
    engine, recorder = triton_engine(tiny_base, max_batch=4)
    engine.add(request("r0", range(5, 12), max_tokens=1))
    engine.step()
    assert recorder.num_replays == 0


def test_a_batch_beyond_the_largest_bucket_runs_without(tiny_base: Path) -> None:
    engine, recorder = triton_engine(tiny_base, max_batch=1)
    outputs = run(engine, [request(f"r{index}", [5, 6 + index], max_tokens=2) for index in range(2)])
    assert recorder.num_replays == 0
    assert all(len(tokens(each)) == 2 for each in outputs.values())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("operation failed due to a previous error")]
)
def test_a_bucket_that_cannot_be_captured_is_left_out(error: Exception, tiny_base: Path) -> None:
    """Out of memory while capturing costs the graph, not the request; it is tried once."""
    engine, _ = triton_engine(tiny_base)
    num_tries = 0

    def refuse(compute: Callable[[], Tensor]) -> Captured:
        nonlocal num_tries
        num_tries += 1
        raise error

    graphs = engine._runner.graphs = engine._runner.build_graphs(refuse, max_batch=2)
    outputs = run(engine, [request("r0", [5, 6, 7], max_tokens=3)])
    assert len(tokens(outputs["r0"])) == 3
    assert (graphs.num_captured, num_tries) == (0, 1)


def test_a_step_brings_the_device_no_list_per_sequence(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a found prefix are no neighbours; a list of slots for each such sequence would wait for the device."""
    engine, _ = triton_engine(tiny_base)
    monkeypatch.setattr("serve_apps.engine.batch._attention_run", None)
    shared = list(range(5, 17))
    outputs = run(engine, [request("first", [*shared, 20], max_tokens=2)])
    outputs |= run(engine, [request("second", [*shared, 30, 31], max_tokens=2)])
    assert engine.stats()["prefix_hit_tokens"] == 12
    assert [len(tokens(rows)) for rows in outputs.values()] == [2, 2]


def test_buckets() -> None:
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(16) == (1, 2, 4, 8, 16)
    assert buckets_up_to(100) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graphs_equal_peft(tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle) -> None:
    """The same traffic on the device, every bucket captured by CUDA."""
    engine = engine_for(tiny_base, device="cuda")
    graphs = engine._runner.graphs
    assert graphs is not None and isinstance(graphs._capture, CudaCapture)
    graphs.capture_all()
    rows = [None, *strong_adapters.values()] * 2
    requests = [request(f"r{i}", range(3 + i, 9 + 2 * i), path and ref(path)) for i, path in enumerate(rows)]
    outputs = run(engine, requests[:4]) | run(engine, requests[4:])
    for item, path in zip(requests, rows, strict=True):
        oracle.explain(list(item.prompt_token_ids), tokens(outputs[item.request_id]), path)
