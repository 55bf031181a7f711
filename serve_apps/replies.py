"""OpenAI responses: whole completions, stream chunks, log-probabilities and the list of models."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_apps.calls import Answer, Call
from serve_apps.engine.config import TokenLogprob

LOWEST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON cannot carry

# Token id -> the text, and the bytes, of that token alone.
TokenText = Callable[[int], str]
TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True)
class ReplyForm:
    """The replies to one request: `calls` holds one call per choice, in order.

    The two endpoints differ in object names, and in how a choice carries text and log-probabilities.
    """

    is_chat: bool
    token_text: TokenText
    token_bytes: TokenBytes
    calls: tuple[Call, ...]
    return_token_ids: bool = False

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of a request that does not stream."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        reply = self._frame("chat.completion" if self.is_chat else "text_completion", choices)
        return {**reply, "usage": usage(answers), "trailmark": self._trail_of_all(answers)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that names a choice's role; completions have none."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None) if self.is_chat else None

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the chunk for new text of a choice."""
        written = self._logprobs(logprobs) if self.calls[0].sampling.logprobs is not None else None
        return self._chunk(index, {"content": text} if self.is_chat else text, None, written)

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a choice's last chunk, with its finish reason and receipt."""
        last = self._chunk(index, {} if self.is_chat else "", answer.finish_reason, None)
        return {**last, "trailmark": self._trail(index, answer)}

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the chunk that ends a stream for which usage was asked: no choices, all receipts."""
        frame = self._frame("chat.completion.chunk" if self.is_chat else "text_completion", [])
        return {**frame, "usage": usage(answers), "trailmark": self._trail_of_all(answers)}

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        content: dict[str, Any]
        if self.is_chat:
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        else:
            content = {"text": answer.text}
        logprobs = self._logprobs(answer.logprobs) if self.calls[0].sampling.logprobs is not None else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _chunk(
        self, index: int, content: dict[str, str] | str, finish_reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        field = "delta" if self.is_chat else "text"
        choice = {"index": index, field: content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._frame("chat.completion.chunk" if self.is_chat else "text_completion", [choice])

    def _frame(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return {
            "id": prefix + self.calls[0].receipt_id.removeprefix("rcpt_"),
            "object": name,
            "created": self.calls[0].time_us // 1_000_000,
            "model": self.calls[0].model,
            "choices": choices,
        }

    def _trail_of_all(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return choice 0's trail, and where there are several choices each one's under `choices`."""
        trails = [self._trail(index, answer) for index, answer in enumerate(answers)]
        if len(trails) == 1:
            return trails[0]
        return {**trails[0], "choices": [{"index": index, **trail} for index, trail in enumerate(trails)]}

    def _trail(self, index: int, answer: Answer) -> dict[str, Any]:
        trail: dict[str, Any] = {
            "receipt_id": self.calls[index].receipt_id,
            "adapter_digest": answer.adapter_digest,
            "request_digest": self.calls[index].request_digest,
            "output_digest": answer.output_digest,
        }
        return {**trail, "token_ids": list(answer.token_ids)} if self.return_token_ids else trail

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._chat_logprobs(tokens) if self.is_chat else self._completion_logprobs(tokens)

    def _chat_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._chat_token(token.token_id, token.logprob),
                    "top_logprobs": [self._chat_token(token_id, logprob) for token_id, logprob in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        whole = list(self.token_bytes(token_id))  # of a part of a character, of which the text tells nothing
        return {"token": self.token_text(token_id), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": whole}

    def _completion_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        texts = [self.token_text(token.token_id) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
            "top_logprobs": [
                {self.token_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in token.top}
                for token in tokens
            ],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Return token counts as OpenAI names and counts them: the prompt once, the answers of all choices."""
    prompt, completion = answers[0].num_prompt_tokens, sum(answer.num_completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(body: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
