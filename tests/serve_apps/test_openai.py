"""What the OpenAI surface accepts and refuses, and the words of each refusal."""

import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.errors import ApiError, Problem
from serve_apps.openai import (
    ChatRequest,
    CompletionRequest,
    Parsed,
    output_digest,
    parse,
    sampling_of,
)

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "Hi"}


def chat(**fields: Any) -> Parsed:
    return parse(json.dumps({**CHAT, **fields}).encode(), ChatRequest)


def completion(**fields: Any) -> Parsed:
    return parse(json.dumps({**COMPLETION, **fields}).encode(), CompletionRequest)


def refusal(raw: bytes, kind: Any = ChatRequest) -> Problem:
    with pytest.raises(ApiError) as caught:
        parse(raw, kind)
    return caught.value.problem


def chat_refusal(**fields: Any) -> Problem:
    return refusal(json.dumps({**CHAT, **fields}).encode())


def test_the_request_digest_is_of_the_json_as_the_caller_wrote_it_whatever_its_spacing() -> None:
    body = {**CHAT, "temperature": 0.5, "user": "u1", "stop": ["a"]}
    expected = "sha256:" + hashlib.sha256(rfc8785.dumps(body)).hexdigest()
    assert parse(json.dumps(body, indent=3).encode(), ChatRequest).digest == expected
    reordered = json.dumps(dict(reversed(body.items()))).encode()
    assert parse(reordered, ChatRequest).digest == expected
    assert chat(temperature=0.25).digest != expected


def test_the_output_digest_covers_text_and_tokens() -> None:
    assert output_digest("a", (1,)) == "sha256:" + hashlib.sha256(b'{"text":"a","token_ids":[1]}').hexdigest()
    assert len({output_digest("a", (1,)), output_digest("a", (2,)), output_digest("b", (1,))}) == 3


def test_messages_reach_the_template_in_plain_form() -> None:
    parsed = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        ]
    )
    assert isinstance(parsed.request, ChatRequest)
    assert parsed.request.normalised() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"model":', "Expecting value"),
        (b"[]", "expected an object, got list"),
        (b'{"model": NaN}', "NaN is not JSON"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (b"\xff\xfe{", "decode"),
        (b"[" * 200_000, "recursion"),
        (b'{"model": "a", "messages": [{"role": "user", "content": "\\ud800"}]}', "UTF-8"),
    ],
)
def test_malformed_json_is_refused_with_the_reason(raw: bytes, reason: str) -> None:
    problem = refusal(raw)
    assert (problem.status, problem.type) == (400, "invalid_request_error")
    assert reason in problem.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"seed": 2**53}, "seed", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], param: str, code: str) -> None:
    problem = chat_refusal(**fields)
    assert (problem.status, problem.param, problem.code) == (400, param, code)
    assert param in problem.message
    assert problem.body()["error"]["param"] == param


def test_a_misspelt_field_is_answered_with_the_right_one() -> None:
    assert "Did you mean `temperature`?" in chat_refusal(temprature=1).message
    assert "Did you mean `tools`?" in chat_refusal(tool=[]).message


def test_a_missing_model_is_named() -> None:
    problem = refusal(b'{"messages": []}')
    assert (problem.code, problem.param) == ("missing_required_parameter", "model")


def test_fields_that_leave_the_answer_alone_are_accepted() -> None:
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False}
    neutral = {"n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}}
    nulls = {"functions": None, "seed": None, "stop": None, "frequency_penalty": 0, "presence_penalty": 0.0}
    assert chat(**ignored, **neutral, **nulls).request == chat().request


@pytest.mark.parametrize(
    ("prompt", "expected"), [("Hi", "Hi"), (["Hi"], "Hi"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ("", "")]
)
def test_a_prompt_is_one_string_or_one_list_of_tokens(prompt: Any, expected: Any) -> None:
    request = completion(prompt=prompt).request
    assert isinstance(request, CompletionRequest)
    assert request.single_prompt() == expected


@pytest.mark.parametrize(("prompt", "param"), [(["a", "b"], "prompt"), ([], "prompt"), ([1, "b"], "prompt[0]")])
def test_other_prompts_are_refused(prompt: Any, param: str) -> None:
    assert refusal(json.dumps({**COMPLETION, "prompt": prompt}).encode(), CompletionRequest).param == param


def test_sampling_follows_openais_defaults_and_draws_a_seed_that_can_be_recorded() -> None:
    sampling = sampling_of(chat().request, num_prompt=10, default_max_tokens=20, limit=100)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 20, ())
    assert sampling.seed is not None
    greedy = sampling_of(chat(temperature=0).request, num_prompt=10, default_max_tokens=20, limit=100)
    assert (greedy.temperature, greedy.seed) == (0.0, None)


def test_the_newer_name_of_max_tokens_wins_and_one_stop_may_stand_alone() -> None:
    request = chat(max_tokens=7, max_completion_tokens=5, stop="x", seed=3, logprobs=True, top_logprobs=2).request
    sampling = sampling_of(request, num_prompt=1, default_max_tokens=9, limit=100)
    assert (sampling.max_tokens, sampling.stop, sampling.seed, sampling.logprobs) == (5, ("x",), 3, 2)


@given(num_prompt=st.integers(0, 40), requested=st.none() | st.integers(1, 40), default=st.integers(1, 40))
def test_prompt_and_answer_never_exceed_the_context(num_prompt: int, requested: int | None, default: int) -> None:
    request = chat(max_tokens=requested).request
    fits = num_prompt + (requested or 1) <= 20
    if not fits:
        with pytest.raises(ApiError) as caught:
            sampling_of(request, num_prompt=num_prompt, default_max_tokens=default, limit=20)
        assert caught.value.problem.code == "context_length_exceeded"
        assert "20 tokens" in caught.value.problem.message
        return
    sampling = sampling_of(request, num_prompt=num_prompt, default_max_tokens=default, limit=20)
    assert num_prompt + sampling.max_tokens <= 20
    assert requested is None or sampling.max_tokens == requested


def test_a_refusal_carries_no_retry_when_retrying_is_useless() -> None:
    assert Problem(500, "m", retry=False).headers() == {"x-should-retry": "false"}
    assert Problem(503, "m", retry_after_s=2).headers() == {"Retry-After": "2"}
    assert Problem(401, "m").headers() == {"WWW-Authenticate": "Bearer"}
