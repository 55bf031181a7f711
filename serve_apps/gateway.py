"""The gateway: parse, authenticate, delegate, reply. HTTP in OpenAI's form; free of Ray behind `Backend`."""

import asyncio
import contextlib
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from attribution.influence.encode import EncodeError, encode_prompt
from attribution.receipt_file import ancestry_file, receipt_file
from attribution.receipts import StoredReceipt, find_receipt, new_receipt_id, receipt_bundle
from attribution.trail import Trail
from configs.schema import ServeSettings
from serve_apps.apikeys import ANONYMOUS, ApiKeys, Principal, keys_path
from serve_apps.ask import AskApi
from serve_apps.calls import Answer, Call, Piece
from serve_apps.catalogue import Catalogue
from serve_apps.choices import IndexedPiece, complete_all, split, stream_all
from serve_apps.engine.text import token_bytes
from serve_apps.errors import (
    ApiError,
    Problem,
    internal,
    invalid,
    missing_key,
    overloaded,
    rate_limited,
    too_large,
    wrong_key,
)
from serve_apps.lineage import LineageApi
from serve_apps.openai import ChatRequest, CompletionRequest, Parsed, now_us, parse, sampling_of
from serve_apps.prompts import FilledPrompt, filled_prompt
from serve_apps.replies import DONE, ReplyForm, event
from serve_apps.response_format import check_servable
from serve_apps.spool import Spool

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
MAX_REMEMBERED = 20_000  # receipt ids that are known to be on their way
# A replica spools a receipt before its last token is out, so one that is nowhere this long after its request is lost.
RECEIPT_LOST_S = 300.0
RECEIPT_HEADER = "X-Trailmark-Receipt"
RECEIPT_ID = re.compile(r"rcpt_[0-9a-z]{26}")

Result = TypeVar("Result")


class Backend(Protocol):
    """What stands behind the gateway: replicas and scorers, in other processes or in this one."""

    async def complete(self, call: Call) -> Answer | Problem:
        """Answer in one piece; cancelling it aborts the request."""

    def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Answer as it is generated; closing the generator aborts the request."""

    async def explain(self, receipt_id: str, num_examples: int | None = None) -> dict[str, Any] | Problem:
        """Say which examples and contributors an answer came from, listing so many examples."""


@dataclass(frozen=True)
class Base:
    """The base model that is served."""

    path: str
    digest: str
    name: str


@dataclass
class _Issued:
    """A receipt id given out: whose, and when its request ended (monotonic seconds)."""

    tenant: str
    ended_at: float | None = None

    @property
    def is_overdue(self) -> bool:
        return self.ended_at is not None and time.monotonic() - self.ended_at >= RECEIPT_LOST_S


class Gateway:
    """Everything the HTTP routes need; owns the key file's view, the registry's view and the tokenizer."""

    def __init__(self, *, trail: Trail, settings: ServeSettings, base: Base, backend: Backend) -> None:
        from transformers import AutoTokenizer

        self._trail, self._settings, self._backend = trail, settings, backend
        self._keys = ApiKeys(keys_path(trail.home))
        self.lineage = LineageApi(trail, authenticate=self.principal)
        self.ask = AskApi(
            trail,
            authenticate=self.principal,
            receipt_state=self._receipt_state,
            explain=lambda receipt_id, num_examples: backend.explain(receipt_id, num_examples),
            timeout_s=settings.attribution_timeout_s,
        )
        self._spool = Spool(trail.home / "run" / "spool")
        self._catalogue = Catalogue(
            trail, base_name=base.name, base_digest=base.digest, started_s=now_us() // 1_000_000
        )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
        self._issued: OrderedDict[str, _Issued] = OrderedDict()
        self._num_running = 0
        # A thread each, so that neither a long prompt nor a receipt's proofs hold up the names of other requests.
        self._name_thread = ThreadPoolExecutor(1, "names")
        self._text_thread = ThreadPoolExecutor(1, "text")
        self._proof_thread = ThreadPoolExecutor(1, "proofs")

    def principal(self, request: Request) -> Principal:
        """Return who is calling. ApiError 401 without a valid key, unless keys are not required."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            found = self._keys.authenticate(secret.strip())
            if found is None and self._settings.require_api_key:
                raise wrong_key()
            return found or ANONYMOUS
        if self._settings.require_api_key:
            raise missing_key()
        return ANONYMOUS

    async def models(self) -> dict[str, Any]:
        """Return the body of GET /v1/models."""
        entries = await _in(self._name_thread, self._catalogue.models)
        return {"object": "list", "data": [entry.body() for entry in entries]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """Return the body of GET /v1/models/{id}."""
        return (await _in(self._name_thread, lambda: self._catalogue.model(model_id))).body()

    async def complete(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Answer POST /v1/chat/completions or /v1/completions."""
        principal = self.principal(request)
        parsed = parse(await _body(request), kind)
        calls = split(await self._call(parsed, principal), parsed.request.num_choices)
        is_chat = isinstance(parsed.request, ChatRequest)
        texts = (self._token_text, partial(token_bytes, self._tokenizer))
        form = ReplyForm(is_chat, *texts, calls, bool(parsed.request.return_token_ids))
        if parsed.request.stream:
            return await self._streamed(form, include_usage=parsed.request.include_usage)
        with self._running(calls):
            result = await complete_all(self._backend, calls)
            if isinstance(result, Problem):
                raise ApiError(result)
        return JSONResponse(form.whole(result), headers=_receipt_header(calls))

    async def proof(self, request: Request, receipt_id: str, prove: Callable[[Trail, str], dict[str, Any]]) -> Response:
        """Answer with a file that verifies offline, `prove(trail, id)`, or 202 while its receipt is on its way."""
        state = await self._receipt_state(self.principal(request), receipt_id)
        if state is not None:
            return state
        file = await _in(self._proof_thread, lambda: prove(self._trail, receipt_id))
        return JSONResponse(file, headers={RECEIPT_HEADER: receipt_id})

    async def attribution(self, request: Request, receipt_id: str) -> Response:
        """Answer GET /v1/receipts/{id}/attribution."""
        state = await self._receipt_state(self.principal(request), receipt_id)
        if state is not None:
            return state
        limit_s = self._settings.attribution_timeout_s
        try:
            explained = await asyncio.wait_for(self._backend.explain(receipt_id), limit_s)
        except TimeoutError:
            remedy = f"Try again, or `trailmark ask who {receipt_id}`."
            message = f"The attribution of {receipt_id} took longer than {limit_s:g} s. {remedy}"
            problem = Problem(504, message, code="attribution_timeout", type="server_error", retry_after_s=10)
            raise ApiError(problem) from None
        if isinstance(explained, Problem):
            raise ApiError(explained)
        return JSONResponse(explained)

    async def _receipt_state(self, principal: Principal, receipt_id: str) -> Response | None:
        """Return None for a receipt of the caller's in the log, 202 for one on its way there; else ApiError 404.

        404 `receipt_lost` when a request of the caller's ended RECEIPT_LOST_S ago and left no receipt.
        """
        issued = self._issued.get(receipt_id)
        is_overdue = issued is not None and issued.is_overdue
        # The spool first: a receipt is in the log before it leaves the spool, so one that is in neither is nowhere.
        waiting = await self._waiting_tenant(receipt_id)
        stored = await _in(self._proof_thread, lambda: self._find(receipt_id))
        if stored is not None:
            if principal.may_see(stored.row.receipt["tenant"]):
                return None
        elif waiting is not None and principal.may_see(waiting):
            retry_after_s = max(1, round(self._settings.receipt_flush_s))
            return JSONResponse({"id": receipt_id, "status": "pending"}, 202, {"Retry-After": str(retry_after_s)})
        elif issued is not None and is_overdue and principal.may_see(issued.tenant):
            message = (
                f"Receipt `{receipt_id}` was lost: its request ended and no receipt of it reached the log. "
                "Do not rely on that answer; send the request again."
            )
            raise ApiError(Problem(404, message, code="receipt_lost", param="receipt_id"))
        message = f"No receipt `{receipt_id}` of yours is in the log."
        raise ApiError(Problem(404, message, code="receipt_not_found", param="receipt_id"))

    def _find(self, receipt_id: str) -> StoredReceipt | None:
        """Look a whole id up: the beginning of one, which `find_receipt` takes too, is nobody's receipt here."""
        return find_receipt(self._trail, receipt_id) if RECEIPT_ID.fullmatch(receipt_id) else None

    async def _waiting_tenant(self, receipt_id: str) -> str | None:
        issued = self._issued.get(receipt_id)
        if issued is not None and not issued.is_overdue:
            return issued.tenant
        row = await asyncio.to_thread(self._spool.find, receipt_id)
        return row.receipt["tenant"] if row else None

    async def _call(self, parsed: Parsed, principal: Principal) -> Call:
        """Turn a request into what the replica takes: model name to digest, text to tokens, limits checked."""
        request = parsed.request
        adapter = await _in(self._name_thread, lambda: self._catalogue.choose(request.model))
        asked = request.prompt_reference
        prompt = None if asked is None else await _in(self._name_thread, lambda: filled_prompt(self._trail, asked))
        content, token_ids = await _in(self._text_thread, lambda: self._encode(request, prompt))
        sampling = sampling_of(
            request,
            num_prompt=len(token_ids),
            default_max_tokens=self._settings.default_max_tokens,
            limit=self._settings.max_model_len,
            vocab_size=len(self._tokenizer),
        )
        grammar = sampling.grammar
        if grammar is not None:
            await _in(self._text_thread, lambda: check_servable(grammar))
        time_us = now_us()
        return Call(
            receipt_id=new_receipt_id(time_us),
            time_us=time_us,
            model=request.model,
            tenant=principal.tenant,
            prompt_token_ids=token_ids,
            sampling=sampling,
            adapter=adapter,
            request_digest=parsed.digest,
            content=content,
            prompt_version=prompt.reference if prompt else None,
        )

    def _encode(
        self, request: ChatRequest | CompletionRequest, prompt: FilledPrompt | None
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Return what the receipt keeps of the prompt, and its token ids. A registered prompt is the system message."""
        if isinstance(request, ChatRequest):
            system = [{"role": "system", "content": prompt.text}] if prompt else []
            messages = system + request.normalised()
            try:
                return {"messages": messages}, tuple(encode_prompt(self._tokenizer, messages))
            except EncodeError as error:
                raise invalid("messages", str(error)) from None
        text = request.single_prompt()
        ids = text if isinstance(text, list) else self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise invalid("prompt", "it is empty; give at least one token")
        if not all(0 <= token_id < len(self._tokenizer) for token_id in ids):
            raise invalid("prompt", f"token ids must be between 0 and {len(self._tokenizer) - 1}")
        return {"prompt": text}, tuple(ids)

    async def _streamed(self, form: ReplyForm, *, include_usage: bool) -> Response:
        """Wait for the first piece, so that a refusal has its own status, then stream."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._running(form.calls))
            pieces = stream_all(self._backend, form.calls)
            try:
                first = await anext(pieces)
            except BaseException:
                await pieces.aclose()
                raise
            if isinstance(first[1], Problem):
                await pieces.aclose()
                raise ApiError(first[1])
            events = _events(form, first, pieces, include_usage=include_usage)
            return EventStream(events, stack.pop_all(), headers=_receipt_header(form.calls))

    @contextlib.contextmanager
    def _running(self, calls: Sequence[Call]) -> Any:
        """Count a request's calls while they run and remember their receipt ids, unless it is refused."""
        limit = self._settings.max_running_requests
        if len(calls) > limit:
            raise invalid("n", f"{len(calls)} choices are more than the {limit} that this server answers at a time")
        if self._num_running + len(calls) > limit:
            raise rate_limited(limit)
        self._num_running += len(calls)
        issued = {call.receipt_id: _Issued(call.tenant) for call in calls}
        self._issued.update(issued)
        while len(self._issued) > MAX_REMEMBERED:
            self._issued.popitem(last=False)
        try:
            yield
        except ApiError:
            for receipt_id in issued:
                self._issued.pop(receipt_id, None)
            raise
        finally:
            for one in issued.values():
                one.ended_at = time.monotonic()
            self._num_running -= len(calls)

    def _token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed at once when the client goes away, not when garbage is collected."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], held: contextlib.ExitStack, *, headers: dict[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", **headers})
        self._events, self._held = events, held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._events.aclose()


async def _events(
    form: ReplyForm, first: IndexedPiece, pieces: AsyncGenerator[IndexedPiece, None], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events. A problem after the first token is an error event, as OpenAI sends it."""
    answers: dict[int, Answer] = {}
    async with contextlib.aclosing(pieces):
        for index in range(len(form.calls)):
            opening = form.opening(index)
            if opening is not None:
                yield event(opening)
        async for index, piece in _chain(first, pieces):
            if isinstance(piece, Problem):
                yield event(piece.body())
                return
            if isinstance(piece, Answer):
                answers[index] = piece
                yield event(form.closing(index, piece))
            elif piece.text or piece.logprobs:
                yield event(form.delta(index, piece.text, piece.logprobs))
        if len(answers) < len(form.calls):
            return
        if include_usage:
            yield event(form.usage_chunk([answers[index] for index in sorted(answers)]))
        yield DONE


async def _chain(first: IndexedPiece, rest: AsyncIterator[IndexedPiece]) -> AsyncIterator[IndexedPiece]:
    yield first
    async for piece in rest:
        yield piece


def _receipt_header(calls: Sequence[Call]) -> dict[str, str]:
    """Return the header with the receipt ids, in the order of the choices."""
    return {RECEIPT_HEADER: ", ".join(call.receipt_id for call in calls)}


async def _in(executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


async def _body(request: Request) -> bytes:
    """Read the body, at most MAX_BODY_BYTES of it."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise too_large(MAX_BODY_BYTES)
    except ClientDisconnect:
        raise overloaded("The client went away while it sent the request.") from None
    return bytes(body)


def build_http(gateway: Gateway) -> FastAPI:
    """Return the routes. Every error leaves in OpenAI's form, with no trace of the inside."""
    app = FastAPI(title="Trailmark", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        gateway.principal(request)
        return await gateway.models()

    @app.get("/v1/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> dict[str, Any]:
        gateway.principal(request)
        return await gateway.model(model_id)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await gateway.complete(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await gateway.complete(request, CompletionRequest)

    @app.get("/v1/receipts/{receipt_id}")
    async def receipt(request: Request, receipt_id: str) -> Response:
        return await gateway.proof(request, receipt_id, receipt_file)

    @app.get("/v1/receipts/{receipt_id}/ancestry")
    async def ancestry(request: Request, receipt_id: str) -> Response:
        return await gateway.proof(request, receipt_id, ancestry_file)

    @app.get("/v1/receipts/{receipt_id}/bundle")
    async def bundle(request: Request, receipt_id: str) -> Response:
        return await gateway.proof(request, receipt_id, receipt_bundle)

    @app.get("/v1/receipts/{receipt_id}/attribution")
    async def attribution(request: Request, receipt_id: str) -> Response:
        return await gateway.attribution(request, receipt_id)

    gateway.lineage.add_routes(app)
    gateway.ask.add_routes(app)
    add_error_forms(app)
    return app


def add_error_forms(app: FastAPI) -> None:
    """Let every error of an app leave in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return _refusal(error.problem)

    @app.exception_handler(404)
    async def no_route(request: Request, _: Exception) -> Response:
        return _refusal(Problem(404, f"Unknown request URL: {request.method} {request.url.path}.", code="unknown_url"))

    @app.exception_handler(405)
    async def no_method(request: Request, error: Any) -> Response:
        problem = Problem(405, f"{request.method} is not allowed on {request.url.path}.", code="method_not_allowed")
        return JSONResponse(problem.body(), 405, {**problem.headers(), **(error.headers or {})})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        reference = new_receipt_id(now_us()).replace("rcpt_", "err_")
        logger.exception("%s: %s %s", reference, request.method, request.url.path, exc_info=error)
        return _refusal(internal(reference))


def _refusal(problem: Problem) -> Response:
    return JSONResponse(problem.body(), problem.status, problem.headers())
