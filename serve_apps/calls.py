"""The frozen values that cross from gateway to replica and back."""

from dataclasses import dataclass
from typing import Any

from serve_apps.engine.config import SamplingParams, TokenLogprob
from serve_apps.errors import Problem


@dataclass(frozen=True)
class AdapterChoice:
    """The adapter a model name stands for: digest, published `name@version`, leaf hash of the record that made it."""

    digest: str
    name: str
    record: str | None


@dataclass(frozen=True)
class Call:
    """One validated request, ready for the engine. `content` is what the receipt's private blob keeps of the prompt.

    `prompt_version` is the `name@version` of the registered prompt that it was made with.
    """

    receipt_id: str
    time_us: int
    model: str
    tenant: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterChoice | None
    request_digest: str
    content: dict[str, Any]
    prompt_version: str | None = None


@dataclass(frozen=True)
class Delta:
    """Text and tokens that one or more engine steps added."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Answer:
    """A finished completion; `adapter_digest` is what the engine says it ran, not what was asked."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    num_prompt_tokens: int
    adapter_digest: str | None
    output_digest: str

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated, the end-of-sequence token included."""
        return len(self.token_ids)


# What a replica sends back: deltas, then one Answer or one Problem.
Piece = Delta | Answer | Problem
