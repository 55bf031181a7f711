"""Shrink and expand against the fp32 oracle: every popularity, mixed and missing ranks, any order of tokens."""

import mmap

import pytest
import torch

from kernels import lora, reference
from kernels.lora import LoraPool, LoraStep
from kernels.lora_triton import linear_with_lora, lora_add_triton_, with_work
from kernels.lora_work import Tiling, allocate_work
from tests.kernels.lora_cases import GROUPS, IN_SIZE, POPULARITY, random, random_pool, step_of

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Small blocks, so that toy shapes have several splits of k, several rank blocks and several column blocks.
SMALL = Tiling(tile_rows=16, max_splits=3, rank_block=16, k_block=16, column_block=16)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def add(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, step: LoraStep, group: str, layer: int = 1) -> torch.Tensor:
    """Run the kernels on a copy of y."""
    first, sizes = GROUPS[group]
    out = y.clone()
    modules, bounds = range(first, first + len(sizes)), bounds_of(group)
    lora_add_triton_(out, x, pool=pool, step=step, layer=layer, modules=modules, out_bounds=bounds)
    return out


def expect(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, step: LoraStep, group: str) -> torch.Tensor:
    first, sizes = GROUPS[group]
    return reference.lora_add(
        y,
        x,
        pool=pool,
        step=step,
        layer=1,
        modules=range(first, first + len(sizes)),
        out_bounds=bounds_of(group),
    )


def bounds_of(group: str) -> list[int]:
    sizes = GROUPS[group][1]
    return [sum(sizes[:count]) for count in range(len(sizes) + 1)]


@pytest.mark.parametrize(
    ("popularity", "group"),
    [*((law, "qkv") for law in POPULARITY), *(("zipf with base", group) for group in list(GROUPS)[1:])],
)
def test_every_group_and_popularity(popularity: str, group: str, device: str) -> None:
    pool = random_pool(dtype=torch.float32, device=device)
    step = step_of(POPULARITY[popularity], device)
    num_tokens = len(POPULARITY[popularity])
    x = random(num_tokens, IN_SIZE, device=device)
    y = random(num_tokens, bounds_of(group)[-1], seed=1, device=device)
    work = allocate_work(num_tokens, device=x.device, tiling=SMALL)
    actual = add(y, x, pool, with_work(step, work), group)
    close(actual, expect(y, x, pool, step, group), torch.float32)
    assert torch.equal(actual[step.adapter_rows < 0], y[step.adapter_rows < 0]), "a base row was touched"


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_every_pair_of_dtypes(dtype: torch.dtype, pool_dtype: torch.dtype, device: str) -> None:
    pool = random_pool(dtype=pool_dtype, device=device)
    step = step_of(POPULARITY["zipf with base"], device)
    x = random(step.adapter_rows.shape[0], IN_SIZE, dtype=dtype, device=device)
    y = random(step.adapter_rows.shape[0], 40, dtype=dtype, seed=1, device=device)
    close(add(y, x, pool, step, "qkv"), expect(y, x, pool, step, "qkv"), dtype)


def test_equals_the_cpu_op(device: str) -> None:
    """The op's two bodies are one op."""
    rows = [-1, 2, 2, 4, 4, 4, 4, 4, 4, 0]
    pool, step = random_pool(dtype=torch.float32, device=device), step_of(rows, device)
    host = LoraPool(pool.data.cpu(), pool.host_table, pool.host_table)
    x, y = random(len(rows), IN_SIZE), random(len(rows), 66, seed=1)
    actual = add(y.to(device), x.to(device), pool, step, "gate_up")
    lora.lora_add_(
        y, x, pool=host, step=step_of(rows, "cpu"), layer=1, modules=range(4, 6), out_bounds=bounds_of("gate_up")
    )
    close(actual.cpu(), y, torch.float32)


@pytest.mark.parametrize(("rank", "num_tokens"), [(1, 5), (17, 2), (512, 1), (512, 5)])
def test_ranks_up_to_the_largest(rank: int, num_tokens: int, device: str) -> None:
    """Both bodies, at ranks under, over and far over a block."""
    pool = random_pool(dtype=torch.float32, device=device, ranks=((rank,) * 7,))
    step = step_of([0] * num_tokens, device)
    x, y = random(num_tokens, IN_SIZE, device=device), random(num_tokens, 21, seed=1, device=device)
    torch.testing.assert_close(add(y, x, pool, step, "o"), expect(y, x, pool, step, "o"), atol=2e-4, rtol=2e-4)


def test_work_list_of_tokens_in_any_order(device: str) -> None:
    """Sorted stably by adapter; tiles are runs of one adapter, cut every `tile_rows`; base rows lie in none."""
    rows = [3, -1, 3, 0, 3, *([7] * 35), 0, -1]
    work = with_work(step_of(rows, device), allocate_work(len(rows), device=torch.device(device), tiling=SMALL)).work
    assert work is not None
    assert work.order.tolist() == sorted(range(len(rows)), key=lambda token: (rows[token], token))
    assert work.sorted_rows.tolist() == sorted(rows)
    assert work.num_tiles.item() == 1 + 1 + 3
    assert work.tile_starts[:5].tolist() == [2, 4, 7, 23, 39]


def test_work_list_longer_than_one_block(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 9, (1300,), generator=generator).tolist()
    work = with_work(step_of(rows, device)).work
    assert work is not None
    assert work.sorted_rows.tolist() == sorted(rows)
    starts = work.tile_starts[: work.num_tiles.item()].tolist()
    lengths = {row: rows.count(row) for row in range(9)}
    assert len(starts) == sum(-(-length // work.tiling.tile_rows) for length in lengths.values())
    assert starts == sorted(starts) and all(sorted(rows)[start] >= 0 for start in starts)


def test_same_launches_serve_other_adapters(device: str) -> None:
    """What a CUDA graph does: fixed buffers, new rows in them, the list built again; stale metadata would show."""
    pool = random_pool(dtype=torch.float32, device=device)
    buffer = torch.empty(24, dtype=torch.int32, device=device)
    work = allocate_work(24, device=buffer.device, tiling=SMALL)
    x, y = random(24, IN_SIZE, device=device), random(24, 40, seed=1, device=device)
    for rows in ([4] * 24, list(range(6)) * 4, [-1] * 24, [-1, 5] * 12):
        buffer.copy_(torch.tensor(rows, dtype=torch.int32))
        step = LoraStep(buffer, torch.empty(0, 3, dtype=torch.int32))
        close(add(y, x, pool, with_work(step, work), "qkv"), expect(y, x, pool, step, "qkv"), torch.float32)


def test_the_same_step_gives_the_same_bits(device: str) -> None:
    """Split-k without atomics: a second run is not merely close."""
    pool, step = random_pool(dtype=torch.float32, device=device), step_of(POPULARITY["uniform"], device)
    x, y = random(24, IN_SIZE, device=device), random(24, 40, seed=1, device=device)
    assert torch.equal(add(y, x, pool, step, "qkv"), add(y, x, pool, step, "qkv"))


def test_aligned_pool(device: str) -> None:
    """A promise of alignment changes how loads are issued, never what they read."""
    pool = random_pool(dtype=torch.float32, device=device)
    shifted = LoraPool(
        torch.cat((pool.data.new_full((3,), float("nan")), pool.data)),
        pool.table + torch.tensor([3, 3, 0], device=device),
        pool.host_table + torch.tensor([3, 3, 0]),
        alignment=8,
    )
    rows = [0, 1, 1, 1, 1, 1, 0, 4]
    assert all(offset % 8 == 0 for row in rows for offset, *_ in shifted.host_table[row, :, 0].tolist())
    step, x, y = step_of(rows, device), random(8, IN_SIZE, device=device), random(8, 40, seed=1, device=device)
    close(add(y, x, shifted, step, "qkv"), expect(y, x, pool, step, "qkv"), torch.float32)


def test_linear_with_lora(device: str) -> None:
    """Base product and LoRA together, the shrink on a side stream where there are streams."""
    pool, step = random_pool(dtype=torch.float32, device=device), with_work(step_of([2, -1, 4, 4], device))
    x, weight = random(4, IN_SIZE, device=device), random(IN_SIZE, 21, seed=3, device=device)
    side = torch.cuda.Stream() if device == "cuda" else None
    actual = linear_with_lora(
        lambda x: x @ weight, x, pool=pool, step=step, layer=1, modules=range(3, 4), out_bounds=[0, 21], side=side
    )
    close(actual, expect(x @ weight, x, pool, step, "o"), torch.float32)


def test_work_of_another_size_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="allocated for 3 tokens, the step has 4"):
        with_work(step_of([0] * 4, device), allocate_work(3, device=torch.device(device)))


def test_bounds_beyond_y_are_refused(device: str) -> None:
    """The kernel would write behind y."""
    pool, step = random_pool(dtype=torch.float32, device=device), step_of([0] * 4, device)
    with pytest.raises(ValueError, match="end at column 40, y has 21"):
        add(random(4, 21, device=device), random(4, IN_SIZE, device=device), pool, step, "qkv")


def test_offsets_beyond_32_bits(device: str) -> None:
    """2,000 adapters of 14 MB are 14 billion bf16 numbers in one buffer; here one adapter set lies behind 2^31 of them.

    On the CPU only the pages that are touched exist.
    """
    near, far = random_pool(dtype=torch.bfloat16, device=device), 2**31 + 8
    num_elements = far + near.data.numel()
    if device == "cpu":
        region = mmap.mmap(-1, 2 * num_elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(region, dtype=torch.bfloat16)
        # The interpreter copies a tensor's storage back onto itself: give it the first numbers only.
        data = torch.frombuffer(region, dtype=torch.bfloat16, count=8)
    else:
        data = whole = torch.empty(num_elements, dtype=torch.bfloat16, device=device)
    whole[far:] = near.data
    table = near.table.clone()
    table[..., :2] += far * (table[..., 2:] > 0)
    step = step_of(POPULARITY["zipf with base"], device)
    x = random(len(step.adapter_rows), IN_SIZE, device=device)
    y = random(len(step.adapter_rows), bounds_of("qkv")[-1], seed=1, device=device)
    actual = add(y, x, LoraPool(data, table, table.cpu(), alignment=near.alignment), step, "qkv")
    assert torch.equal(actual, add(y, x, near, step, "qkv"))
    close(actual, expect(y, x, near, step, "qkv"), torch.bfloat16)
