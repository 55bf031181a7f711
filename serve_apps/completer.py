"""One call through the engine: verify the adapter, stream the tokens, leave a receipt whatever happens. Free of Ray."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol, cast

from attribution.model_signature import ModelSignatureError
from attribution.store import StoreError
from serve_apps.adapters import VerifiedAdapters
from serve_apps.calls import Answer, Call, Delta, Piece
from serve_apps.engine.config import Output, Request, TokenLogprob
from serve_apps.engine.errors import (
    AdapterCacheFull,
    EngineClosed,
    EngineError,
    InvalidRequest,
    MissingExtra,
    PromptTooLong,
)
from serve_apps.errors import ApiError, Problem, internal, overloaded, tampered
from serve_apps.openai import output_digest
from serve_apps.spool import Segment
from serve_apps.usage import Receipts, Server, receipt_row

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What is needed of `serve_apps.engine.async_engine.AsyncEngine`."""

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield the outputs of one request; closing the iterator aborts it."""


@dataclass
class _Progress:
    """What has come out so far, so that a call cut short has a receipt of exactly what was generated."""

    call: Call
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    adapter_digest: str | None = None
    finish_reason: str | None = None
    error: str | None = None

    def add(self, output: Output) -> Delta:
        """Take one output in; an adapter other than the one asked for is an error, whatever it said."""
        self.text.append(output.text)
        self.token_ids += output.new_token_ids
        self.logprobs += output.logprobs or ()
        self.adapter_digest = output.adapter_digest
        self.error = output.error
        asked = self.call.adapter.digest if self.call.adapter else None
        if output.new_token_ids and output.adapter_digest != asked:
            self.error = f"asked for adapter {asked}, the engine ran {output.adapter_digest}"
        if output.finished or self.error:
            self.finish_reason = "error" if self.error else output.finish_reason or "stop"
        return Delta(output.text, output.new_token_ids, output.logprobs or ())

    def answer(self) -> Answer:
        """Return the answer as far as it got; without a finish reason it was aborted."""
        text, token_ids = "".join(self.text), tuple(self.token_ids)
        return Answer(
            text=text,
            token_ids=token_ids,
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason or "abort",
            num_prompt_tokens=len(self.call.prompt_token_ids),
            adapter_digest=self.adapter_digest,
            output_digest=output_digest(text, token_ids),
        )


class Completer:
    """Runs calls on one engine."""

    def __init__(self, engine: Engine, adapters: VerifiedAdapters, receipts: Receipts, *, server: Server) -> None:
        self._engine, self._adapters, self._receipts, self._server = engine, adapters, receipts, server

    async def complete(self, call: Call) -> Answer | Problem:
        """Return the finished answer, or why there is none."""
        last: Piece | None = None
        async with contextlib.aclosing(self.stream(call)) as pieces:
            async for piece in pieces:
                last = piece
        assert isinstance(last, Answer | Problem)
        return last

    async def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Yield deltas, then one Answer or one Problem. The receipt is durable before the last piece is out.

        A caller who goes away (cancellation, or closing this generator) aborts the request and leaves a receipt with
        the finish reason "abort" for what was generated until then.
        """
        try:
            request = await self._request(call)
        except ApiError as error:
            yield error.problem
            return
        progress, problem, noted = _Progress(call), None, None
        try:
            outputs = cast(AsyncGenerator[Output, None], self._engine.generate(request))
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    delta = progress.add(output)
                    if progress.finish_reason:
                        break
                    yield delta
        except EngineError as error:
            problem = _engine_problem(error)
            progress.finish_reason = "error"
        except Exception as error:
            progress.error, progress.finish_reason = f"{type(error).__name__}: {error}", "error"
        finally:
            answer = progress.answer()
            if progress.token_ids or progress.finish_reason != "error":
                noted = self._note(call, answer)
        if noted is not None:
            await asyncio.to_thread(noted.sync)
        if progress.error:
            logger.error("request %s failed in the engine: %s", call.receipt_id, progress.error)
            problem = internal(call.receipt_id)
        if problem is not None:
            yield problem
            return
        yield delta
        yield answer

    async def _request(self, call: Call) -> Request:
        """Return the engine's request. ApiError when receipts cannot be kept or the adapter was tampered with."""
        if self._receipts.is_full:
            raise overloaded(
                "Receipts cannot be written to the log at the moment, so no answers are given.", retry_after_s=5
            )
        ref = None
        if call.adapter is not None:
            try:
                ref = await self._adapters.ready(call.adapter)
            except (StoreError, ModelSignatureError, OSError) as error:
                logger.error("adapter %s refused: %s", call.adapter.name, error)
                raise tampered(call.adapter.name, call.adapter.digest) from None
        return Request(call.receipt_id, call.prompt_token_ids, call.sampling, ref, call.tenant)

    def _note(self, call: Call, answer: Answer) -> Segment:
        if answer.adapter_digest is not None:
            self._receipts.note_adapter(answer.adapter_digest)
        return self._receipts.note(receipt_row(call, answer, server=self._server))


def _engine_problem(error: EngineError) -> Problem:
    """Return what the engine's refusal means to a caller: wait, change the request, or tell the operator."""
    if isinstance(error, AdapterCacheFull | EngineClosed):
        return overloaded(str(error)).problem
    if isinstance(error, PromptTooLong):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return Problem(400, str(error), code="invalid_value")
    if isinstance(error, MissingExtra):
        return Problem(400, str(error), code="unsupported_parameter", param="response_format")
    logger.error("the engine refused an adapter: %s", error)
    message = "The engine cannot serve this model. Tell the operator."
    return Problem(500, message, code="model_not_servable", type="server_error", param="model", retry=False)
