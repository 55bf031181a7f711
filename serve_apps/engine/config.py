"""The frozen values that go into the engine and come out of it."""

import math
from dataclasses import dataclass
from typing import Literal

from serve_apps.engine.errors import InvalidRequest

DTYPES = ("float32", "bfloat16", "float16")
POSITIVE_FIELDS = (
    "max_num_seqs",
    "max_model_len",
    "kv_block_size",
    "max_step_tokens",
    "adapter_cache_bytes",
    "adapter_host_bytes",
    "max_resident_adapters",
)
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class EngineConfig:
    """Everything that one engine is built from.

    `max_step_tokens` bounds the tokens of one forward pass (longer prompts are chunked); `num_kv_blocks` None means
    room for `max_num_seqs` sequences of `max_model_len`, at most the memory rule of `runner.default_num_kv_blocks`;
    `num_threads` None leaves torch's own choice. `adapter_cache_bytes` and `max_resident_adapters` bound the adapters
    on the device, `adapter_host_bytes` those kept in host memory behind them; `adapter_dtype` "auto" is float32 on the
    CPU and the model's dtype on CUDA. `dtype` "auto" is bfloat16 on CUDA and on CPUs that multiply it in one
    instruction, else float32. `native_kernels` False leaves the CPU's work to torch, as does a missing compiler.
    """

    base_path: str
    base_digest: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    max_num_seqs: int = 16
    max_model_len: int = 1024
    kv_block_size: int = 16
    num_kv_blocks: int | None = None
    max_step_tokens: int = 512
    adapter_cache_bytes: int = 512 << 20
    adapter_host_bytes: int = 1 << 30
    adapter_dtype: str = "auto"
    max_resident_adapters: int = 2048
    num_threads: int | None = None
    native_kernels: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidRequest(f"dtype={self.dtype!r} is not supported; use auto or one of {', '.join(DTYPES)}")
        if self.adapter_dtype not in ("auto", *DTYPES):
            raise InvalidRequest(
                f"adapter_dtype={self.adapter_dtype!r} is not supported; use auto or one of {', '.join(DTYPES)}"
            )
        for name in POSITIVE_FIELDS:
            _require_positive(name, getattr(self, name))
        for name in ("num_kv_blocks", "num_threads"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.max_step_tokens < self.max_num_seqs:
            raise InvalidRequest(
                f"max_step_tokens={self.max_step_tokens} is less than max_num_seqs={self.max_num_seqs}: a step could "
                "not give every running sequence one token; raise the first or lower the second"
            )


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy; top_k 0 and top_p 1 keep everything.

    `seed` None takes one from the request's arrival number. `logprobs` n asks for the chosen token's log-probability
    and the n best, of the model's own distribution (before temperature and cuts). `ignore_eos` runs to `max_tokens`.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require_positive("max_tokens", self.max_tokens)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest(f"temperature={self.temperature} is not a number >= 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p={self.top_p} is outside (0, 1]; 1 keeps every token")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k={self.top_k} is negative; 0 keeps every token")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop holds an empty string, which would stop at once; leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise InvalidRequest(f"logprobs={self.logprobs} is outside 0..20")


@dataclass(frozen=True)
class AdapterRef:
    """An adapter by its digest and the PEFT folder that holds it."""

    digest: str
    path: str


@dataclass(frozen=True)
class Request:
    """One prompt to continue, with the base model (`adapter` None) or with one adapter."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    tenant: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one chosen token, and the best alternatives as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step added to one request; `text` is the new text only, never part of a character or of a stop string.

    `new_token_ids` counts the end-of-sequence token and those of a stop string; the text leaves them out.
    `adapter_digest` names the adapter whose weights were loaded for it; None while none was.
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    text: str
    finished: bool
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    adapter_digest: str | None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{name}={value!r} must be a whole number >= 1")
