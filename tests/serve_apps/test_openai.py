"""What the OpenAI surface accepts and refuses, and the words of each refusal."""

import hashlib
import json
import sys
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.engine.config import GrammarSpec, SamplingParams
from serve_apps.errors import ApiError, Problem
from serve_apps.openai import (
    ChatRequest,
    CompletionRequest,
    Parsed,
    output_digest,
    parse,
    sampling_of,
)
from serve_apps.response_format import check_servable

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
        ({"n": 17}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"audio": {"voice": "alloy"}}, "audio", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": "json"}, "response_format", "invalid_value"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern", "missing_required_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
            "invalid_value",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "stric": True}}},
            "response_format.json_schema.stric",
            "unknown_parameter",
        ),
        ({"response_format": {"type": "json_object"}, "stop": "x"}, "stop", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
        ({"logit_bias": [5]}, "logit_bias", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": "1"}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"min_p": 1.1}, "min_p", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
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
    neutral = {"best_of": 1, "tools": [], "tool_choice": "none"}
    nulls = {"functions": None, "seed": None, "stop": None, "n": None, "response_format": None, "logit_bias": None}
    assert chat(**ignored, **neutral, **nulls).request == chat().request


def test_fields_that_ask_for_the_default_change_nothing() -> None:
    neutral = {"n": 1, "response_format": {"type": "text"}, "logit_bias": {}, "frequency_penalty": 0, "min_p": 0}
    assert engine_params(**neutral, repetition_penalty=1, min_tokens=0, seed=1) == engine_params(seed=1)


def engine_params(**fields: Any) -> SamplingParams:
    return sampling_of(chat(**fields).request, num_prompt=10, default_max_tokens=20, limit=100, vocab_size=50)


def test_every_knob_reaches_the_engine() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True, "description": "d"}}
    params = engine_params(
        **{"min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1, "frequency_penalty": 0.5},
        **{"logit_bias": {"3": -100, "49": 2.5}, "response_format": form},
    )
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.2)
    assert (params.presence_penalty, params.frequency_penalty) == (-1.0, 0.5)
    assert params.logit_bias == ((3, -100.0), (49, 2.5))
    # The schema's order of properties is the answer's.
    assert params.grammar == GrammarSpec("json_schema", json.dumps(schema))
    ends = engine_params(min_tokens=4, stop_token_ids=[7])
    assert (ends.min_tokens, ends.stop_token_ids, ends.grammar) == (4, (7,), None)
    assert engine_params(response_format={"type": "regex", "pattern": "a+"}).grammar == GrammarSpec("regex", "a+")
    assert engine_params(response_format={"type": "json_object"}).grammar == GrammarSpec("json_object")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"logit_bias": {"50": 1}}, "logit_bias", "0 to 49"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "'hello' is no token id"),
        ({"logit_bias": {"01": 1}}, "logit_bias", "'01' is no token id"),
        ({"stop_token_ids": [3, 77]}, "stop_token_ids", "77"),
        ({"min_tokens": 30}, "min_tokens", "20 tokens"),
        ({"min_tokens": 30, "max_tokens": 29}, "min_tokens", "29 tokens"),
    ],
)
def test_what_only_the_model_can_tell_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        engine_params(**fields)
    assert (caught.value.problem.status, caught.value.problem.param) == (400, param)
    assert words in caught.value.problem.message


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}},
            "response_format.json_schema.schema",
            "nonsense",
        ),
        ({"type": "regex", "pattern": "("}, "response_format.pattern", "unclosed"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_by_name(form: Any, param: str, words: str) -> None:
    grammar = engine_params(response_format=form).grammar
    assert grammar is not None
    with pytest.raises(ApiError) as caught:
        check_servable(grammar)
    assert (caught.value.problem.param, caught.value.problem.code) == (param, "invalid_value")
    assert words in caught.value.problem.message


def test_without_the_extra_a_form_is_refused_and_the_extra_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ApiError, match=r"trailmark\[structured\]") as caught:
        check_servable(GrammarSpec("json_object"))
    assert (caught.value.problem.param, caught.value.problem.code) == ("response_format", "unsupported_parameter")


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
    sampling = sampling_of(chat().request, num_prompt=10, default_max_tokens=20, limit=100, vocab_size=50)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 20, ())
    assert sampling.seed is not None
    greedy = sampling_of(chat(temperature=0).request, num_prompt=10, default_max_tokens=20, limit=100, vocab_size=50)
    assert (greedy.temperature, greedy.seed) == (0.0, None)


def test_the_newer_name_of_max_tokens_wins_and_one_stop_may_stand_alone() -> None:
    request = chat(max_tokens=7, max_completion_tokens=5, stop="x", seed=3, logprobs=True, top_logprobs=2).request
    sampling = sampling_of(request, num_prompt=1, default_max_tokens=9, limit=100, vocab_size=50)
    assert (sampling.max_tokens, sampling.stop, sampling.seed, sampling.logprobs) == (5, ("x",), 3, 2)


@given(num_prompt=st.integers(0, 40), requested=st.none() | st.integers(1, 40), default=st.integers(1, 40))
def test_prompt_and_answer_never_exceed_the_context(num_prompt: int, requested: int | None, default: int) -> None:
    request = chat(max_tokens=requested).request
    fits = num_prompt + (requested or 1) <= 20
    if not fits:
        with pytest.raises(ApiError) as caught:
            sampling_of(request, num_prompt=num_prompt, default_max_tokens=default, limit=20, vocab_size=50)
        assert caught.value.problem.code == "context_length_exceeded"
        assert "20 tokens" in caught.value.problem.message
        return
    sampling = sampling_of(request, num_prompt=num_prompt, default_max_tokens=default, limit=20, vocab_size=50)
    assert num_prompt + sampling.max_tokens <= 20
    assert requested is None or sampling.max_tokens == requested


def test_a_refusal_carries_no_retry_when_retrying_is_useless() -> None:
    assert Problem(500, "m", retry=False).headers() == {"x-should-retry": "false"}
    assert Problem(503, "m", retry_after_s=2).headers() == {"Retry-After": "2"}
    assert Problem(401, "m").headers() == {"WWW-Authenticate": "Bearer"}
