"""OpenAI responses: whole completions, stream chunks, log-probabilities and the list of models."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_apps.calls import Answer, Call
from serve_apps.engine.config import TokenLogprob

LOWEST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON cannot carry

# Token id -> the text of that token alone.
TokenText = Callable[[int], str]


@dataclass(frozen=True)
class ReplyForm:
    """What the two endpoints do differently: object names, and how a choice carries text and log-probabilities."""

    is_chat: bool
    token_text: TokenText
    return_token_ids: bool = False

    def whole(self, call: Call, answer: Answer) -> dict[str, Any]:
        """Return the body of a request that does not stream."""
        content: dict[str, Any]
        if self.is_chat:
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        else:
            content = {"text": answer.text}
        logprobs = self._logprobs(answer.logprobs) if call.sampling.logprobs is not None else None
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        reply = self._frame(call, "chat.completion" if self.is_chat else "text_completion", [choice])
        return {**reply, "usage": usage(answer), "trailmark": self._trail(call, answer)}

    def opening(self, call: Call) -> dict[str, Any] | None:
        """Return the chunk that names the role; completions have none."""
        return self._chunk(call, {"role": "assistant", "content": ""}, None, None) if self.is_chat else None

    def delta(self, call: Call, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the chunk for new text."""
        written = self._logprobs(logprobs) if call.sampling.logprobs is not None else None
        return self._chunk(call, {"content": text} if self.is_chat else text, None, written)

    def closing(self, call: Call, answer: Answer, *, include_usage: bool) -> list[dict[str, Any]]:
        """Return the chunk with finish reason and receipt, and the usage chunk (no choices) when it was asked for."""
        trail = self._trail(call, answer)
        last = {**self._chunk(call, {} if self.is_chat else "", answer.finish_reason, None), "trailmark": trail}
        if not include_usage:
            return [last]
        return [last, {**self._frame(call, last["object"], []), "usage": usage(answer), "trailmark": trail}]

    def _chunk(
        self, call: Call, content: dict[str, str] | str, finish_reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        field = "delta" if self.is_chat else "text"
        choice = {"index": 0, field: content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._frame(call, "chat.completion.chunk" if self.is_chat else "text_completion", [choice])

    def _frame(self, call: Call, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return {
            "id": prefix + call.receipt_id.removeprefix("rcpt_"),
            "object": name,
            "created": call.time_us // 1_000_000,
            "model": call.model,
            "choices": choices,
        }

    def _trail(self, call: Call, answer: Answer) -> dict[str, Any]:
        trail: dict[str, Any] = {
            "receipt_id": call.receipt_id,
            "adapter_digest": answer.adapter_digest,
            "request_digest": call.request_digest,
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
        text = self.token_text(token_id)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(text.encode())}

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


def usage(answer: Answer) -> dict[str, int]:
    """Return token counts as OpenAI names them."""
    prompt, completion = answer.num_prompt_tokens, answer.num_completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(body: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
