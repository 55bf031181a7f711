"""GET /v1/lineage/...: what a model or answer was made from, what came of a row, what changed between two versions.

An operator's key may ask about anything. A tenant's may look upwards from what it can call or got, published names and
its own receipts, whose proofs show the same records; asking what came of a thing would tell of other tenants.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from attribution.lineage_diff import diff
from attribution.lineage_layout import LineageError, UnknownThing
from attribution.lineage_names import PUBLISHED, RECEIPT, Reference
from attribution.lineage_queries import AFFECTED_KINDS, DEFAULT_LIMIT, MAX_LIMIT, LineageQueries
from attribution.trail import Trail
from serve_apps.apikeys import Principal
from serve_apps.errors import ApiError, Problem, invalid, unrecognised

PREFIX = "/v1/lineage"
DESCRIPTION = (
    "Names are NAME, NAME@VERSION, receipt ids, example ids, digests, key ids, leaf hashes, their beginnings, or "
    "KIND:NAME. Lists come newest first; `next_before` of an answer, given as `before`, is the next page."
)

Result = TypeVar("Result")
Thing = Annotated[str, Query(min_length=1, max_length=512, description="What is asked about.")]
Kinds = Annotated[list[str] | None, Query(description="List records of this kind only; repeat it.")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Records in a page.")]
Before = Annotated[int | None, Query(ge=0, description="List records before this log index.")]


class LineageApi:
    """The lineage of one trail over HTTP."""

    def __init__(self, trail: Trail, *, authenticate: Callable[[Request], Principal]) -> None:
        self._trail, self._authenticate = trail, authenticate
        self._queries = LineageQueries.of(trail)
        self._thread = ThreadPoolExecutor(1, "lineage")

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes and their description to an app."""
        router = self._router()
        app.include_router(router)

        @app.get(f"{PREFIX}/openapi.json", include_in_schema=False)
        async def description() -> dict[str, Any]:
            return get_openapi(title="Trailmark lineage", version="1", description=DESCRIPTION, routes=router.routes)

        @app.exception_handler(RequestValidationError)
        async def malformed(_: Request, error: Any) -> Response:
            first = error.errors()[0]
            problem = invalid(str(first["loc"][-1]), first["msg"]).problem
            return JSONResponse(problem.body(), problem.status, problem.headers())

    def _router(self) -> APIRouter:
        router = APIRouter(prefix=PREFIX)

        @router.get("/ancestors", summary="What a thing was made from, directly or not")
        async def ancestors(
            request: Request, thing: Thing, kind: Kinds = None, limit: Limit = DEFAULT_LIMIT, before: Before = None
        ) -> dict[str, Any]:
            def answer(principal: Principal) -> dict[str, Any]:
                subject = self._resolve(thing, principal)
                return self._queries.ancestors(subject, kinds=kind or (), limit=limit, before=before).to_dict()

            return await self._answer(request, answer)

        @router.get("/descendants", summary="What came of a thing, directly or not (operators)")
        async def descendants(
            request: Request, thing: Thing, kind: Kinds = None, limit: Limit = DEFAULT_LIMIT, before: Before = None
        ) -> dict[str, Any]:
            def answer(principal: Principal) -> dict[str, Any]:
                _require_operator(principal)
                return self._queries.descendants(thing, kinds=kind or (), limit=limit, before=before).to_dict()

            return await self._answer(request, answer)

        @router.get("/impact", summary="Which adapters and completions descend from a thing (operators)")
        async def impact(
            request: Request, thing: Thing, kind: Kinds = None, limit: Limit = DEFAULT_LIMIT, before: Before = None
        ) -> dict[str, Any]:
            def answer(principal: Principal) -> dict[str, Any]:
                _require_operator(principal)
                kinds = kind or AFFECTED_KINDS
                return self._queries.impact(thing, kinds=kinds, limit=limit, before=before).to_dict()

            return await self._answer(request, answer)

        self._add_pairs(router)
        return router

    def _add_pairs(self, router: APIRouter) -> None:
        @router.get("/path", summary="A shortest chain from one thing to another made from it")
        async def path(
            request: Request,
            ancestor: Annotated[Thing, Query(alias="from")],
            descendant: Annotated[Thing, Query(alias="to")],
        ) -> dict[str, Any]:
            def answer(principal: Principal) -> dict[str, Any]:
                found = self._queries.path(ancestor, self._resolve(descendant, principal, param="to"))
                if not found.items and not principal.is_operator:
                    raise UnknownThing("")
                return found.to_dict()

            return await self._answer(request, answer, param="from")

        @router.get("/diff", summary="What changed between two versions, and what it did to the score")
        async def difference(
            request: Request,
            older: Thing,
            newer: Annotated[
                str | None, Query(description="Left out: compare `older` with the version before.")
            ] = None,
        ) -> dict[str, Any]:
            def answer(principal: Principal) -> dict[str, Any]:
                for text in filter(None, (older, newer)):
                    self._resolve(text, principal, param="older")
                return diff(self._trail, older, newer).to_dict()

            return await self._answer(request, answer, param="older")

    async def _answer(
        self, request: Request, answer: Callable[[Principal], dict[str, Any]], *, param: str = "thing"
    ) -> dict[str, Any]:
        principal = self._authenticate(request)
        _refuse_unknown(request)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, answer, principal)
        except UnknownThing as error:
            raise _not_found(error, principal, param) from None
        except LineageError as error:
            raise ApiError(Problem(400, str(error), code="invalid_value", param=param)) from None

    def _resolve(self, text: str, principal: Principal, *, param: str = "thing") -> Reference:
        """Return what a text means to the caller. ApiError 404 for what is not a tenant's to look up."""
        try:
            found = self._queries.resolve(text)
        except LineageError as error:
            if principal.is_operator:
                raise
            raise _not_found(error, principal, param) from None
        is_own = found.role == RECEIPT and found.tenant is not None and principal.may_see(found.tenant)
        if not (
            principal.is_operator or found.role == PUBLISHED or (is_own and found.title.startswith(f"receipt {text} "))
        ):
            raise _not_found(UnknownThing(""), principal, param)
        return found


def _require_operator(principal: Principal) -> None:
    if not principal.is_operator:
        message = (
            "What came of a thing is for operators: use a key of `trailmark apikey create NAME --operator`, or ask "
            f"GET {PREFIX}/ancestors of a model or of a receipt of yours."
        )
        raise ApiError(Problem(403, message, code="operator_key_required"))


def _refuse_unknown(request: Request) -> None:
    known = {"thing", "kind", "limit", "before"}
    if request.url.path.endswith("/path"):
        known = {"from", "to"}
    elif request.url.path.endswith("/diff"):
        known = {"older", "newer"}
    for name in request.query_params:
        if name not in known:
            raise unrecognised(name, known)


def _not_found(error: LineageError, principal: Principal, param: str) -> ApiError:
    """404; a tenant is not told what else there is."""
    message = str(error) if principal.is_operator else "No published model, and no receipt of yours, of that name."
    return ApiError(Problem(404, message, code="lineage_not_found", param=param))
