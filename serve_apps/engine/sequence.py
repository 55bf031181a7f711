"""One request on its way through the engine: its tokens, its KV blocks, its adapter lease."""

from typing import Any

import torch

from serve_apps.engine.adapter_pool import Lease
from serve_apps.engine.config import FinishReason, Request, TokenLogprob
from serve_apps.engine.text import TextStream


class Sequence:
    """Mutable state of one request. The scheduler owns blocks, lease with its digest, and num_computed."""

    def __init__(self, request: Request, *, arrival: int, max_new_tokens: int, tokenizer: Any) -> None:
        self.request = request
        self.arrival = arrival
        self.max_new_tokens = max_new_tokens
        self.token_ids = list(request.prompt_token_ids)
        self.num_computed = 0
        self.blocks: list[int] = []
        self.lease: Lease | None = None
        # Of the adapter last leased: stays when a preemption ends the lease, because tokens were chosen with it.
        self.adapter_digest: str | None = None
        # The chain of `engine.prefix`: one key to start from, then one per whole block known so far.
        self.block_keys: list[bytes] = []
        self.num_registered = 0
        self.is_charged = False
        self.num_passed_over = 0
        self.retry_after_release = -1
        self.text = TextStream(tokenizer, request.prompt_token_ids, stop=request.sampling.stop)
        self.generator = _generator(request, arrival)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the caller gave."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens chosen so far; they survive preemption."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Known tokens whose keys and values are not in the cache: 1 while decoding, more in prefill."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> tuple[str, FinishReason | None]:
        """Add a chosen token; return the text it makes certain and, when it is the last, why."""
        self.token_ids.append(token_id)
        if token_id in eos_token_ids and not self.request.sampling.ignore_eos:
            return self.text.finish(), "stop"
        delta = self.text.push(token_id)
        if self.text.is_stopped:
            return delta, "stop"
        if self.num_output_tokens >= self.max_new_tokens:
            return delta + self.text.finish(), "length"
        return delta, None


class Choice:
    """The token that the sampler chose for one sequence, with its log-probabilities when asked for."""

    __slots__ = ("logprob", "token_id")

    def __init__(self, token_id: int, logprob: TokenLogprob | None) -> None:
        self.token_id = token_id
        self.logprob = logprob


def _generator(request: Request, arrival: int) -> torch.Generator | None:
    """Return the request's own source of randomness: what else is in the batch can never shift it."""
    if request.sampling.temperature == 0:
        return None
    seed = arrival if request.sampling.seed is None else request.sampling.seed
    # torch takes 64 bits; a caller's seed may be any whole number.
    return torch.Generator().manual_seed(seed % (1 << 63))
