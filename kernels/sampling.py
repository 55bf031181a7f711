"""One token per row of logits: greedy, or temperature, top_k, top_p and min_p from a given point in [0, 1), fused.

Nothing is sorted. A cut by number or by share, and the draw itself, each look for the largest logit at which a count or
a sum over all larger ones reaches a target; logits become integers of the same order, and their 32 bits are found two
at a time, so a search is 16 passes over the row, which lies in the cache by then. Equal logits count in order of id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens read at a time, 8 per thread. Large, because every pass waits for each block in turn: 128 thousand tokens
# are 32 of them. Reasoned, not tuned: no device was at hand.
_BLOCK, _TOKENS_PER_WARP = 4096, 256


def sample(
    logits_NV: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, points: Tensor
) -> Tensor:
    """Semantics: token[n] = the first token whose cumulative kept weight exceeds points[n] * (sum of kept weights).

    weight = exp((logit - best) / temperature); kept: the top_k best (0: all), of these the fewest whose share reaches
    top_p (>= 1: all), of these the ones of weight >= min_p. With top_k or top_p tokens are taken in order of logit,
    equal ones by id, else in order of id. Temperature 0: the largest logit, the lower id of equals.

    logits: fp32 [N, V] contiguous, finite but for -inf; temperature, min_p: fp32 [N]; top_k: int32 [N]; top_p, points:
    fp64 [N]. Weights are fp32, sums over blocks of 4096 fp32 and beyond fp64. Returns int64 [N].
    """
    num_rows, width = logits_NV.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits_NV.device)
    if num_rows:
        if not logits_NV.is_contiguous() or logits_NV.dtype != torch.float32:
            raise ValueError("logits must be contiguous fp32")
        block = min(_BLOCK, triton.next_power_of_2(width))
        _sample[(num_rows,)](
            logits_NV,
            temperature,
            top_k,
            top_p,
            min_p,
            points,
            tokens,
            width,
            BLOCK=block,
            num_warps=max(1, block // _TOKENS_PER_WARP),
        )
    return tokens


@triton.jit
def _keys(row: tl.tensor, token: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Return the logits of a block and integers in the same order; -0.0 and 0.0 are equal, and so become one."""
    logit = tl.load(row + token, mask=token < width, other=float("-inf"))
    logit = tl.where(logit == 0, 0.0, logit)
    bits = logit.to(tl.int32, bitcast=True)
    return logit, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight_of_key(key: tl.tensor, best: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.exp((bits.to(tl.float32, bitcast=True) - best) / temperature)


@triton.jit
def _search(
    row: tl.tensor,
    width: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    target: tl.tensor,
    BY_COUNT: tl.constexpr,
    IS_STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the largest key at and above which the count, or the sum of weights >= min_p, reaches (exceeds) target."""
    way = tl.arange(0, 4)
    low = tl.full([], -2147483648, tl.int32)
    step = tl.full([], 1073741824, tl.int32)
    for _ in range(0, 16):
        borders = low + way * step
        reached = tl.zeros([4], tl.float64)
        for start in range(0, width, BLOCK):
            token = start + tl.arange(0, BLOCK)
            logit, key = _keys(row, token, width)
            if BY_COUNT:
                value = (token < width).to(tl.float32)
            else:
                value = tl.exp((logit - best) / temperature)
                value = tl.where((token < width) & (value >= min_p), value, 0.0)
            at_least = tl.where(key[:, None] >= borders[None, :], value[:, None], 0.0)
            reached += tl.sum(at_least, 0).to(tl.float64)
        if IS_STRICT:
            is_enough = reached > target
        else:
            is_enough = reached >= target
        # The lowest border is known to be enough: it is where the search stands.
        low = low + tl.max(tl.where(is_enough, way, 0), 0) * step
        step = step // 4
    return low


@triton.jit
def _above(
    row: tl.tensor,
    width: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    key: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the sum of weights >= min_p and the number of tokens above a key, and the number at it."""
    weight = tl.zeros([], tl.float64)
    number = tl.zeros([], tl.int32)
    equal = tl.zeros([], tl.int32)
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit, keys = _keys(row, token, width)
        value = tl.exp((logit - best) / temperature)
        is_above = (token < width) & (keys > key)
        weight += tl.sum(tl.where(is_above & (value >= min_p), value, 0.0), 0).to(tl.float64)
        number += tl.sum(is_above.to(tl.int32), 0)
        equal += tl.sum(((token < width) & (keys == key)).to(tl.int32), 0)
    return weight, number, equal


@triton.jit
def _sample(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    points: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * width
    temperature = tl.load(temperatures + n)
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.zeros([], tl.int32)
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(row + token, mask=token < width, other=float("-inf"))
        highest = tl.max(logit, 0)
        first = tl.min(tl.where((logit == highest) & (token < width), token, 2147483647), 0)
        chosen = tl.where(highest > best, first, chosen)
        best = tl.maximum(best, highest)
    if temperature > 0:
        top_k = tl.load(top_ks + n)
        top_p = tl.load(top_ps + n)
        min_p = tl.load(min_ps + n)
        point = tl.load(points + n)
        has_top_k = (top_k > 0) & (top_k < width)
        if (top_k > 0) | (top_p < 1):
            chosen = _draw_cut(row, width, best, temperature, top_k, top_p, min_p, point, has_top_k, BLOCK)
        else:
            chosen = _draw_whole(row, width, best, temperature, min_p, point, chosen, BLOCK)
    tl.store(tokens + n, chosen.to(tl.int64))


@triton.jit
def _draw_cut(
    row: tl.tensor,
    width: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    point: tl.tensor,
    has_top_k: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Keep a run of the order by logit: all tokens above the key `cut`, and the first `num_ties` at it; draw in it."""
    cut = tl.full([], -2147483648, tl.int32)
    num_ties = tl.zeros([], tl.int32)
    if has_top_k:
        cut = _search(row, width, best, temperature, 0.0, top_k.to(tl.float64), True, False, BLOCK)
    above, number, equal = _above(row, width, best, temperature, 0.0, cut, BLOCK)
    num_ties = equal
    if has_top_k:
        num_ties = top_k - number
    at_cut = tl.where(cut == -2147483648, 0.0, _weight_of_key(cut, best, temperature))
    total = above + num_ties * at_cut
    if top_p < 1:
        share = top_p * total
        nucleus = _search(row, width, best, temperature, 0.0, share, False, False, BLOCK)
        if nucleus > cut:
            cut = nucleus
            above, number, equal = _above(row, width, best, temperature, 0.0, cut, BLOCK)
            num_ties = equal
            at_cut = _weight_of_key(cut, best, temperature)
        # The fewest of equals that reach the share, at least one, at most those the other cut leaves.
        wanted = tl.ceil(((share - above) / tl.where(at_cut > 0, at_cut, 1.0)).to(tl.float32)).to(tl.int32)
        num_ties = tl.minimum(tl.maximum(wanted, 1), num_ties)
    above, number, equal = _above(row, width, best, temperature, min_p, cut, BLOCK)
    kept = above + tl.where(at_cut >= min_p, num_ties * at_cut, 0.0)
    target = point * kept
    key = _search(row, width, best, temperature, min_p, target, False, True, BLOCK)
    key = tl.maximum(key, cut)
    above, number, equal = _above(row, width, best, temperature, min_p, key, BLOCK)
    if key == cut:
        equal = num_ties
    tie = ((target - above) / _weight_of_key(key, best, temperature)).to(tl.int32)
    tie = tl.minimum(tl.maximum(tie, 0), equal - 1)
    return _nth_at(row, width, key, tie, BLOCK)


@triton.jit
def _nth_at(
    row: tl.tensor,
    width: tl.tensor,
    key: tl.tensor,
    nth: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the id of the nth token, counted from 0 in order of id, whose logit has this key."""
    found = tl.zeros([], tl.int32)
    chosen = tl.zeros([], tl.int32)
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        _, keys = _keys(row, token, width)
        is_equal = ((token < width) & (keys == key)).to(tl.int32)
        place = found + tl.cumsum(is_equal, 0) - 1
        chosen += tl.sum(tl.where((is_equal > 0) & (place == nth), token, 0), 0)
        found += tl.sum(is_equal, 0)
    return chosen


@triton.jit
def _draw_whole(
    row: tl.tensor,
    width: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    point: tl.tensor,
    chosen: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Draw in order of id: sum, then find the first token beyond the target, `chosen` where rounding hides it."""
    total = tl.zeros([], tl.float64)
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit, _ = _keys(row, token, width)
        value = tl.exp((logit - best) / temperature)
        total += tl.sum(tl.where((token < width) & (value >= min_p), value, 0.0), 0).to(tl.float64)
    target = point * total
    before = tl.zeros([], tl.float64)
    found = tl.full([], 2147483647, tl.int32)
    for start in range(0, width, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit, _ = _keys(row, token, width)
        value = tl.exp((logit - best) / temperature)
        value = tl.where((token < width) & (value >= min_p), value, 0.0)
        cumulative = before + tl.cumsum(value.to(tl.float64), 0)
        is_beyond = (cumulative > target) & (value > 0)
        found = tl.minimum(found, tl.min(tl.where(is_beyond, token, 2147483647), 0))
        before += tl.sum(value, 0).to(tl.float64)
    return tl.where(found < 2147483647, found, chosen)
