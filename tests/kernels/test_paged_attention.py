"""Both bodies of paged attention: scattered blocks, chunks, decode, windows, grouped heads, padding."""

import pytest
import torch

from kernels import reference
from kernels.ops import AttentionRun
from kernels.paged_attention import PagedBatch, paged_attention
from tests.kernels.cases import DTYPES, close, random

BLOCK_SIZE, NUM_BLOCKS = 4, 64
# Per sequence: tokens in all, new rows.
MIXES = {
    "decode": [(7, 1), (1, 1), (70, 1), (33, 1)],
    "prefill": [(5, 5), (1, 1), (37, 37)],
    "mixed": [(9, 3), (70, 1), (20, 20), (6, 1), (80, 67)],
}


def lay_out(mix: list[tuple[int, int]], device: str, *, num_splits: int = 3) -> tuple[PagedBatch, list[AttentionRun]]:
    """Give every sequence blocks in random order; describe the step for the kernel and for the oracle."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist()
    tables = torch.full((len(mix), 24), 10**6, dtype=torch.int32)
    runs, row_starts = [], [0]
    for index, (context_len, num_rows) in enumerate(mix):
        blocks = [free.pop() for _ in range(-(-context_len // BLOCK_SIZE))]
        tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = [blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(context_len)]
        runs.append(AttentionRun(row_starts[-1], num_rows, context_len, 0, torch.tensor(slots)))
        row_starts.append(row_starts[-1] + num_rows)
    batch = PagedBatch(
        tables.to(device),
        torch.tensor([context_len for context_len, _ in mix], dtype=torch.int32, device=device),
        torch.tensor(row_starts, dtype=torch.int32, device=device),
        BLOCK_SIZE,
        has_decode=any(num_rows == 1 for _, num_rows in mix),
        has_chunks=any(num_rows > 1 for _, num_rows in mix),
        num_splits=num_splits,
    )
    return batch, runs


def check(
    mix: str, *, heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype, device: str
) -> None:
    batch, runs = lay_out(MIXES[mix], device)
    num_rows = sum(rows for _, rows in MIXES[mix])
    # Queries are a slice of packed q/k/v; unused slots are NaN, which nobody may read.
    q = random(num_rows, heads + 2, head_dim, dtype=dtype, device=device)[:, :heads]
    keys, values = (
        random(NUM_BLOCKS * BLOCK_SIZE, kv_heads, head_dim, dtype=dtype, seed=seed, device=device) for seed in (1, 2)
    )
    used = torch.cat([run.slots for run in runs if run.slots is not None])
    unused = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    unused[used] = False
    keys[unused.to(device)], values[unused.to(device)] = float("nan"), float("nan")
    expected = reference.paged_attention(q.cpu(), keys.cpu(), values.cpu(), runs=runs, scale=0.3, window=window)
    close(paged_attention(q, keys, values, batch=batch, scale=0.3, window=window).cpu(), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3, 40, 1000])
@pytest.mark.parametrize("mix", MIXES)
def test_mixes_and_windows(mix: str, window: int | None, dtype: torch.dtype, device: str) -> None:
    check(mix, heads=6, kv_heads=2, head_dim=8, window=window, dtype=dtype, device=device)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 20), (7, 1, 8), (20, 1, 4)])
def test_heads(heads: int, kv_heads: int, head_dim: int, device: str) -> None:
    check("mixed", heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=None, dtype=torch.float32, device=device)


def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    """Bit for bit: what else is in the batch changes neither the splits nor their order."""
    batch, _ = lay_out(MIXES["decode"], device)
    q, keys, values = (random(*shape, device=device) for shape in ((4, 4, 8), (256, 2, 8), (256, 2, 8)))
    together = paged_attention(q, keys, values, batch=batch, scale=0.3)
    third = PagedBatch(
        batch.block_tables[2:3],
        batch.context_lens[2:3],
        torch.tensor([0, 1], dtype=torch.int32, device=device),
        BLOCK_SIZE,
        has_decode=True,
        has_chunks=False,
        num_splits=3,
    )
    assert torch.equal(paged_attention(q[2:3], keys, values, batch=third, scale=0.3), together[2:3])


def test_a_sequence_that_pads_the_batch_is_harmless(device: str) -> None:
    """Context 0: nothing is read, and the row comes out as zeros, so what follows stays finite."""
    batch, runs = lay_out([(7, 1), (3, 1)], device)
    batch.context_lens[1] = 0
    q, keys, values = (random(*shape, device=device) for shape in ((2, 4, 8), (256, 2, 8), (256, 2, 8)))
    actual = paged_attention(q, keys, values, batch=batch, scale=0.3)
    expected = reference.paged_attention(q.cpu(), keys.cpu(), values.cpu(), runs=runs[:1], scale=0.3)
    close(actual[0].cpu(), expected[0], torch.float32)
    assert not actual[1].any()


def test_no_rows(device: str) -> None:
    batch, _ = lay_out([(3, 1)], device)
    q, cache = random(0, 2, 8, device=device), random(256, 1, 8, device=device)
    assert paged_attention(q, cache, cache, batch=batch, scale=1.0).shape == (0, 2, 8)
