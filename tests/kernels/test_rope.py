"""RoPE with the cache write, with and without norms over heads."""

import pytest
import torch

from kernels import reference
from kernels.rope import rope_kv_write_
from tests.kernels.cases import DTYPES, close, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_tokens", "heads", "kv_heads", "head_dim"), [(0, 2, 1, 4), (1, 1, 1, 2), (5, 6, 2, 10)])
def test_rope_kv_write(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, has_norm: bool, dtype: torch.dtype, device: str
) -> None:
    qkv = random(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    angles = random(12, head_dim // 2, seed=2, device=device) * 10
    cos, sin = (torch.cat((half, half), -1).to(dtype) for half in (angles.cos(), angles.sin()))
    signed_sin = torch.cat((-sin[:, : head_dim // 2], sin[:, head_dim // 2 :]), -1)
    positions = torch.tensor([3, 11, 0, 0, 7][:num_tokens], dtype=torch.int64, device=device)
    slots = torch.tensor([6, 0, -1, 8, 3][:num_tokens], dtype=torch.int64, device=device)
    norms = [random(head_dim, dtype=dtype, seed=seed, device=device) for seed in (3, 4)] if has_norm else [None, None]
    caches = [random(9, kv_heads, head_dim, dtype=dtype, seed=seed, device=device) for seed in (5, 6)]
    packed = qkv.view(num_tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]
    if has_norm:
        q, k = (reference.rms_norm(x, norm, 1e-5).to(dtype) for x, norm in zip((q, k), norms, strict=True))
    expected_q, expected_k = (reference.rope(x, cos[positions], sin[positions]) for x in (q, k))
    is_real = slots >= 0
    expected_caches = [
        reference.kv_write(cache, new[is_real], slots[is_real])
        for cache, new in zip(caches, (expected_k.to(dtype), v), strict=True)
    ]
    actual = rope_kv_write_(
        qkv,
        *caches,
        cos_PD=cos,
        signed_sin_PD=signed_sin,
        positions_T=positions,
        slot_mapping_T=slots,
        num_heads=heads,
        q_norm=norms[0],
        k_norm=norms[1],
        eps=1e-5,
    )
    close(actual, expected_q, dtype)
    close(caches[0], expected_caches[0], dtype)
    assert torch.equal(caches[1], expected_caches[1])


def test_columns_that_do_not_add_up_are_refused(device: str) -> None:
    cache, table = random(4, 1, 4, device=device), random(4, 4, device=device)
    index = torch.tensor([0], device=device)
    with pytest.raises(ValueError, match="qkv has 12 columns, not 16"):
        rope_kv_write_(
            random(1, 12, device=device),
            cache,
            cache,
            cos_PD=table,
            signed_sin_PD=table,
            positions_T=index,
            slot_mapping_T=index,
            num_heads=2,
        )
