"""Chooses the next token of each sequence from its logits: the batch at once, each row by its own parameters.

A row's token depends on its logits, its parameters, its seed and how many tokens it has, never on the other rows.
"""

import math
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from kernels.devices import to_device
from serve_apps.engine.config import SamplingParams, TokenLogprob
from serve_apps.engine.logit_edits import apply_edits_
from serve_apps.engine.sequence import Choice, Sequence

# Tokens looked at for top_k and top_p, in turn until a row's cut is sure to lie among them; only then are all sorted.
# Finding 256 of 49,152 in 32 rows takes 6 ms on one core, sorting all 125 ms.
NUM_CANDIDATES = (256, 4096)
# Weights are summed in blocks first, so that no cumulative sum runs over the whole vocabulary.
BLOCK = 256
# Logits weighed at a time: 512 KiB, which a core's second cache holds while the steps go over them.
CACHED = 1 << 17
# Logits over the smallest temperature stay finite in fp32; a smaller one draws what greedy chooses anyway.
MIN_TEMPERATURE = 1e-30
# More than any vocabulary has; larger numbers mean the same and would not fit the kernel's integers.
MAX_TOP_K = 1 << 30
_MASK_64 = (1 << 64) - 1


class NotFinite(Exception):
    """A sequence's logits are NaN or infinite, so no token can be chosen."""


def sample(logits_NV: Tensor, sequences: list[Sequence]) -> list[Choice | Exception]:
    """Return one choice per row of `logits` (fp32 [n, vocabulary], changed in place).

    A row that is not finite, or whose grammar cannot go on, fails alone.
    """
    params = [sequence.request.sampling for sequence in sequences]
    best_NB = _block_maxima(logits_NV)
    is_finite_N = torch.isfinite(best_NB.amax(-1))
    own = _OwnLogprobs(logits_NV, params)
    edits = [sequence.edits for sequence in sequences]
    errors = apply_edits_(logits_NV, edits)
    points = [uniform(sequence.seed, sequence.num_output_tokens) for sequence in sequences]
    if not any(each.temperature for each in params):
        token_ids = _likeliest(logits_NV, best_NB if all(each.are_none for each in edits) else None)
    elif logits_NV.is_cuda:
        token_ids = draw_fused(logits_NV, params, points)
    else:
        is_drawable = [bool(finite) and row not in errors for row, finite in enumerate(is_finite_N.tolist())]
        token_ids = _choose(logits_NV, params, points, is_drawable)
    # Here, and for log-probabilities, the host waits for the device; nowhere before.
    is_finite, chosen = torch.stack((is_finite_N.long(), token_ids)).tolist()
    logprobs = own.of(token_ids)
    choices: list[Choice | Exception] = []
    for row, token_id in enumerate(chosen):
        if not is_finite[row]:
            choices.append(NotFinite("the model's logits are not finite numbers for this request"))
        else:
            choices.append(errors.get(row) or Choice(token_id, logprobs.get(row)))
    return choices


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) with 53 random bits that belongs to the output token at `position`.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195), its start scattered by the
    same function, so that neighbouring seeds have nothing in common. Without state: running a step again draws again
    the same.
    """
    start = _scatter(seed & _MASK_64)
    return (_scatter((start + (position + 1) * 0x9E3779B97F4A7C15) & _MASK_64) >> 11) * 2.0**-53


def _choose(logits_NV: Tensor, params: Rows[SamplingParams], points: Rows[float], is_drawable: Rows[bool]) -> Tensor:
    """Return the likeliest token of greedy rows and a drawn one of the others, int64 [n], on the CPU."""
    token_ids = torch.zeros(len(params), dtype=torch.int64)
    greedy = [row for row, each in enumerate(params) if not each.temperature]
    drawn = [row for row, each in enumerate(params) if each.temperature and is_drawable[row]]
    if greedy:
        token_ids[greedy] = _likeliest(logits_NV[greedy])
    if drawn:
        mine = logits_NV if len(drawn) == len(params) else logits_NV[drawn]
        token_ids[drawn] = draw(mine, [params[row] for row in drawn], [points[row] for row in drawn])
    return token_ids


def _block_maxima(logits_MV: Tensor) -> Tensor:
    """Return the largest logit of each block of a row [m, blocks]; NaN where the block holds one."""
    return logits_MV.view(len(logits_MV), -1, math.gcd(logits_MV.shape[1], BLOCK)).amax(-1)


def _likeliest(logits_MV: Tensor, best_MB: Tensor | None = None) -> Tensor:
    """Return the first of the largest logits, int64 [m]; `best_MB`: their `_block_maxima`, where they are known.

    Blocks' maxima first: on the CPU argmax takes 13 times as long as amax over as many numbers (docs/log.md).
    """
    best_MB = _block_maxima(logits_MV) if best_MB is None else best_MB
    block = best_MB.argmax(-1)
    block_size = logits_MV.shape[1] // best_MB.shape[1]
    blocks = logits_MV.view(len(logits_MV), -1, block_size)
    within = blocks.gather(1, block[:, None, None].expand(-1, 1, block_size))[:, 0].argmax(-1)
    return block * block_size + within


def draw(logits_MV: Tensor, params: Rows[SamplingParams], points: Rows[float]) -> Tensor:
    """Draw one token per row: int64 [m]. Each row's point in [0, 1) picks it by the inverse cumulative distribution.

    Rows with `top_k` or `top_p` lie in order of likelihood (equal logits: the lower id first), others in order of id.
    Sums are fp64 over fp32 sums of blocks, so a point within 1e-6 of the border between two tokens may fall on the
    other side of it.
    """
    device = logits_MV.device
    cut = [row for row, each in enumerate(params) if each.top_k or each.top_p < 1]
    whole = [row for row, each in enumerate(params) if not (each.top_k or each.top_p < 1)]
    token_ids = torch.empty(len(params), dtype=torch.int64, device=device)
    for rows, choose in ((whole, _draw_whole), (cut, _draw_cut)):
        if rows:
            index = torch.tensor(rows, device=device)
            mine = logits_MV if len(rows) == len(params) else logits_MV[index]
            knobs = _Knobs([params[row] for row in rows], [points[row] for row in rows], device)
            token_ids[index] = choose(mine, knobs)
    return token_ids


def draw_fused(logits_NV: Tensor, params: Rows[SamplingParams], points: Rows[float]) -> Tensor:
    """As `draw`, and greedy where the temperature is 0, by one launch of the Triton kernel.

    The parameters go to the device in one copy that the host does not wait for.
    """
    from kernels.sampling import sample as sample_fused

    knobs = _Knobs(params, points, torch.device("cpu"))
    columns = (knobs.temperature, knobs.top_k, knobs.top_p, knobs.min_p, knobs.points)
    packed = to_device(torch.cat([column.double() for column in columns], 1).t().contiguous(), logits_NV.device)
    temperature, top_k, top_p, min_p, on_device = packed
    return sample_fused(
        logits_NV,
        temperature=temperature.float(),
        top_k=top_k.int(),
        top_p=top_p,
        min_p=min_p.float(),
        points=on_device,
    )


class _Knobs:
    """Parameters of some rows as tensors [m, 1]: fp32, `top_k` int64, `points` and `top_p` fp64."""

    def __init__(self, params: Rows[SamplingParams], points: Rows[float], device: torch.device) -> None:
        def column(values: Rows[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        # 0 stays 0: greedy, which only the kernel takes.
        self.temperature = column([each.temperature and max(each.temperature, MIN_TEMPERATURE) for each in params])
        self.min_p = column([each.min_p for each in params])
        self.top_k = column([min(each.top_k, MAX_TOP_K) for each in params], torch.int64)
        self.max_top_k = max(min(each.top_k, MAX_TOP_K) for each in params)
        # A share of the whole vocabulary is asked for.
        self.needs_totals = any(each.top_p < 1 and not each.top_k for each in params)
        # top_p 1 keeps everything, whatever rounding does to the sum.
        self.top_p = column([each.top_p if each.top_p < 1 else torch.inf for each in params], torch.float64)
        self.points = column(points, torch.float64)
        self.has_min_p = any(each.min_p for each in params)

    def rows(self, index: Tensor) -> "_Knobs":
        """Return the parameters of some of the rows."""
        part = object.__new__(_Knobs)
        part.max_top_k, part.has_min_p, part.needs_totals = self.max_top_k, self.has_min_p, self.needs_totals
        for name in ("temperature", "min_p", "top_k", "top_p", "points"):
            setattr(part, name, getattr(self, name)[index])
        return part


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Return exp((logits - best) / temperature): unnormalised probabilities, the likeliest 1."""
    return (logits - best).div_(temperature).exp_()


def _draw_whole(logits_MV: Tensor, knobs: _Knobs) -> Tensor:
    """Pick a block by the blocks' sums, then weigh its tokens again and pick among them."""
    width = logits_MV.shape[1]
    sums, best = _weigh(logits_MV, knobs, has_min_p=knobs.has_min_p)
    block, point = pick(sums, knobs.points)
    column = block[:, None] * BLOCK + torch.arange(BLOCK, device=logits_MV.device)
    weights = _weights(logits_MV.gather(1, column.clamp(max=width - 1)), best, knobs.temperature)
    weights.masked_fill_((column >= width) | (weights < knobs.min_p), 0)
    return block * BLOCK + pick(weights, point)[0]


def _weigh(logits_MV: Tensor, knobs: _Knobs, *, has_min_p: bool) -> tuple[Tensor, Tensor]:
    """Return the sums of weights over blocks of `BLOCK` tokens, fp32 [m, blocks], and the best logits, [m, 1].

    Some rows at a time, in the cache: over the whole batch each step would go through memory. With `has_min_p`
    weights under it count as 0.
    """
    num_rows, width = logits_MV.shape
    num_blocks, step = -(-width // BLOCK), max(1, CACHED // width)
    sums = torch.empty(num_rows, num_blocks, device=logits_MV.device)
    best = torch.empty(num_rows, 1, device=logits_MV.device)
    cached = torch.zeros(step, num_blocks * BLOCK, device=logits_MV.device)  # beyond the vocabulary it stays 0
    is_kept = torch.empty(step, width, device=logits_MV.device)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        padded = cached[: rows.stop - start]
        weights = padded[:, :width]
        torch.amax(logits_MV[rows], -1, keepdim=True, out=best[rows])
        torch.sub(logits_MV[rows], best[rows], out=weights).div_(knobs.temperature[rows]).exp_()
        if has_min_p:
            # A comparison written as numbers: through booleans it takes ten times as long.
            weights.mul_(torch.ge(weights, knobs.min_p[rows], out=is_kept[: rows.stop - start]))
        torch.sum(padded.view(-1, num_blocks, BLOCK), -1, out=sums[rows])
    return sums, best


def pick(weights_MV: Tensor, points_M1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index per row whose cumulative weight exceeds point * total, and where in it the point lies.

    Semantics: index = min {i : sum(w[0..i]) > point * sum(w)}, int64 [m], never one of weight 0; place = (point *
    sum(w) - sum(w[0..index-1])) / w[index], fp64 [m, 1] in [0, 1]. Sums are fp64.
    """
    cumulative = weights_MV.cumsum(-1, dtype=torch.float64)
    target = _below(points_M1 * cumulative[:, -1:], cumulative[:, -1:])
    index = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index[:, 0], (target - before) / (cumulative.gather(1, index) - before)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Keep targets under the total, which rounding may reach."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _draw_cut(logits_MV: Tensor, knobs: _Knobs) -> Tensor:
    """Look at the best candidates only; rows whose cut may lie beyond them are done again with more."""
    num_rows, width = logits_MV.shape
    totals = torch.full((num_rows, 1), torch.nan, dtype=torch.float64, device=logits_MV.device)
    if knobs.needs_totals:
        totals = _weigh(logits_MV, knobs, has_min_p=False)[0].sum(-1, dtype=torch.float64, keepdim=True)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits_MV.device)
    rows = torch.arange(num_rows, device=logits_MV.device)
    for num in (*(max(each, knobs.max_top_k + 1) for each in NUM_CANDIDATES), width):
        mine = logits_MV if len(rows) == num_rows else logits_MV[rows]
        values, ids = _ordered(mine, min(num, width))
        drawn, is_sure = _draw_from(values, ids, totals[rows], knobs.rows(rows), is_all=num >= width)
        token_ids[rows] = drawn  # rows that are not sure get theirs in a later turn
        rows = rows[~is_sure]
        if not len(rows):
            break
    return token_ids


def _ordered(logits_MV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the `num` best logits and their ids, [m, num], best first, equal ones by id."""
    if num == logits_MV.shape[1]:
        ordered = torch.sort(logits_MV, dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    ids = logits_MV.topk(num, sorted=False).indices.sort(-1).values
    ordered = torch.sort(logits_MV.gather(1, ids), dim=-1, descending=True, stable=True)
    return ordered.values, ids.gather(1, ordered.indices)


def _draw_from(
    values_MK: Tensor, ids_MK: Tensor, totals_M1: Tensor, knobs: _Knobs, *, is_all: bool
) -> tuple[Tensor, Tensor]:
    """Cut ordered candidates and draw; also tell which rows' cut is sure not to lie beyond the candidates.

    `totals` are the weights of the whole vocabulary: top_p is a share of those, or of the top_k when there is one.
    """
    num = values_MK.shape[1]
    weights = _weights(values_MK, values_MK[:, :1], knobs.temperature)
    has_top_k = knobs.top_k > 0
    last = torch.where(has_top_k, knobs.top_k.clamp(max=num), num) - 1
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    totals = torch.where(has_top_k, cumulative.gather(1, last), totals_M1)
    kept = torch.arange(num, device=values_MK.device) <= last
    kept &= (cumulative - weights) < knobs.top_p * totals
    kept &= weights >= knobs.min_p
    last_kept = kept.sum(-1, keepdim=True) - 1
    is_sure = (values_MK.gather(1, last_kept) > values_MK[:, -1:])[:, 0] | is_all
    kept_total = cumulative.gather(1, last_kept)
    index = torch.searchsorted(cumulative, _below(knobs.points * kept_total, kept_total), right=True)
    return ids_MK.gather(1, index)[:, 0], is_sure


class _OwnLogprobs:
    """The model's own log-probabilities of the rows that ask for them, taken before the logits are edited."""

    def __init__(self, logits_NV: Tensor, params: Rows[SamplingParams]) -> None:
        self._num_top = {row: each.logprobs for row, each in enumerate(params) if each.logprobs is not None}
        if not self._num_top:
            return
        self._rows = to_device(torch.tensor(list(self._num_top)), logits_NV.device)
        self._logprobs = torch.log_softmax(logits_NV[self._rows], -1)
        self._best = self._logprobs.topk(max(self._num_top.values()))

    def of(self, token_ids: Tensor) -> dict[int, TokenLogprob]:
        """Return, by row, the chosen token's log-probability and the best ones."""
        if not self._num_top:
            return {}
        chosen = token_ids[self._rows]
        logprobs = self._logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        values, ids = (each.tolist() for each in self._best)
        found = {}
        for place, (row, token_id, logprob) in enumerate(zip(self._num_top, chosen.tolist(), logprobs, strict=True)):
            num_top = self._num_top[row]
            top = zip(ids[place][:num_top], values[place][:num_top], strict=True)
            found[row] = TokenLogprob(token_id, logprob, tuple(top))
        return found


def _scatter(state: int) -> int:
    """SplitMix64's output function."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)
