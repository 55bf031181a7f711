"""The canonical form is idempotent and keeps meaning; the comparison text ignores case, white space, the invisible."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.refine.canonical import canonical_text, comparison_text, content_id, duplicate_key


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("  a \t b  ", "a b"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a  \nb", "a\nb"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("e\u0301", "é"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\ufeffa\u200bb\x00c", "abc"),
        ("if x:\n    return  1", "if x:\n    return 1"),
        ("x:\n```py\na  =  1\n```\nb  c", "x:\n```py\na  =  1\n```\nb c"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("Case STAYS", "Case STAYS"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert canonical_text(text) == canonical


@given(st.text(alphabet=st.sampled_from("ab \t\n\r`\u00a0\u2028e\u0301\u200b\ufeff\x85")) | st.text())
def test_canonical_text_is_idempotent_and_nfc(text: str) -> None:
    once = canonical_text(text)
    assert canonical_text(once) == once
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Capital", "the   capital\n"),
        ("straße", "STRASSE"),
        ("é", "E\u0301"),
        ("a\u00adb", "ab"),
        ("a\u200cb", "ab"),
        ("x\n\n y", "x y"),
    ],
)
def test_comparison_ignores_case_space_and_the_invisible(one: str, other: str) -> None:
    assert comparison_text(one) == comparison_text(other)


@pytest.mark.parametrize(("one", "other"), [("x²", "x2"), ("a b", "ab"), ("cafe", "café"), ("a.", "a")])
def test_comparison_keeps_what_means_something(one: str, other: str) -> None:
    assert comparison_text(one) != comparison_text(other)


def test_key_parts_messages_and_roles() -> None:
    def user(*contents: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": content} for content in contents]

    assert duplicate_key(user("a b", "c")) != duplicate_key(user("a", "b c"))
    assert duplicate_key(user("a")) != duplicate_key([{"role": "assistant", "content": "a"}])
    assert duplicate_key(user(" A  b")) == duplicate_key(user("a B"))


def test_content_id_is_that_of_the_published_format() -> None:
    # Computed once with `printf '{"messages":[{"content":"é","role":"user"}]}' | sha256sum`.
    assert content_id([{"role": "user", "content": "é"}]) == GOLDEN_CONTENT_ID


GOLDEN_CONTENT_ID = "sha256:618f00add3e336c54f2d1d7bd910f38c2110873914ee8acd013cbdc0f2ecbfdb"
