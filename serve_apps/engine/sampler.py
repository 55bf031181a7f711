"""Chooses the next token of each sequence from its logits, each by its own parameters and its own generator."""

import torch
from torch import Tensor

from serve_apps.engine.config import SamplingParams, TokenLogprob
from serve_apps.engine.sequence import Choice, Sequence


class NotFinite(Exception):
    """A sequence's logits are NaN or infinite, so no token can be chosen."""


def sample(logits_NV: Tensor, sequences: list[Sequence]) -> list[Choice | NotFinite]:
    """Return one choice per row of `logits` (fp32 [n, vocabulary]); a row that is not finite fails alone."""
    best, greedy = logits_NV.max(-1)
    is_finite = torch.isfinite(best).tolist()
    choices: list[Choice | NotFinite] = []
    for row, (sequence, greedy_id) in enumerate(zip(sequences, greedy.tolist(), strict=True)):
        if not is_finite[row]:
            choices.append(NotFinite("the model's logits are not finite numbers for this request"))
            continue
        params = sequence.request.sampling
        token_id = greedy_id if sequence.generator is None else draw(logits_NV[row], params, sequence.generator)
        logprob = None if params.logprobs is None else _logprob(logits_NV[row], token_id, params.logprobs)
        choices.append(Choice(token_id, logprob))
    return choices


def draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token: temperature, then the top_k best, then the fewest whose share reaches top_p.

    One number in [0, 1) is taken from `generator` per token, whatever the parameters, and turned into a token by the
    inverse of the cumulative distribution in float64.
    """
    point = torch.rand((), generator=generator, dtype=torch.float64).item()
    probabilities, token_ids = distribution(logits_V, params)
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * point, right=True))
    index = min(index, len(cumulative) - 1)
    return index if token_ids is None else int(token_ids[index])


def distribution(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Return unnormalised float64 probabilities and the token id of each (None: in id order, nothing was cut)."""
    scaled = (logits_V.double() - logits_V.max()) / params.temperature
    top_k = params.top_k if 0 < params.top_k < len(scaled) else 0
    if not top_k and params.top_p >= 1:
        return scaled.exp(), None
    # Stable, so that equal logits are kept by lower id, on every device and at every batch size.
    ordered, token_ids = torch.sort(scaled, descending=True, stable=True)
    probabilities = ordered[: top_k or None].exp()
    if params.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[: max(1, int((before < params.top_p * probabilities.sum()).sum()))]
    return probabilities, token_ids


def _logprob(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Return log-probabilities under the model's own distribution, before temperature and cuts."""
    logprobs = torch.log_softmax(logits_V, -1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
