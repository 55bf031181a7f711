"""OpenAI requests: what is accepted, what is refused and why, and the form in which an accepted one goes on.

The rule for fields: those that OpenAI defines and that leave the answer alone are ignored; those that would change the
answer and that we cannot honour are refused by name; those nobody defines are refused as likely misspellings.
"""

import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from serve_apps.engine.config import SamplingParams
from serve_apps.errors import ApiError, Problem, context_too_long, invalid, malformed, unrecognised, unsupported
from serve_apps.response_format import FIELDS, TAGS, ResponseFormat, TextFormat, grammar_of

MAX_STOPS = 4
MAX_CHOICES = 16
MAX_SAFE_INTEGER = 2**53 - 1  # RFC 8785 numbers; the request digest covers the seed

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)
# Field -> (values that ask for nothing, why anything else is refused).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "choices are not ranked; ask for `n` and choose"),
    "tools": (([],), "tool calls are not served"),
    "tool_choice": (("none", "auto"), "tool calls are not served"),
    "functions": (([],), "function calls are not served"),
    "function_call": (("none", "auto"), "function calls are not served"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "insertion is not served"),
    "modalities": ((["text"],), "only text is served"),
    "audio": ((), "only text is served"),
    "prediction": ((), "predicted outputs are not served"),
    "web_search_options": ((), "web search is not served"),
    "reasoning_effort": ((), "the models have no reasoning effort"),
    "verbosity": (("medium",), "the models have no verbosity"),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    """What to add to a stream. Obfuscation only pads chunks; there is none to turn off."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def normalised(self) -> dict[str, str]:
        """Return {"role", "content"} as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class PromptReference(_Body):
    """A registered prompt template, in the form of OpenAI's Responses API; without `version` the newest."""

    id: str = Field(min_length=1, max_length=128)
    version: str | None = Field(None, pattern="^[1-9][0-9]{0,8}$")
    variables: dict[str, str] | None = None


class _Common(_Body):
    model: str = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    min_tokens: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool | None = None
    return_token_ids: StrictBool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_choices(self) -> int:
        """Answers wanted."""
        return self.n or 1

    @property
    def requested_tokens(self) -> int | None:
        """Tokens asked for, None when left to the server."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted per token; None for no log-probabilities."""
        return None

    @property
    def prompt_reference(self) -> PromptReference | None:
        """The registered prompt that the request names; None when it names none."""
        return None


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    prompt: PromptReference | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt_reference(self) -> PromptReference | None:
        """The registered prompt that the request names."""
        return self.prompt

    def normalised(self) -> list[dict[str, str]]:
        """Return the messages as chat templates take them."""
        return [message.normalised() for message in self.messages]


class CompletionRequest(_Common):
    """POST /v1/completions. The prompt is a string or token ids, or a list that holds exactly one of these."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def single_prompt(self) -> str | list[int]:
        """Return the one prompt: text, or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if prompt and isinstance(prompt[0], int):
            return prompt
        if not prompt:
            raise invalid("prompt", "an empty list; give a string or token ids")
        if len(prompt) > 1:
            raise unsupported(
                "prompt", f"a list of {len(prompt)} prompts; send one request per prompt, each gets its own receipt"
            )
        return prompt[0] if isinstance(prompt[0], str) else cast(list[int], prompt[0])


@dataclass(frozen=True)
class Parsed:
    """An accepted request and the digest of the JSON it came as."""

    request: ChatRequest | CompletionRequest
    digest: str


def parse(raw: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> Parsed:
    """Validate a body. The digest is SHA-256 of its RFC 8785 form, so that a caller can compute it from what they sent.

    Raises ApiError in OpenAI's form naming the field.
    """
    body = _load(raw)
    refuse_unsupported(body)
    try:
        request = kind.model_validate(_without_neutral(body))
        digest = canonical_digest(body)
    except ValidationError as error:
        raise _refusal(error, kind) from None
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise malformed(str(error)) from None
    _check_combinations(request)
    return Parsed(request, digest)


def canonical_digest(value: Any) -> str:
    """Return `sha256:<hex>` of the RFC 8785 form of a JSON value."""
    return "sha256:" + hashlib.sha256(rfc8785.dumps(value)).hexdigest()


def output_digest(text: str, token_ids: tuple[int, ...]) -> str:
    """Return the digest a receipt gives of an answer."""
    return canonical_digest({"text": text, "token_ids": list(token_ids)})


def sampling_of(
    request: ChatRequest | CompletionRequest, *, num_prompt: int, default_max_tokens: int, limit: int, vocab_size: int
) -> SamplingParams:
    """Return engine parameters. Temperature is 1 when left out, as OpenAI has it; a seed is drawn when none is given.

    `limit` is the context length in tokens. Raises ApiError when prompt and answer do not fit, or a token id is none.
    """
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    requested = request.requested_tokens
    room = limit - num_prompt
    if room < 1 or (requested is not None and requested > room):
        raise context_too_long(num_prompt=num_prompt, num_requested=requested or 0, limit=limit, param=param)
    max_tokens, min_tokens = requested or min(default_max_tokens, room), request.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid("min_tokens", f"{min_tokens} is more than the {max_tokens} tokens the answer may have; lower it")
    temperature = 1.0 if request.temperature is None else float(request.temperature)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=1.0 if request.top_p is None else float(request.top_p),
        top_k=request.top_k or 0,
        stop=_stops(request.stop),
        seed=secrets.randbelow(2**31) if request.seed is None and temperature > 0 else request.seed,
        logprobs=request.num_logprobs,
        ignore_eos=bool(request.ignore_eos),
        min_p=float(request.min_p or 0),
        repetition_penalty=1.0 if request.repetition_penalty is None else float(request.repetition_penalty),
        presence_penalty=float(request.presence_penalty or 0),
        frequency_penalty=float(request.frequency_penalty or 0),
        logit_bias=_biases(request.logit_bias or {}, vocab_size),
        min_tokens=min_tokens,
        stop_token_ids=_token_ids("stop_token_ids", request.stop_token_ids or [], vocab_size),
        grammar=grammar_of(request.response_format),
    )


def now_us() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raise ApiError naming the first field that would change the answer in a way we cannot honour."""
    for name, (neutral, reason) in REFUSED.items():
        value = body.get(name)
        # `1 == True` in Python, not in JSON: the types must match too.
        if value is not None and not any(value == calm and type(value) is type(calm) for calm in neutral):
            raise unsupported(name, reason)
    messages = body.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
            if isinstance(message, dict) and message.get(name):
                raise unsupported(f"messages[{index}].{name}", "only text is served")


def _load(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise malformed(str(error)) from None
    if not isinstance(body, dict):
        raise malformed(f"expected an object, got {type(body).__name__}")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return body


def _without_neutral(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out ignored and neutral fields, and nulls within messages (clients echo `refusal: null` and the like)."""
    kept = {name: value for name, value in body.items() if name not in IGNORED and name not in REFUSED}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_without_nulls(message) for message in kept["messages"]]
    return kept


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    empty = {name for name, value in message.items() if value is None or (name == "annotations" and value == [])}
    return {name: value for name, value in message.items() if name not in empty}


def _check_combinations(request: ChatRequest | CompletionRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "only allowed when `stream` is true")
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "only allowed when `logprobs` is true")
    if isinstance(request, CompletionRequest):
        request.single_prompt()
    if isinstance(request, ChatRequest) and request.prompt is not None and request.normalised()[0]["role"] == "system":
        raise invalid("messages[0].role", "a registered `prompt` is the system message itself; leave yours out")
    _stops(request.stop)
    if request.response_format is not None and not isinstance(request.response_format, TextFormat):
        for name in ("stop", "stop_token_ids", "min_tokens", "ignore_eos"):
            if getattr(request, name):
                reason = "does not go with `response_format`, which itself says where the answer ends; leave it out"
                raise invalid(name, reason)


def _biases(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs of OpenAI's {"token id": bias}."""
    wrong = next((key for key in biases if not (key.isascii() and key.isdigit() and str(int(key)) == key)), None)
    if wrong is not None:
        raise invalid("logit_bias", f"the key {wrong!r} is no token id; use whole numbers in quotes")
    token_ids = _token_ids("logit_bias", [int(key) for key in biases], vocab_size)
    return tuple((token_id, float(bias)) for token_id, bias in zip(token_ids, biases.values(), strict=True))


def _token_ids(param: str, token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    wrong = next((token_id for token_id in token_ids if token_id >= vocab_size), None)
    if wrong is not None:
        raise invalid(param, f"{wrong} is no token id of this model; they are 0 to {vocab_size - 1}")
    return tuple(token_ids)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"{len(stops)} sequences; at most {MAX_STOPS} are allowed")
    if any(not text for text in stops):
        raise invalid("stop", "an empty string would stop at once; leave it out")
    return stops


def _refusal(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """Turn a finding of pydantic's into OpenAI's form: of a union's findings the deepest says most."""
    findings = error.errors(include_url=False)
    of_field = [finding for finding in findings if finding["loc"][:1] == findings[0]["loc"][:1]]
    first = max(of_field, key=lambda finding: len(finding["loc"]))
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return unrecognised(param, _known_beside(param, kind))
    if first["type"] == "missing":
        return ApiError(
            Problem(400, f"Missing required parameter: `{param}`.", code="missing_required_parameter", param=param)
        )
    wanted = first["msg"][:1].lower() + first["msg"][1:]
    return invalid(param, f"{wanted}, got {json.dumps(first['input'], default=str)[:80]}")


def _known_beside(param: str, kind: type[BaseModel]) -> list[str]:
    """Return the names that are known where `param` stands."""
    if param.startswith("prompt.") and kind is ChatRequest:
        return list(PromptReference.model_fields)
    if param.startswith("messages["):
        return list(ChatMessage.model_fields)
    return list(FIELDS) if param.startswith("response_format") else [*kind.model_fields, *IGNORED, *REFUSED]


def _path(loc: tuple[int | str, ...]) -> str:
    """Return `messages[0].content` of a pydantic location, without the names that pydantic gives to union members."""
    path = ""
    if loc[:1] == ("response_format",) and loc[1:2] and loc[1] in TAGS:
        loc = (loc[0], *loc[2:])
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part not in ("str", "int", "TextPart"):
            path += f".{part}" if path else part
    return path or "body"
