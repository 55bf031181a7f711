"""Text deltas: whole characters only, no part of a stop string, and together exactly what the tokens say."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.engine.text import REPLACEMENT, TextStream, token_bytes
from tests.tiny_model import build_tokenizer

TOKENIZER: Any = build_tokenizer()


def stream(token_ids: list[int], stop: tuple[str, ...] = (), prompt: str = "Say hello.") -> tuple[list[str], bool]:
    """Push all tokens until a stop string comes; return the deltas, the last from `finish`."""
    text = TextStream(TOKENIZER, tuple(TOKENIZER.encode(prompt)), stop=stop)
    deltas = []
    for token_id in token_ids:
        deltas.append(text.push(token_id))
        if text.is_stopped:
            break
    return [*deltas, text.finish()], text.is_stopped


SAMPLES = [
    "Bees make honey.",
    "  two  spaces\n\nlines",
    "naïve café",
    "日本語のテスト",
    "👩‍👩‍👧 family 🇯🇵",
    "a\u0301 e\u0302",
    "12345",
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_deltas_add_up_and_hold_whole_characters(sample: str) -> None:
    """The tiny tokenizer has one token per byte of most characters, so every border inside one is met."""
    token_ids = TOKENIZER.encode(sample, add_special_tokens=False)
    deltas, _ = stream(token_ids)
    assert "".join(deltas) == sample
    assert not any(REPLACEMENT in delta for delta in deltas)
    if not sample.isascii():
        assert len(token_ids) > len(sample) and "" in deltas


@settings(max_examples=60, deadline=None)
@given(sample=st.text(max_size=30), stop=st.text(min_size=1, max_size=4))
def test_any_text_and_any_stop(sample: str, stop: str) -> None:
    if REPLACEMENT in sample:
        return
    deltas, is_stopped = stream(TOKENIZER.encode(sample, add_special_tokens=False), (stop,))
    assert is_stopped == (stop in sample)
    assert "".join(deltas) == sample.split(stop)[0]


def test_special_tokens_give_no_text() -> None:
    token_ids = [*TOKENIZER.encode("Hello!"), TOKENIZER.eos_token_id, *TOKENIZER.encode(" Bees")]
    assert "".join(stream(token_ids)[0]) == "Hello! Bees"


def test_an_unfinished_character_is_dropped() -> None:
    token_ids = TOKENIZER.encode("ok 👩", add_special_tokens=False)
    assert "".join(stream(token_ids[:-1])[0]) == "ok "


def test_a_stop_string_across_tokens_never_leaks() -> None:
    """Nothing of the stop string goes out, not even while it might still become something else."""
    sample = "one STOPPED two STOP three"
    token_ids = [token for letter in sample for token in TOKENIZER.encode(letter, add_special_tokens=False)]
    deltas, is_stopped = stream(token_ids, ("STOP t", "zzz"))
    assert is_stopped and "".join(deltas) == "one STOPPED two "
    assert "".join(stream(token_ids, ("STOP",))[0]) == "one "


class Bytes:
    """A tokenizer whose tokens are any bytes, as merges of byte-level BPE may be."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return b"".join(self.tokens[token_id] for token_id in token_ids).decode(errors="replace")


@pytest.mark.parametrize("may_stop", [True, False])
def test_a_stop_string_before_half_a_character_does_not_leak_at_the_end(may_stop: bool) -> None:
    """The token that completes it also begins a character, so its text waits; then the answer is cut off."""
    text = TextStream(Bytes(b"one ST", b"OP \xe2"), (), stop=("STOP",))
    assert [text.push(token_id, may_stop=may_stop) for token_id in (0, 1)] == ["one ", ""]
    assert text.finish() == ("" if may_stop else "STOP ")


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_bytes_of_tokens_add_up(sample: str) -> None:
    """Also where each token alone is no text."""
    token_ids = TOKENIZER.encode(sample, add_special_tokens=False)
    assert b"".join(token_bytes(TOKENIZER, token_id) for token_id in token_ids) == sample.encode()
    assert token_bytes(TOKENIZER, 2) == b"<|im_end|>"


def test_byte_fallback_tokens_are_their_byte() -> None:
    class Fallback(Bytes):
        def convert_ids_to_tokens(self, token_id: int) -> str:
            return f"<0x{self.tokens[token_id].hex().upper()}>"

    assert token_bytes(Fallback(b"\xe2"), 0) == b"\xe2"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    token_ids = TOKENIZER.encode("abc def", add_special_tokens=False)
    assert "".join(stream(token_ids, ("def", "c", "bc"))[0]) == "a"


def test_held_text_comes_out_at_the_end() -> None:
    token_ids = TOKENIZER.encode("almost ST", add_special_tokens=False)
    deltas, is_stopped = stream(token_ids, ("STOP",))
    assert not is_stopped and deltas[-1].endswith("ST") and "".join(deltas) == "almost ST"


@settings(max_examples=60, deadline=None)
@given(sample=st.text(alphabet="abST ", max_size=24), stop=st.text(alphabet="abST ", min_size=1, max_size=3))
def test_a_stop_string_that_ends_too_early_is_text_like_any_other(sample: str, stop: str) -> None:
    """One token per letter, none may stop before the eighth; a stop string may begin earlier and end later."""
    text = TextStream(TOKENIZER, (), stop=(stop,))
    deltas = []
    for num, letter in enumerate(sample, start=1):
        deltas.append(text.push(TOKENIZER.encode(letter, add_special_tokens=False)[0], may_stop=num >= 8))
        if text.is_stopped:
            break
    said = "".join([*deltas, text.finish()])
    expected, is_stopped = plain_stop(sample, stop, first_end=8)
    assert (said, text.is_stopped) == (expected, is_stopped)


def plain_stop(sample: str, stop: str, *, first_end: int) -> tuple[str, bool]:
    """Letter by letter: a hit that ends before `first_end` letters is passed over, and so are its letters."""
    passed = 0
    for end in range(1, len(sample) + 1):
        if sample[passed:end].endswith(stop):
            if end >= first_end:
                return sample[: end - len(stop)], True
            passed = end
    return sample, False
