"""GET /v1/ask/...: the five questions, as JSON or, with `format=html`, as the page that people look at.

An operator's key may ask anything. A tenant's may ask who made an answer of its own, and of a published adapter what
improved it, which dataset mattered and whether it changed performance; what was served and paid tells of others.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from attribution.answers import Answer, Unexplained
from attribution.pages.ask import answer_html
from attribution.question_who import ask_who
from attribution.questions import ask_adapter, ask_dataset, ask_improved, ask_value
from attribution.registry import RegistryError
from attribution.trail import Trail
from configs.errors import UserError
from serve_apps.apikeys import Principal
from serve_apps.errors import ApiError, Problem, unrecognised

PREFIX = "/v1/ask"
DESCRIPTION = (
    "Each number names its tier of evidence and what that promises; `missing` says what would make the answer firmer, "
    "`records` the log entries it rests on and the commands that check them offline."
)
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

Form = Annotated[Literal["json", "html"], Query(alias="format", description="html is one page that loads nothing.")]
ReceiptId = Annotated[str, Query(min_length=1, max_length=64, description="A receipt of yours.")]
Adapter = Annotated[
    str | None, Query(min_length=1, max_length=512, description="NAME, NAME@VERSION or digest; operators: all.")
]
NumExamples = Annotated[
    int | None, Query(ge=1, le=100, description="Training rows listed, with scores, BM25 and verbatim spans.")
]
Explain = Callable[[str, int | None], Awaitable[dict[str, Any] | Problem]]
ReceiptState = Callable[[Principal, str], Awaitable[Response | None]]


class AskApi:
    """The five questions over HTTP about one trail.

    `receipt_state` answers None for a receipt the caller may see (Gateway's), `explain` is the scorers'.
    """

    def __init__(
        self,
        trail: Trail,
        *,
        authenticate: Callable[[Request], Principal],
        receipt_state: ReceiptState,
        explain: Explain,
        timeout_s: float,
    ) -> None:
        self._trail, self._authenticate = trail, authenticate
        self._receipt_state, self._explain, self._timeout_s = receipt_state, explain, timeout_s
        self._thread = ThreadPoolExecutor(1, "ask")

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes and their description to an app."""
        router = APIRouter(prefix=PREFIX)

        @router.get("/who", summary="Who made an answer: base, contributors, rows, verbatim spans")
        async def who(
            request: Request, receipt: ReceiptId, examples: NumExamples = None, form: Form = "json"
        ) -> Response:
            return await self._who(request, receipt, examples, form)

        of_adapters: dict[str, tuple[str, Callable[..., Answer]]] = {
            "improved": ("What improved an adapter, or all of them", ask_improved),
            "dataset": ("Which dataset mattered", ask_dataset),
            "adapter": ("Which adapter changed performance", ask_adapter),
        }
        for name, (summary, ask) in of_adapters.items():
            router.add_api_route(f"/{name}", self._of_adapter(ask), methods=["GET"], summary=summary)

        @router.get("/value", summary="What part created value (operators)")
        async def value(request: Request, form: Form = "json") -> Response:
            principal = self._principal(request, {"format"})
            _require_operator(principal, "What was served and paid tells of others, so it is for operators")
            return await self._reply(lambda: ask_value(self._trail), form)

        app.include_router(router)

        @app.get(f"{PREFIX}/openapi.json", include_in_schema=False)
        async def description() -> dict[str, Any]:
            return get_openapi(title="Trailmark questions", version="1", description=DESCRIPTION, routes=router.routes)

    def _of_adapter(self, ask: Callable[..., Answer]) -> Callable[..., Awaitable[Response]]:
        async def answer(request: Request, adapter: Adapter = None, form: Form = "json") -> Response:
            principal = self._principal(request, {"adapter", "format"})
            if adapter is None:
                _require_operator(principal, "Without `adapter` the question is about all of them: for operators")
            elif not principal.is_operator:
                self._require_published(adapter)
            return await self._reply(lambda: ask(self._trail, adapter), form)

        return answer

    async def _who(self, request: Request, receipt: str, num_examples: int | None, form: str) -> Response:
        state = await self._receipt_state(self._principal(request, {"receipt", "examples", "format"}), receipt)
        if state is not None:
            return state
        try:
            found = await asyncio.wait_for(self._explain(receipt, num_examples), self._timeout_s)
        except TimeoutError:
            message = f"Explaining {receipt} took longer than {self._timeout_s:g} s. Try again: what was done is kept."
            raise ApiError(
                Problem(504, message, code="attribution_timeout", type="server_error", retry_after_s=10)
            ) from None
        if isinstance(found, Problem) and found.status != 422:
            raise ApiError(found)

        def explained(_: str) -> dict[str, Any]:
            if isinstance(found, Problem):
                raise Unexplained(found.message)
            return found

        return await self._reply(lambda: ask_who(self._trail, receipt, explain=explained), form)

    async def _reply(self, ask: Callable[[], Answer], form: str) -> Response:
        """Answer in a thread; the header says what it took here."""

        def work() -> tuple[Response, float]:
            started_s = time.thread_time()
            answer = ask()
            reply: Response = (
                HTMLResponse(answer_html(answer), headers={"Content-Security-Policy": PAGE_POLICY})
                if form == "html"
                else JSONResponse(answer.to_dict())
            )
            return reply, time.thread_time() - started_s

        try:
            reply, spent_s = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RegistryError as error:
            raise ApiError(Problem(404, str(error), code="adapter_not_found", param="adapter")) from None
        except UserError as error:
            raise ApiError(Problem(422, str(error), code="question_unanswerable")) from None
        reply.headers["Server-Timing"] = f'cpu;dur={1000 * spent_s:.1f};desc="CPU of the answer, without scoring"'
        return reply

    def _principal(self, request: Request, known: set[str]) -> Principal:
        principal = self._authenticate(request)
        for name in request.query_params:
            if name not in known:
                raise unrecognised(name, known)
        return principal

    def _require_published(self, adapter: str) -> None:
        """A tenant asks about what it can call, by its published name."""
        names = {name for item in self._trail.registry.list(kind="adapter") for name in (item.name, item.reference)}
        if adapter not in names:
            message = f"No published adapter {adapter!r}; GET /v1/models lists what there is."
            raise ApiError(Problem(404, message, code="adapter_not_found", param="adapter"))


def _require_operator(principal: Principal, why: str) -> None:
    if not principal.is_operator:
        message = f"{why}: use a key of `trailmark apikey create NAME --operator`."
        raise ApiError(Problem(403, message, code="operator_key_required"))
