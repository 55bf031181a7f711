"""Attention, RoPE, norms and SiLU in C against the plain oracles."""

import pytest
import torch

from kernels import ops_cpu, reference
from kernels.native import Native
from kernels.ops import AttentionRun
from kernels.ops_cpu import Heads, run_table

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (5, 64), (2, 576)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, any_native: Native) -> None:
    x, delta, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[1], dtype=dtype)
    close(ops_cpu.add_rms_norm(x, weight, 1e-5, native=any_native), reference.rms_norm(x, weight, 1e-5), dtype)
    total = x + delta
    normed = ops_cpu.add_rms_norm(x, weight, 1e-5, native=any_native, delta=delta)
    assert torch.equal(x, total)
    close(normed, reference.rms_norm(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (7, 22), (3, 128)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, any_native: Native) -> None:
    x = random(*shape, dtype=dtype) * 3
    close(ops_cpu.silu_mul(x, native=any_native), reference.silu_mul(x), dtype)


def test_silu_of_extremes(any_native: Native) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, float("nan")])
    actual = ops_cpu.silu_mul(torch.cat((gate, torch.ones(8))).repeat(1, 1).view(1, 16), native=any_native)[0]
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(0, 2, 1, 16), (1, 1, 1, 48), (5, 6, 2, 64)])
def test_rope_kv(
    tokens: int, heads: int, kv_heads: int, head_dim: int, with_norm: bool, dtype: torch.dtype, any_native: Native
) -> None:
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    keys, values = (
        random(9, kv_heads, head_dim, dtype=dtype, seed=1),
        random(9, kv_heads, head_dim, dtype=dtype, seed=2),
    )
    angles = random(20, head_dim // 2, seed=3) * 10
    positions, slots = torch.tensor([19, 0, 7, 7, 3])[:tokens], torch.tensor([8, 0, 5, 2, 1])[:tokens]
    norms = (random(head_dim, dtype=dtype, seed=4), random(head_dim, dtype=dtype, seed=5)) if with_norm else None
    split = qkv.clone().view(tokens, heads + 2 * kv_heads, head_dim)
    parts = [split[:, :heads], split[:, heads : heads + kv_heads]]
    if norms:
        parts = [reference.rms_norm(part, weight, 1e-6) for part, weight in zip(parts, norms, strict=True)]
    cos, sin = (torch.cat((part, part), -1)[positions] for part in (angles.cos(), angles.sin()))
    q, k = (reference.rope(part, cos, sin) for part in parts)
    expected_keys = reference.kv_write(keys.float(), k, slots)
    expected_values = reference.kv_write(values, split[:, heads + kv_heads :], slots)
    ops_cpu.rope_kv_(
        qkv,
        keys,
        values,
        native=any_native,
        heads=Heads(heads, kv_heads, head_dim),
        cos_PD=angles.cos(),
        sin_PD=angles.sin(),
        positions=positions,
        slot_mapping=slots,
        norms=norms,
        eps=1e-6,
    )
    close(qkv.view(tokens, heads + 2 * kv_heads, head_dim)[:, :heads], q, dtype)
    close(keys, expected_keys, dtype)
    assert torch.equal(values, expected_values)


RUNS = (
    AttentionRun(0, 5, 5, 0),
    AttentionRun(5, 3, 9, 10),
    AttentionRun(8, 1, 37, 3),
    AttentionRun(9, 1, 5, 39, torch.tensor([39, 3, 17, 5, 21])),
    AttentionRun(10, 2, 5, 39, torch.tensor([39, 3, 17, 5, 21])),
    AttentionRun(12, 1, 1, 38),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 64), (11, 1, 32), (2, 1, 112)])
def test_attention(
    heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype, any_native: Native
) -> None:
    """Whole prefill, a later chunk, decode from neighbouring and from scattered slots; sharing beyond one pass."""
    keys, values = (random(40, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    qkv = random(13, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q = qkv.view(13, -1, head_dim)[:, :heads]
    expected = reference.paged_attention(q, keys, values, runs=RUNS, scale=0.1, window=window)
    call = {"native": any_native, "heads": Heads(heads, kv_heads, head_dim), "scale": 0.1, "window": window}
    actual = ops_cpu.attention(qkv, keys, values, runs=run_table(RUNS), **call)
    close(actual.view(13, heads, head_dim), expected, dtype)
    last = AttentionRun(0, 1, 9, 10)
    alone = ops_cpu.attention(qkv[7:8], keys, values, runs=run_table([last]), **call)
    assert torch.equal(alone[0], actual[7])


def test_attention_of_no_rows(any_native: Native) -> None:
    cache = random(4, 1, 16)
    heads = Heads(2, 1, 16)
    out = ops_cpu.attention(random(0, 64), cache, cache, native=any_native, heads=heads, runs=run_table([]), scale=1.0)
    assert out.shape == (0, 32)
