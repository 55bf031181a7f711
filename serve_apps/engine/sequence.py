"""One request on its way through the engine: its tokens, its KV blocks, its adapter lease."""

from typing import Any

from serve_apps.engine.adapter_pool import Lease
from serve_apps.engine.config import FinishReason, Request, TokenLogprob
from serve_apps.engine.grammar import GrammarState
from serve_apps.engine.logit_edits import LogitEdits
from serve_apps.engine.text import TextStream


class Sequence:
    """Mutable state of one request. The scheduler owns blocks, lease with its digest, and num_computed.

    `eos_token_ids` are the model's own end tokens; `grammar` is the state of `request.sampling.grammar`; beyond
    `long_from` tokens the model's RoPE takes its long frequencies, for all positions.
    """

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        max_new_tokens: int,
        tokenizer: Any,
        eos_token_ids: frozenset[int] = frozenset(),
        grammar: GrammarState | None = None,
        long_from: int | None = None,
    ) -> None:
        self.request = request
        self._long_from = long_from
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
        params = request.sampling
        self.text = TextStream(tokenizer, request.prompt_token_ids, stop=params.stop)
        self.seed = arrival if params.seed is None else params.seed
        self.grammar = grammar
        self._end_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.edits = LogitEdits(params, request.prompt_token_ids, end_token_ids=self._end_token_ids, grammar=grammar)

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

    @property
    def is_long(self) -> bool:
        """Whether the long frequencies apply, so that keys computed for a shorter sequence are void."""
        return self._long_from is not None and len(self.token_ids) > self._long_from

    def append(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Add a chosen token; return the text it makes certain and, when it is the last, why."""
        self.token_ids.append(token_id)
        if token_id in self._end_token_ids:
            return self.text.finish(), "stop"
        self.edits.note(token_id)
        delta = self.text.push(token_id, may_stop=self.num_output_tokens >= self.request.sampling.min_tokens)
        if self.text.is_stopped:
            return delta, "stop"
        if self.grammar is not None and self.grammar.is_finished:
            return delta + self.text.finish(), "stop"
        if self.num_output_tokens >= self.max_new_tokens:
            return delta + self.text.finish(), "length"
        return delta, None


class Choice:
    """The token that the sampler chose for one sequence, with its log-probabilities when asked for."""

    __slots__ = ("logprob", "token_id")

    def __init__(self, token_id: int, logprob: TokenLogprob | None) -> None:
        self.token_id = token_id
        self.logprob = logprob
