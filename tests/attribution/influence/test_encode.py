"""Chat messages to tokens: what carries loss, and that an example starts with its prompt."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from attribution.influence.encode import EncodeError, encode_example, encode_prompt


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def targets(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


def test_only_the_answer_and_its_end_carry_loss(tokenizer: Any) -> None:
    input_ids, labels = encode_example(tokenizer, turns("What colour is grass?", "Grass is green."), max_length=64)
    assert targets(tokenizer, labels) == "Grass is green.<|im_end|>"
    assert input_ids[-1] == tokenizer.eos_token_id == labels[-1]
    assert all(label in (-100, token) for token, label in zip(input_ids, labels, strict=True))


def test_every_assistant_turn_carries_loss(tokenizer: Any) -> None:
    messages = turns("a", "first", "b", "second")
    input_ids, labels = encode_example(tokenizer, messages, max_length=None)
    assert targets(tokenizer, labels) == "first<|im_end|>second<|im_end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(input_ids) == whole.rstrip("\n")


def test_a_user_turn_after_the_last_answer_is_left_out(tokenizer: Any) -> None:
    with_tail = encode_example(tokenizer, turns("a", "b", "c"), max_length=None)
    assert with_tail == encode_example(tokenizer, turns("a", "b"), max_length=None)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.text(max_size=12), min_size=2, max_size=6), system=st.booleans())
def test_an_example_starts_with_its_prompt(tokenizer: Any, contents: list[str], system: bool) -> None:
    messages = turns(*contents[: len(contents) // 2 * 2])
    if system:
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    prompt = encode_prompt(tokenizer, messages[:-1])
    input_ids, labels = encode_example(tokenizer, messages, max_length=None)
    assert input_ids[: len(prompt)] == prompt
    assert labels[len(prompt)] != -100


def test_special_tokens_inside_an_answer_do_not_end_it_early(tokenizer: Any) -> None:
    _, labels = encode_example(tokenizer, turns("a", "one<|im_end|>two"), max_length=None)
    assert targets(tokenizer, labels) == "one<|im_end|>two<|im_end|>"


def test_cutting_keeps_both_lists_equal(tokenizer: Any) -> None:
    input_ids, labels = encode_example(tokenizer, turns("a", "a long answer that will be cut"), max_length=16)
    assert len(input_ids) == len(labels) == 16


@pytest.mark.parametrize(
    ("messages", "max_length", "message"),
    [
        (turns("only a question"), None, "no assistant turn"),
        ([{"role": "assistant", "content": "hello"}], None, r"messages\[0\].role"),
        (turns("a question that fills the room", "answer"), 8, "max_length=8"),
    ],
)
def test_what_cannot_be_encoded_is_named(
    tokenizer: Any, messages: list[dict[str, str]], max_length: int | None, message: str
) -> None:
    with pytest.raises(EncodeError, match=message):
        encode_example(tokenizer, messages, max_length=max_length)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat_template"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "start with"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "could not learn to stop"),
    ],
)
def test_a_template_that_cannot_teach_is_named(tiny_base: Path, template: str | None, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    with pytest.raises(EncodeError, match=message) as caught:
        encode_example(tokenizer, turns("a", "b", "c", "d"), max_length=None)
    assert str(tiny_base) in str(caught.value)
