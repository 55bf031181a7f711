"""What the soak holds the engine to: PEFT alone, one request at a time, the whole sequence anew for each token.

Every (adapter, prompt) has a greedy continuation and two drawn ones, the choices of one seeded request, by the plain
oracle of `kernels.reference`. Rows of a product differ by up to 4e-5 with the batch's size, so each token also knows
which others logits within `TIE` of PEFT's may give: of best logits so close, or where a point or a cut lies so close to
the border between two tokens. A difference is excused only where it is one of those.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kernels import reference
from serve_apps.choices import choice_seed
from serve_apps.engine.config import SamplingParams
from serve_apps.engine.sampler import uniform

MAX_TOKENS = 12
TIE = 1e-4
NUM_CHOICES = 2
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
KNOBS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.5, "top_k": 200, "min_p": 0.02, "logit_bias": ((7, 3.0), (9, -100.0))},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
)
# A request's adapter (-1: the base), its prompt, and its choice (-1: greedy).
Key = tuple[int, int, int]


@dataclass(frozen=True)
class Reference:
    """One continuation; `others[i]`: what else token i may be; `texts[i]`: the text of the first i tokens."""

    token_ids: tuple[int, ...]
    others: tuple[frozenset[int], ...]
    texts: tuple[str, ...]

    def end(self, sampling: SamplingParams) -> tuple[str, int, str]:
        """Return why a request with these limits ends, after how many tokens, and its text."""
        for count in range(1, sampling.max_tokens + 1):
            if self.token_ids[count - 1] in sampling.stop_token_ids:
                return "stop", count, self.texts[count - 1]
            hits = [at for stop in sampling.stop if (at := self.texts[count].find(stop)) >= 0]
            if hits:
                return "stop", count, self.texts[count][: min(hits)]
        return "length", sampling.max_tokens, self.texts[sampling.max_tokens]


def sampling_of(key: Key) -> SamplingParams:
    """Return how the reference of `key` was drawn."""
    adapter, prompt, choice = key
    if choice < 0:
        return GREEDY
    seed = choice_seed(1000 * adapter + prompt, choice)
    return replace(GREEDY, seed=seed, **KNOBS[(3 * adapter + prompt) % len(KNOBS)])


def references(
    base: Path, adapters: Sequence[Path], prompts: Sequence[tuple[int, ...]], tokenizer: Any
) -> dict[Key, Reference]:
    """Return the references of every adapter and of the base with every prompt."""
    found: dict[Key, Reference] = {}
    for adapter in range(-1, len(adapters)):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter >= 0:
            model = PeftModel.from_pretrained(model, adapters[adapter])
        model.eval()

        def logits_after(token_ids: list[int], model: Any = model) -> torch.Tensor:
            logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0, -1].float()
            return logits

        for index, choice in product(range(len(prompts)), range(-1, NUM_CHOICES)):
            key = (adapter, index, choice)
            found[key] = continued(logits_after, prompts[index], sampling_of(key), tokenizer)
    return found


@torch.inference_mode()
def continued(
    logits_after: Callable[[list[int]], torch.Tensor],
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    tokenizer: Any,
) -> Reference:
    """Return how the model behind `logits_after` goes on after `prompt`."""
    output: list[int] = []
    others: list[frozenset[int]] = []
    for position in range(MAX_TOKENS):
        logits = edited(logits_after([*prompt, *output]), prompt, output, sampling)
        point = uniform(sampling.seed or 0, position)
        knobs = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        token, _ = reference.sample(logits, point=point, **knobs)
        others.append(frozenset(possible(logits.numpy(), sampling, point) - {token}))
        output.append(token)
    return Reference(tuple(output), tuple(others), tuple(texts_of(prompt, output, tokenizer)))


def edited(logits: torch.Tensor, prompt: tuple[int, ...], output: list[int], sampling: SamplingParams) -> torch.Tensor:
    """Return the logits after the request's penalties and biases, fp64."""
    defaults = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    if defaults and not sampling.logit_bias:
        return logits.double()
    found = reference.edited_logits(
        logits,
        prompt=prompt,
        output=output,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        bias=sampling.logit_bias,
    )
    return torch.tensor(found, dtype=torch.float64)


def texts_of(prompt: tuple[int, ...], output: list[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of the first 0, 1, ... tokens of `output` behind its prompt."""

    def decode(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    before = decode(prompt)
    for count in range(len(output) + 1):
        yield decode([*prompt, *output[:count]])[len(before) :]


def possible(logits_V: np.ndarray, sampling: SamplingParams, point: float) -> set[int]:
    """Return every token that logits may give of which each pair differs by up to `TIE` from what it does in these.

    With likelihoods in [e^-s, e^s] of these, s = TIE / temperature, no cumulative share moves by more than s; a penalty
    stretches a difference as it does the logit.
    """
    repetition = sampling.repetition_penalty
    tie = TIE * max(repetition, 1 / repetition)
    if sampling.temperature == 0:
        return set(np.flatnonzero(logits_V >= logits_V.max() - tie).tolist())
    slack = tie / sampling.temperature
    order = np.lexsort((np.arange(len(logits_V)), -logits_V))
    weights = np.exp((logits_V[order] - logits_V.max()) / sampling.temperature)
    # Equal but for a tie: any of them may stand at the place of any other.
    groups = np.concatenate(([0], np.cumsum(-np.diff(logits_V[order]) > tie)))
    found: set[int] = set()
    for shift_p, shift_min in product((-slack, 0.0, slack), repeat=2):
        kept = kept_places(weights, sampling, shift_p=shift_p, shift_min=shift_min)
        if sampling.top_k or sampling.top_p < 1:
            places = drawn_places(weights * kept, point, slack)
            found |= set(order[np.isin(groups, groups[places])].tolist())
        else:
            by_id = np.empty_like(weights)
            by_id[order] = weights * kept
            found |= set(drawn_places(by_id, point, slack).tolist())
    return found


def kept_places(weights: np.ndarray, sampling: SamplingParams, *, shift_p: float, shift_min: float) -> np.ndarray:
    """Return which of the weights, largest first, the cuts leave, each cut moved by a part of itself."""
    kept = np.arange(len(weights)) < (sampling.top_k or len(weights))
    if sampling.top_p < 1:
        before = np.cumsum(weights) - weights
        kept &= before < sampling.top_p * (1 + shift_p) * (weights * kept).sum()
    return kept & (weights >= min(1.0, sampling.min_p * (1 + shift_min)))


def drawn_places(weights: np.ndarray, point: float, slack: float) -> np.ndarray:
    """Return the places whose stretch of the cumulative distribution comes within `slack` of the point."""
    ends = np.cumsum(weights) / weights.sum()
    starts = ends - weights / weights.sum()
    return np.flatnonzero((weights > 0) & (starts - slack <= point) & (point < ends + slack))
