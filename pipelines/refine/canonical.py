"""The canonical form of a row, and the key under which two rows count as the same.

Kept rows are written in canonical form; the key goes further (no case, no white space beyond single spaces) and is
only compared, never written.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence

import rfc8785

Messages = Sequence[Mapping[str, str]]

LINE_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
"""Everything Unicode calls a mandatory line break (UAX 14), beside the line feed itself."""

SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
"""Space separators (category Zs) other than the plain space."""

INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff]")
"""Control characters and zero-width spaces; joiners (U+200C, U+200D) stay, since scripts and emoji need them."""

FENCE = re.compile(r"(^[ \t]*```.*?(?:^[ \t]*```[ \t]*$|\Z))", re.MULTILINE | re.DOTALL)
"""A fenced block of code, in which runs of spaces carry meaning."""


def canonical_text(text: str) -> str:
    """Return `text` in NFC with one kind of line break and of space, nothing invisible, no white space at the ends.

    Semantics: idempotent. Indentation and fenced code keep their spaces; elsewhere a run of spaces or tabs inside a
    line becomes one space, and more than one empty line becomes one.
    Source: Unicode Standard Annex 15 (https://www.unicode.org/reports/tr15/) for NFC.
    """
    text = LINE_BREAKS.sub("\n", text)
    text = SPACES.sub(" ", INVISIBLE.sub("", text))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    pieces = FENCE.split(text)
    # re.split with one group alternates prose, fence, prose, ...
    pieces[::2] = [re.sub(r"(?<=\S)[ \t]+(?=\S)", " ", prose) for prose in pieces[::2]]
    pieces[::2] = [re.sub(r"\n{3,}", "\n\n", prose) for prose in pieces[::2]]
    return unicodedata.normalize("NFC", "".join(pieces).strip())


def canonical_messages(messages: Messages) -> list[dict[str, str]]:
    """Return the messages with each content in canonical form; roles and order stay."""
    return [{"role": message["role"], "content": canonical_text(message["content"])} for message in messages]


def comparison_text(text: str) -> str:
    """Return `text` without case, formatting characters and white space beyond single spaces.

    Canonical caseless matching (Unicode 15, definition D145: fold after NFD, compare after NFC), so `STRASSE` equals
    `straße`. Compatibility forms are not folded: `x²` differs from `x2`.
    """
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", " ".join(canonical_text(visible).split()))


def duplicate_key(messages: Messages) -> bytes:
    """Return 32 bytes that are equal for two rows exactly when their roles and comparison texts are equal (SHA-256)."""
    hasher = hashlib.sha256()
    for message in messages:
        for part in (message["role"], comparison_text(message["content"])):
            encoded = part.encode()
            hasher.update(len(encoded).to_bytes(8, "big") + encoded)
    return hasher.digest()


def content_id(messages: Messages) -> str:
    """Return the digest of a row's content: SHA-256 of RFC 8785 {"messages": [{"content", "role"}, ...]}."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return f"sha256:{hashlib.sha256(rfc8785.dumps({'messages': plain})).hexdigest()}"
