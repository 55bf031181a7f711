"""Chooses the next token of each sequence from its logits: the batch at once, each row by its own parameters.

A row's token depends on its logits, its parameters, its seed and how many tokens it has, never on the other rows.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from serve_apps.engine.config import SamplingParams, TokenLogprob
from serve_apps.engine.logit_edits import apply_edits_
from serve_apps.engine.sequence import Choice, Sequence

# Tokens looked at for top_k and top_p, in turn until a row's cut is sure to lie among them; only then are all sorted.
# Finding 256 of 49,152 in 32 rows takes 6 ms on one core, sorting all 125 ms.
NUM_CANDIDATES = (256, 4096)
# Weights are summed in blocks first, so that no cumulative sum runs over the whole vocabulary.
BLOCK = 256
_MASK_64 = (1 << 64) - 1


class NotFinite(Exception):
    """A sequence's logits are NaN or infinite, so no token can be chosen."""


def sample(logits_NV: Tensor, sequences: list[Sequence]) -> list[Choice | Exception]:
    """Return one choice per row of `logits` (fp32 [n, vocabulary], changed in place).

    A row that is not finite, or whose grammar cannot go on, fails alone.
    """
    params = [sequence.request.sampling for sequence in sequences]
    is_finite = torch.isfinite(logits_NV.amax(-1)).tolist()
    own = _OwnLogprobs(logits_NV, params)
    errors = apply_edits_(logits_NV, [sequence.edits for sequence in sequences])
    token_ids = logits_NV.argmax(-1)
    drawn = [row for row in range(len(params)) if params[row].temperature > 0 and is_finite[row] and row not in errors]
    if drawn:
        index = torch.tensor(drawn, device=logits_NV.device)
        points = [uniform(sequences[row].seed, sequences[row].num_output_tokens) for row in drawn]
        mine = logits_NV if len(drawn) == len(params) else logits_NV[index]
        token_ids[index] = draw(mine, [params[row] for row in drawn], points)
    logprobs = own.of(token_ids)
    choices: list[Choice | Exception] = []
    for row, token_id in enumerate(token_ids.tolist()):
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


def draw(logits_MV: Tensor, params: Rows[SamplingParams], points: Rows[float]) -> Tensor:
    """Draw one token per row: int64 [m]. Each row's point in [0, 1) picks it by the inverse cumulative distribution.

    Rows with `top_k` or `top_p` lie in order of likelihood (equal logits: the lower id first), others in order of id.
    On CUDA one launch draws for all rows; its sums are fp32 within blocks, so a point within 1e-6 of the border between
    two tokens may fall on the other side of it.
    """
    if logits_MV.is_cuda:
        return draw_fused(logits_MV, params, points)
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


def draw_fused(logits_MV: Tensor, params: Rows[SamplingParams], points: Rows[float]) -> Tensor:
    """As `draw`, by the Triton kernel."""
    from kernels.sampling import sample as sample_fused

    knobs = _Knobs(params, points, logits_MV.device)
    return sample_fused(
        logits_MV,
        temperature=knobs.temperature[:, 0],
        top_k=knobs.top_k[:, 0].int(),
        top_p=knobs.top_p[:, 0],
        min_p=knobs.min_p[:, 0],
        points=knobs.points[:, 0],
    )


class _Knobs:
    """Parameters of some rows as tensors [m, 1]: fp32, `top_k` int64, `points` and `top_p` fp64."""

    def __init__(self, params: Rows[SamplingParams], points: Rows[float], device: torch.device) -> None:
        def column(values: Rows[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.temperature = column([each.temperature for each in params])
        self.min_p = column([each.min_p for each in params])
        self.top_k = column([each.top_k for each in params], torch.int64)
        self.max_top_k = max(each.top_k for each in params)
        # top_p 1 keeps everything, whatever rounding does to the sum.
        self.top_p = column([each.top_p if each.top_p < 1 else torch.inf for each in params], torch.float64)
        self.points = column(points, torch.float64)
        self.has_min_p = any(each.min_p for each in params)

    def rows(self, index: Tensor) -> "_Knobs":
        """Return the parameters of some of the rows."""
        part = object.__new__(_Knobs)
        part.max_top_k, part.has_min_p = self.max_top_k, self.has_min_p
        for name in ("temperature", "min_p", "top_k", "top_p", "points"):
            setattr(part, name, getattr(self, name)[index])
        return part


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Return exp((logits - best) / temperature): unnormalised probabilities, the likeliest 1."""
    return (logits - best).div_(temperature).exp_()


def _draw_whole(logits_MV: Tensor, knobs: _Knobs) -> Tensor:
    weights = _weights(logits_MV, logits_MV.amax(-1, keepdim=True), knobs.temperature)
    if knobs.has_min_p:
        weights.masked_fill_(weights < knobs.min_p, 0)
    return pick(weights, knobs.points)


def pick(weights_MV: Tensor, points_M1: Tensor) -> Tensor:
    """Return the first index per row whose cumulative weight exceeds point * total; never one of weight 0.

    Semantics: min {i : sum(w[0..i]) > point * sum(w)}, sums in fp64, over blocks first and then within one.
    """
    num_rows, width = weights_MV.shape
    if width % BLOCK:
        weights_MV = torch.nn.functional.pad(weights_MV, (0, BLOCK - width % BLOCK))
    blocks = weights_MV.view(num_rows, -1, BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = _below(points_M1 * cumulative[:, -1:], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    target = _below(target - before, within[:, -1:])
    return (block * BLOCK + torch.searchsorted(within, target, right=True))[:, 0]


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Keep targets under the total, which rounding may reach."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _draw_cut(logits_MV: Tensor, knobs: _Knobs) -> Tensor:
    """Look at the best candidates only; rows whose cut may lie beyond them are done again with more."""
    num_rows, width = logits_MV.shape
    weights = _weights(logits_MV, logits_MV.amax(-1, keepdim=True), knobs.temperature)
    totals = weights.sum(-1, dtype=torch.float64, keepdim=True)
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
    has_top_k = (knobs.top_k > 0) & (knobs.top_k < num)
    last = torch.where(has_top_k, knobs.top_k, num) - 1
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
        rows = torch.tensor(list(self._num_top), device=logits_NV.device)
        self._logprobs = torch.log_softmax(logits_NV[rows], -1)
        self._values, self._ids = (each.tolist() for each in self._logprobs.topk(max(self._num_top.values())))
        self._rows = rows

    def of(self, token_ids: Tensor) -> dict[int, TokenLogprob]:
        """Return, by row, the chosen token's log-probability and the best ones."""
        if not self._num_top:
            return {}
        chosen = token_ids[self._rows]
        logprobs = self._logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        found = {}
        for place, (row, token_id, logprob) in enumerate(zip(self._num_top, chosen.tolist(), logprobs, strict=True)):
            num_top = self._num_top[row]
            top = zip(self._ids[place][:num_top], self._values[place][:num_top], strict=True)
            found[row] = TokenLogprob(token_id, logprob, tuple(top))
        return found


def _scatter(state: int) -> int:
    """SplitMix64's output function."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)
