"""Chat messages to token ids: the one place, so that training, benchmark, influence and serving see the same tokens.

Text is cut where the assistant starts and stops speaking, and each piece is tokenised alone. That is what a model
meets when it generates (prompt ids first, then its own), so an encoded example always starts with the encoded prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import UserError

IGNORED_LABEL = -100
"""Label of a token that carries no loss (the value that transformers and torch's cross entropy skip)."""

Message = Mapping[str, str]


class EncodeError(UserError):
    """The messages or the chat template cannot be turned into a training example or a prompt."""


def encode_example(
    tokenizer: Any, messages: Sequence[Message], *, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Return (input ids, labels) of a conversation; labels are -100 except on what the assistant said.

    An assistant turn's target is its content and the end-of-turn token. What follows the last assistant turn is left
    out. Both lists have equal length, at most `max_length` tokens (cut at the end). Raises EncodeError when no
    assistant turn exists, when no target token is left inside `max_length`, or when the template does not continue
    its own prefix.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise EncodeError("messages: no assistant turn; a training example needs one to learn from")
    for text, is_target in _segments(tokenizer, messages[: last + 1]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if is_target else [IGNORED_LABEL] * len(ids)
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    if all(label == IGNORED_LABEL for label in labels):
        raise EncodeError(
            f"messages: no token of the answer fits in max_length={max_length}; "
            "raise train.max_length or shorten the prompt"
        )
    return input_ids, labels


def num_targets(labels: Sequence[int]) -> int:
    """Return how many tokens carry loss; the first token of a row has nothing to be predicted from."""
    return sum(label != IGNORED_LABEL for label in labels[1:])


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids that ask the model for the next assistant turn after `messages`. Raises EncodeError."""
    segments = _segments(tokenizer, messages)
    spoken = sum(len(text) for text, _ in segments)
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    _require_prefix(tokenizer, "".join(text for text, _ in segments), prompt)
    pieces = [*(text for text, _ in segments), prompt[spoken:]]
    return [token for text in pieces if text for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _segments(tokenizer: Any, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Return (text, is target) up to the end-of-turn token of the last assistant turn; empty when there is none."""
    segments: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise EncodeError("messages[0].role: 'assistant' speaks first; put the user's message before it")
        before = _render(tokenizer, messages[:index], add_generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        _require_prefix(tokenizer, done, before)
        _require_prefix(tokenizer, before, after)
        end = _end_of_turn(tokenizer, after, start=len(before))
        segments += [(before[len(done) :], False), (after[len(before) : end], True)]
        done = after[:end]
    return segments


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise EncodeError(
            f"tokenizer {_name(tokenizer)}: it has no chat_template; add chat_template.jinja to the model folder"
        )
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


def _require_prefix(tokenizer: Any, prefix: str, text: str) -> None:
    if not text.startswith(prefix):
        raise EncodeError(
            f"chat template of {_name(tokenizer)}: a longer conversation does not start with the text of the shorter "
            f"one (expected {prefix[-60:]!r} to be kept); use a template that only appends"
        )


def _end_of_turn(tokenizer: Any, text: str, *, start: int) -> int:
    """Return the index just past the last special token of an assistant turn (the token that ends it)."""
    ends = [
        text.rfind(token, start) + len(token) for token in tokenizer.all_special_tokens if text.rfind(token, start) >= 0
    ]
    if not ends:
        raise EncodeError(
            f"chat template of {_name(tokenizer)}: no special token ends an assistant turn, so a model could not learn "
            f"to stop; end the turn with {tokenizer.eos_token!r}"
        )
    return max(ends)


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
