"""A LoRA factor's gradient of each example, its long side projected on the way, in one launch.

The gradient of an example is a sum of outer products over its tokens; projected, it is small (rank x basis) while the
tokens' long sides are not. A program walks one example's tokens, projects a tile of them and adds the outer products,
so that neither the projected tokens nor the whole gradient is ever written. Tokens are split over programs by a fixed
rule; each split writes its own sums and torch adds them in order: no atomics, one result.

Source: per-example LoRA gradients projected side by side, LoGra https://arxiv.org/abs/2405.13954.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.devices import multiplies_natively

TOKEN_BLOCK, LONG_BLOCK, BASIS_BLOCK = 32, 64, 32
SPLIT_TOKENS = 256


def lora_gradient_triton(short_NTR: Tensor, long_NTL: Tensor, basis_LB: Tensor) -> Tensor:
    """Semantics: out[n] = sum over t of short[n, t]^T (long[n, t] @ basis), in fp32.

    short: [N, T, R], long: [N, T, L], any float dtype; basis: float32 [L, B]. Returns float32 [N, R, B]. The basis is
    rounded to the dtype of 16-bit rows, so that both meet the tensor cores as they are.
    """
    num, tokens, rank = short_NTR.shape
    length, width = basis_LB.shape
    num_splits = max(1, triton.cdiv(tokens, SPLIT_TOKENS))
    sums = torch.zeros(num_splits, num, rank, width, dtype=torch.float32, device=long_NTL.device)
    if num and tokens:
        basis = basis_LB.to(long_NTL.dtype) if long_NTL.dtype.itemsize == 2 else basis_LB
        _lora_gradient[(num, triton.cdiv(width, BASIS_BLOCK), num_splits)](
            short_NTR.contiguous(),
            long_NTL.contiguous(),
            basis.contiguous(),
            sums,
            tokens,
            rank,
            length,
            width,
            num,
            IN_FP32=not multiplies_natively(long_NTL, basis),
            SPLIT_TOKENS=SPLIT_TOKENS,
            RANK_BLOCK=max(16, triton.next_power_of_2(rank)),
            TOKEN_BLOCK=TOKEN_BLOCK,
            LONG_BLOCK=LONG_BLOCK,
            BASIS_BLOCK=BASIS_BLOCK,
        )
    return sums.sum(0)


@triton.jit
def _lora_gradient(
    short: tl.tensor,
    long: tl.tensor,
    basis: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    num: tl.tensor,
    IN_FP32: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    LONG_BLOCK: tl.constexpr,
    BASIS_BLOCK: tl.constexpr,
) -> None:
    example = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BASIS_BLOCK + tl.arange(0, BASIS_BLOCK)
    split = tl.program_id(2)
    is_column = column < width
    rank_row = tl.arange(0, RANK_BLOCK)
    is_rank = rank_row < rank
    total = tl.zeros([RANK_BLOCK, BASIS_BLOCK], tl.float32)
    last = tl.minimum((split + 1) * SPLIT_TOKENS, tokens)
    for first in range(split * SPLIT_TOKENS, last, TOKEN_BLOCK):
        token = first + tl.arange(0, TOKEN_BLOCK)
        is_token = token < last
        rows = example * tokens + token
        projected = tl.zeros([TOKEN_BLOCK, BASIS_BLOCK], tl.float32)
        for start in range(0, length, LONG_BLOCK):
            place = start + tl.arange(0, LONG_BLOCK)
            is_place = place < length
            x = tl.load(
                long + rows[:, None] * length + place[None, :], mask=is_token[:, None] & is_place[None, :], other=0
            )
            p = tl.load(
                basis + place[:, None] * width + column[None, :], mask=is_place[:, None] & is_column[None, :], other=0
            )
            if IN_FP32:
                projected = tl.dot(x.to(tl.float32), p.to(tl.float32), projected, input_precision="ieee")
            else:
                projected = tl.dot(x, p, projected)
        s = tl.load(
            short + rows[None, :] * rank + rank_row[:, None], mask=is_rank[:, None] & is_token[None, :], other=0
        )
        total = tl.dot(s.to(tl.float32), projected, total, input_precision="ieee")
    out = sums + ((split * num + example) * rank) * width
    tl.store(out + rank_row[:, None] * width + column[None, :], total, mask=is_rank[:, None] & is_column[None, :])
