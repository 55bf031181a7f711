"""What a caller is told when a request cannot be answered, in OpenAI's form."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One refusal, a value that crosses from replica to gateway; `retry` False tells clients not to try again."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    type: str = "invalid_request_error"
    retry: bool = True
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """Return {"error": {...}} as the OpenAI API writes it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it: when to retry, or that it is useless (the openai client reads both)."""
        headers = {} if self.retry else {"x-should-retry": "false"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class ApiError(Exception):
    """Carries a `Problem` up to the HTTP layer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem.message


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that look like `name`, the closest first."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)


def missing_key() -> ApiError:
    """401: no key at all."""
    remedy = "Send it as `Authorization: Bearer KEY`; `trailmark apikey create NAME` makes one."
    message = f"You didn't provide an API key. {remedy}"
    return ApiError(Problem(401, message, code="invalid_api_key"))


def wrong_key() -> ApiError:
    """401: a key that is unknown or revoked. The key itself is never repeated."""
    message = (
        "Incorrect API key provided: it is unknown or was revoked. `trailmark apikey create NAME` makes a new one."
    )
    return ApiError(Problem(401, message, code="invalid_api_key"))


def unknown_model(model: str, known: Iterable[str]) -> ApiError:
    """404: names what looks like it, else how to list what there is."""
    close = near(model, known)
    hint = (
        f"Did you mean {' or '.join(f'`{name}`' for name in close)}?"
        if close
        else "GET /v1/models lists what is served."
    )
    return ApiError(Problem(404, f"The model `{model}` does not exist. {hint}", code="model_not_found", param="model"))


def context_too_long(*, num_prompt: int, num_requested: int, limit: int, param: str) -> ApiError:
    """400: prompt, or prompt and answer, longer than the context. All counts in tokens."""
    asked = f"your prompt has {num_prompt} tokens" + (
        f" and you asked for {num_requested} more" if num_requested else " and leaves no room for an answer"
    )
    remedy = "Shorten the prompt or lower max_tokens."
    message = f"This model's maximum context length is {limit} tokens, but {asked}. {remedy}"
    return ApiError(Problem(400, message, code="context_length_exceeded", param=param))


def malformed(reason: str) -> ApiError:
    """400: the body is not a JSON object."""
    return ApiError(Problem(400, f"We could not parse the JSON body of your request: {reason}"))


def unsupported(param: str, reason: str) -> ApiError:
    """400: a field OpenAI defines that would change the answer and that this server cannot honour."""
    return ApiError(Problem(400, f"`{param}` is not supported: {reason}", code="unsupported_parameter", param=param))


def invalid(param: str, reason: str) -> ApiError:
    """400: a field with a value it cannot have."""
    return ApiError(Problem(400, f"Invalid value for `{param}`: {reason}", code="invalid_value", param=param))


def unrecognised(param: str, known: Iterable[str]) -> ApiError:
    """400: a field nobody defines, most likely misspelt."""
    close = near(param.rsplit(".", 1)[-1], known)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    message = f"Unrecognized request argument supplied: {param}.{hint}"
    return ApiError(Problem(400, message, code="unknown_parameter", param=param))


def tampered(name: str, digest: str) -> ApiError:
    """500: an adapter whose files or signature are not what was published; clients are told that trying is useless."""
    message = (
        f"The adapter `{name}` is not served: its files do not have the digest {digest} under which it was published, "
        "or lack the signature that this server asks for. Tell the operator."
    )
    return ApiError(Problem(500, message, code="adapter_integrity", type="server_error", param="model", retry=False))


def too_large(limit_bytes: int) -> ApiError:
    """413: body over the limit."""
    return ApiError(Problem(413, f"The request body is larger than {limit_bytes} bytes. Send a shorter prompt."))


def overloaded(reason: str, *, retry_after_s: int = 1) -> ApiError:
    """503: nothing wrong with the request; try again."""
    return ApiError(Problem(503, reason, code="overloaded", type="server_error", retry_after_s=retry_after_s))


def rate_limited(limit: int) -> ApiError:
    """429: this server already holds as many requests as it may."""
    message = f"The server already holds {limit} requests, which is its limit. Try again shortly."
    return ApiError(Problem(429, message, code="rate_limit_exceeded", type="rate_limit_error", retry_after_s=1))


def internal(request_id: str) -> Problem:
    """500: says where to look and nothing about the inside."""
    message = f"The server had an error while processing your request. Quote {request_id} to the operator."
    return Problem(500, message, code="internal_error", type="server_error")
