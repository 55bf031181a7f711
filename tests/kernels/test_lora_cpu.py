"""LoRA in C against the plain oracle; the same bits at any number of threads, alone and in a batch."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from kernels import reference
from kernels.lora import MODULES, LoraPool, lora_add_
from kernels.native import Native
from kernels.segments import BASE_ROW, build_step

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 4e-2}
CPU = torch.device("cpu")
NUM_LAYERS, LAYER = 3, 1
GROUPS = {"qkv": range(0, 3), "o": range(3, 4), "gate_up": range(4, 6), "down": range(6, 7)}
# Input size, output size per module: below one vector, not a multiple of one (and wider than one item), SmolLM's own.
SHAPES = {
    "tiny": (5, (3, 7, 1, 4, 2, 9, 6)),
    "odd": (83, (17, 70, 33, 65, 260, 19, 515)),
    "smollm": (576, (576, 192, 192, 576, 1536, 1536, 576)),
}
RANKS = (1, 2, 3, 4, 5, 8, 16, 17, 24, 32, 64, 7)
NUM_ADAPTERS = len(RANKS)
POPULARITY = {
    "none": [],
    "base only": [(BASE_ROW, 5)],
    "one": [(4, 70)],
    "one row": [(6, 1)],
    "distinct": [(row, 1) for row in range(NUM_ADAPTERS)],
    "uniform": [(row, 3) for row in reversed(range(NUM_ADAPTERS))],
    "zipf with base": [(BASE_ROW, 2), (10, 9), (0, 5), (7, 4), (3, 2), (9, 1), (BASE_ROW, 1), (1, 1)],
    "prefill beside decode": [(6, 130), (2, 1), (8, 1), (11, 66)],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_pool(shape: str, dtype: torch.dtype) -> LoraPool:
    """Adapters of `RANKS`, shifted by module; every fifth (adapter, module) is absent; unused numbers are NaN."""
    in_size, out_sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    table = torch.zeros(NUM_ADAPTERS, NUM_LAYERS, len(MODULES), 3, dtype=torch.int64)
    parts: list[torch.Tensor] = [torch.full((7,), float("nan"))]
    end = 7
    for row in range(NUM_ADAPTERS):
        for module, out_size in enumerate(out_sizes):
            rank = 0 if (row * 7 + module) % 5 == 4 else RANKS[(row + module) % NUM_ADAPTERS]
            if not rank:
                continue
            a = torch.randn(rank, in_size, generator=generator) / in_size**0.5
            b = torch.randn(rank, out_size, generator=generator) / rank**0.5
            table[row, LAYER, module] = torch.tensor([end, end + a.numel(), rank])
            parts += [a.flatten(), b.flatten()]
            end += a.numel() + b.numel()
    return LoraPool(torch.cat(parts).to(dtype), table, table)


def case(shape: str, group: str, popularity: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return y, x and the other arguments but the pool."""
    in_size, out_sizes = SHAPES[shape]
    modules, runs = GROUPS[group], POPULARITY[popularity]
    bounds = (0, *accumulate(out_sizes[module] for module in modules))
    generator = torch.Generator().manual_seed(1)
    num_tokens = sum(count for _, count in runs)
    x = torch.randn(num_tokens, in_size, generator=generator).to(dtype)
    y = torch.randn(num_tokens, bounds[-1], generator=generator).to(dtype)
    step = build_step(runs, device=CPU)
    return y, x, {"step": step, "layer": LAYER, "modules": modules, "out_bounds": bounds}


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_against_the_oracle(shape: str, popularity: str, model_dtype: str, adapter_dtype: str, native: Native) -> None:
    dtype = getattr(torch, model_dtype)
    pool = random_pool(shape, getattr(torch, adapter_dtype))
    for group in GROUPS:
        y, x, call = case(shape, group, popularity, dtype)
        expected = reference.lora_add(y, x, pool=pool, **call)
        before = y.clone()
        lora_add_(y, x, pool=replace(pool, native=native), **call)
        torch.testing.assert_close(y.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        for token, row in enumerate(call["step"].adapter_rows.tolist()):
            for module, start, end in zip(call["modules"], call["out_bounds"], call["out_bounds"][1:], strict=False):
                if row == BASE_ROW or not pool.table[row, LAYER, module, 2]:
                    assert torch.equal(y[token, start:end], before[token, start:end])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", GROUPS)
def test_smollm_shapes_against_the_torch_body(group: str, dtype: str, native: Native) -> None:
    pool = random_pool("smollm", torch.float32)
    y, x, call = case("smollm", group, "zipf with base", getattr(torch, dtype))
    expected = y.clone()
    lora_add_(expected, x, pool=pool, **call)
    lora_add_(y, x, pool=replace(pool, native=native), **call)
    torch.testing.assert_close(y, expected, atol=TOLERANCE[y.dtype], rtol=TOLERANCE[y.dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("popularity", ["one", "distinct", "prefill beside decode"])
@pytest.mark.parametrize("group", ["qkv", "down"])
def test_threads_do_not_change_a_bit(group: str, popularity: str, dtype: str, native: Native) -> None:
    pool = replace(random_pool("odd", torch.float32), native=native)
    y, x, call = case("odd", group, popularity, getattr(torch, dtype))
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(y.clone())
        lora_add_(results[-1], x, pool=pool, **call)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_alone_has_the_bits_it_has_in_a_batch(dtype: str, native: Native) -> None:
    pool = replace(random_pool("odd", torch.float32), native=native)
    y, x, call = case("odd", "gate_up", "prefill beside decode", getattr(torch, dtype))
    together = y.clone()
    lora_add_(together, x, pool=pool, **call)
    for token, row in enumerate(call["step"].adapter_rows.tolist()):
        alone = y[token : token + 1].clone()
        lora_add_(alone, x[token : token + 1], pool=pool, **{**call, "step": build_step([(row, 1)], device=CPU)})
        assert torch.equal(alone[0], together[token])
