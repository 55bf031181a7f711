"""Every op against its plain fp32 oracle: odd shapes, empty batches, both attention layouts."""

import pytest
import torch

from kernels import ops, reference
from kernels.ops import AttentionPlan, AttentionRun

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (2, 5, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(0, 2, 4), (1, 1, 2), (5, 3, 10)])
def test_rope(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    x = random(tokens, heads + 1, head_dim, dtype=dtype)[:, :heads]  # not contiguous, as a slice of packed q/k/v
    angles = random(tokens, head_dim // 2, seed=2) * 10
    cos, sin = angles.cos(), angles.sin()
    signed_sin = torch.cat((-sin, sin), -1).to(dtype)
    actual = ops.rope(x, torch.cat((cos, cos), -1).to(dtype), signed_sin)
    close(actual, reference.rope(x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (7, 22)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    close(ops.silu_mul(x), reference.silu_mul(x), dtype)


def test_kv_write() -> None:
    cache, new = random(9, 2, 4), random(3, 2, 4, seed=1)
    slots = torch.tensor([8, 0, 5])
    expected = reference.kv_write(cache, new, slots)
    ops.kv_write_(cache, new, slots)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_paged_attention(heads: int, kv_heads: int, window: int | None, dtype: torch.dtype) -> None:
    """Whole prefill, a later chunk, decode from neighbouring slots and decode from scattered ones, in one plan."""
    keys, values = random(40, kv_heads, 8, dtype=dtype, seed=1), random(40, kv_heads, 8, dtype=dtype, seed=2)
    scattered = torch.tensor([39, 3, 17, 5, 21])
    runs = (
        AttentionRun(0, 5, 5, 0),
        AttentionRun(5, 3, 9, 10),
        AttentionRun(8, 1, 7, 20),
        AttentionRun(9, 1, 5, 39, scattered),
        AttentionRun(10, 2, 5, 39, scattered),
        AttentionRun(12, 1, 1, 38),
    )
    q = random(13, heads, 8, dtype=dtype)
    expected = reference.paged_attention(q, keys, values, runs=runs, scale=0.3, window=window)
    actual = ops.paged_attention(q, keys, values, plan=AttentionPlan(runs), scale=0.3, window=window)
    close(actual, expected, dtype)


def test_attention_of_no_rows() -> None:
    cache = random(4, 1, 8)
    assert ops.paged_attention(random(0, 2, 8), cache, cache, plan=AttentionPlan(()), scale=1.0).shape == (0, 2, 8)
