"""Writes new keys or values of a step into their slots of the paged cache."""

import triton
import triton.language as tl
from torch import Tensor


def kv_write_(cache_SGD: Tensor, new_TGD: Tensor, slot_mapping_T: Tensor) -> None:
    """Semantics: cache[slot_mapping[t]] = new[t] in place, for every t whose slot is not negative; slots are distinct.

    cache: [S, G, D] contiguous; new: [T, G, D], its last two axes contiguous (a slice of packed heads will do), same
    dtype; slot_mapping: int64 [T]. A negative slot marks a row that pads a CUDA graph's batch.
    """
    num_tokens, num_heads, head_dim = new_TGD.shape
    if not num_tokens:
        return
    if new_TGD.stride(2) != 1 or new_TGD.stride(1) != head_dim or not cache_SGD.is_contiguous():
        raise ValueError("heads of a token must lie one after the other, and the cache must be contiguous")
    size = num_heads * head_dim
    _kv_write[(num_tokens,)](
        cache_SGD, new_TGD, slot_mapping_T, new_TGD.stride(0), size, BLOCK=triton.next_power_of_2(size)
    )


@triton.jit
def _kv_write(
    cache: tl.tensor,
    new: tl.tensor,
    slot_mapping: tl.tensor,
    token_stride: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    column = tl.arange(0, BLOCK)
    is_column = (column < size) & (slot >= 0)
    value = tl.load(new + token * token_stride + column, mask=is_column, other=0)
    tl.store(cache + slot * size + column, value, mask=is_column)
