"""Turns a growing list of tokens into text deltas that never hold part of a character or of a stop string."""

import re
from typing import Any

REPLACEMENT = "\ufffd"
# Byte-level BPE (GPT-2) writes these bytes as themselves and the others, in order, as the letters from 256 on.
_PLAIN_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PLAIN_BYTES} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PLAIN_BYTES)))
}
# Tokens of the prompt decoded along, so that a tokenizer that writes spaces by context does so (sentencepiece).
CONTEXT_TOKENS = 6


class TextStream:
    """Incremental decoding of one sequence. `tokenizer` is a transformers tokenizer; special tokens give no text."""

    def __init__(self, tokenizer: Any, prompt_token_ids: tuple[int, ...], *, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._token_ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        # Tokens [0, _prefix) are done with; the text of [_prefix, _read) has been taken over already.
        self._prefix = 0
        self._read = len(self._token_ids)
        self._held = ""
        self._may_stop = True
        self.is_stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add one token and return the text that is now certain; sets `is_stopped` when a stop string came.

        With `may_stop` False a stop string that this token completes is text like any other.
        """
        self._token_ids.append(token_id)
        self._may_stop = may_stop
        done, known = self._decode(self._prefix, self._read), self._decode(self._prefix, len(self._token_ids))
        if len(known) <= len(done) or known.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        return self._release(self._held + known[len(done) :], may_stop=may_stop)

    def finish(self) -> str:
        """Return the text held back in case a stop string came, up to one that an unfinished character hid.

        Bytes of that character are dropped.
        """
        held, self._held = self._held, ""
        if self.is_stopped:
            return ""
        done, known = self._decode(self._prefix, self._read), self._decode(self._prefix, len(self._token_ids))
        text = held + known[len(done) :].rstrip(REPLACEMENT)
        hits = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return text[: min(hits)] if hits and self._may_stop else text

    def _release(self, text: str, *, may_stop: bool) -> str:
        """Split `text` into what can go out and what may be the start of a stop string."""
        start = 0
        while hit := min(((at, stop) for stop in self._stop if (at := text.find(stop, start)) >= 0), default=None):
            if may_stop:
                self.is_stopped = True
                self._held = ""
                return text[: hit[0]]
            start = hit[0] + len(hit[1])
        keep = max((_overlap(text[start:], stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._token_ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes of one token alone, also of one that is a part of a character."""
    text = str(tokenizer.decode([token_id]))
    if REPLACEMENT not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(fallback[1])
    return bytes(_BYTE_OF[letter] for letter in piece) if _BYTE_OF.keys() >= set(piece) else text.encode()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
