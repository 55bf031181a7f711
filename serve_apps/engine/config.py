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
# Edits beyond it could leave fp32, and an infinite logit has no distribution.
MAX_EDIT = 1e9
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class EngineConfig:
    """Everything that one engine is built from.

    `max_step_tokens` bounds the tokens of one forward pass (longer prompts are chunked); `num_kv_blocks` None means
    room for `max_num_seqs` sequences of `max_model_len`, at most the memory rule of `runner.default_num_kv_blocks`;
    `num_threads` None leaves torch's own choice. `adapter_cache_bytes` and `max_resident_adapters` bound the adapters
    on the device, `adapter_host_bytes` those kept in host memory behind them; `adapter_dtype` "auto" is float32 on the
    CPU and the model's dtype on CUDA. `max_step_adapter_bytes` bounds the distinct adapters that run together, for a
    step reads each of them whole; None bounds nothing. `tenant_weights` (tenant, weight) shares out service; tenants
    not named weigh 1. `dtype` "auto" is bfloat16 on CUDA and on CPUs that
    multiply it in one instruction, else float32. `native_kernels` False leaves the CPU's work to torch, as does a
    missing compiler. `cuda_graphs` False launches every decode step kernel by kernel.
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
    max_step_adapter_bytes: int | None = None
    enable_prefix_cache: bool = True
    tenant_weights: tuple[tuple[str, float], ...] = ()
    num_threads: int | None = None
    native_kernels: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidRequest(f"dtype={self.dtype!r} is not supported; use auto or one of {', '.join(DTYPES)}")
        if self.adapter_dtype not in ("auto", *DTYPES):
            raise InvalidRequest(
                f"adapter_dtype={self.adapter_dtype!r} is not supported; use auto or one of {', '.join(DTYPES)}"
            )
        for name in POSITIVE_FIELDS:
            _require_positive(name, getattr(self, name))
        for name in ("num_kv_blocks", "num_threads", "max_step_adapter_bytes"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for tenant, weight in self.tenant_weights:
            if not (math.isfinite(weight) and weight > 0):
                raise InvalidRequest(f"tenant_weights gives {tenant!r} {weight}; a weight is a number > 0")
        if self.max_step_tokens < self.max_num_seqs:
            raise InvalidRequest(
                f"max_step_tokens={self.max_step_tokens} is less than max_num_seqs={self.max_num_seqs}: a step could "
                "not give every running sequence one token; raise the first or lower the second"
            )


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer must look like: `json_object`, a `json_schema` (`source` is its JSON text) or a `regex`."""

    kind: Literal["json_object", "json_schema", "regex"]
    source: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep everything.

    A token's logit is edited first, in this order: divided (where it is above 0; else multiplied) by
    `repetition_penalty` if the token stands in prompt or output (CTRL, https://arxiv.org/abs/1909.05858); lowered by
    `presence_penalty` if it stands in the output and by `frequency_penalty` for each time it does; raised by its
    `logit_bias` of (token id, bias) pairs. Then temperature, `top_k`, `top_p`, and of what is left the tokens at least
    `min_p` times as likely as the likeliest.

    End tokens and stop strings cannot end an answer before `min_tokens`; `stop_token_ids` end one as the model's own
    end token does. `ignore_eos` runs to `max_tokens`. `grammar` keeps an answer to a form and ends it when it is
    complete; it allows none of the other ways to end. `seed` None takes one from the request's arrival number.
    `logprobs` n asks for the chosen token's log-probability and the n best, of the model's own distribution (before
    edits, temperature and cuts).
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        _require_positive("max_tokens", self.max_tokens)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest(f"temperature={self.temperature} is not a number >= 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p={self.top_p} is outside (0, 1]; 1 keeps every token")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k={self.top_k} is negative; 0 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p={self.min_p} is outside [0, 1]; 0 keeps every token")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop holds an empty string, which would stop at once; leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise InvalidRequest(f"logprobs={self.logprobs} is outside 0..20")
        self._check_edits()
        self._check_ends()

    def _check_edits(self) -> None:
        if not 1 / MAX_EDIT <= self.repetition_penalty <= MAX_EDIT:
            raise InvalidRequest(
                f"repetition_penalty={self.repetition_penalty} is outside {1 / MAX_EDIT:g}..{MAX_EDIT:g}; "
                "1 changes nothing"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MAX_EDIT:
                raise InvalidRequest(
                    f"{name}={getattr(self, name)} is not a number within +-{MAX_EDIT:g}; 0 changes nothing"
                )
        if any(token_id < 0 or not abs(bias) <= MAX_EDIT for token_id, bias in self.logit_bias):
            raise InvalidRequest(
                f"logit_bias needs token ids >= 0 and biases within +-{MAX_EDIT:g}; use -100 to rule a token out"
            )
        if len({token_id for token_id, _ in self.logit_bias}) != len(self.logit_bias):
            raise InvalidRequest("logit_bias names a token twice; give each token one bias")

    def _check_ends(self) -> None:
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequest(f"min_tokens={self.min_tokens} is outside 0..max_tokens={self.max_tokens}")
        if any(token_id < 0 for token_id in self.stop_token_ids):
            raise InvalidRequest(f"stop_token_ids={list(self.stop_token_ids)} holds a negative id; leave it out")
        if self.grammar is None:
            return
        for name in ("stop", "stop_token_ids", "min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise InvalidRequest(f"{name} does not go with grammar, which itself says where the answer ends")


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
