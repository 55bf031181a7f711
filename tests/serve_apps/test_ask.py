"""GET /v1/ask/...: whose key may ask what, answers and pages, and what can still be said when scores cannot be had."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from attribution.answers import PROMISES
from attribution.receipts import find_receipt
from attribution.trail import Trail
from serve_apps.apikeys import ApiKeys, Principal
from serve_apps.ask import AskApi
from serve_apps.errors import ApiError, Problem, missing_key
from serve_apps.gateway import add_error_forms
from serve_apps.lineage import LineageApi
from tests.attribution.test_questions import attribution, serve, told
from tests.serve_apps.published import Published
from tests.serve_apps.world import error, opened

__all__ = ["told"]

Body = Callable[[httpx.AsyncClient, httpx.AsyncClient], Awaitable[None]]
DAMAGED, SLOW = "rcpt_damaged", "rcpt_slow"


def ask(trail: Trail, folder: Path, body: Body, *, explained: dict[str, Any]) -> None:
    """Run `body` with an operator's and a tenant's client; `explained` is what the scorer says of any receipt."""
    keys = ApiKeys(folder / "keys.json")
    secrets = [keys.create("root", is_operator=True), keys.create("t")]

    def authenticate(request: Request) -> Principal:
        found = keys.authenticate(request.headers.get("authorization", "").removeprefix("Bearer "))
        if found is None:
            raise missing_key()
        return found

    async def state(principal: Principal, receipt_id: str) -> Response | None:
        stored = find_receipt(trail, receipt_id)
        if stored is None:
            return JSONResponse({"status": "pending"}, 202)
        if not principal.may_see(stored.row.receipt["tenant"]):
            raise ApiError(Problem(404, "no receipt of yours", code="receipt_not_found"))
        return None

    async def explain(receipt_id: str, num_examples: int | None) -> dict[str, Any] | Problem:
        if explained.get("problem"):
            return Problem(int(explained["status"]), explained["problem"])
        if explained.get("slow"):
            await asyncio.sleep(60)
        row = {"example_id": "row", "text": "", "name": "ana", "score": 1.0, "low": 0.5, "high": 2.0}
        rows = [{**row, "bm25": 0.5, "bm25_rank": 3}] * (num_examples or 0)
        return {**explained, "receipt_id": receipt_id, "examples": rows}

    app = FastAPI(openapi_url=None)
    LineageApi(trail, authenticate=authenticate).add_routes(app)  # it gives malformed queries OpenAI's form
    AskApi(trail, authenticate=authenticate, receipt_state=state, explain=explain, timeout_s=0.05).add_routes(app)
    add_error_forms(app)

    async def run() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        clients = [
            httpx.AsyncClient(
                transport=transport, base_url="http://test/v1/ask", headers={"Authorization": f"Bearer {secret}"}
            )
            for secret in secrets
        ]
        async with clients[0], clients[1]:
            await body(clients[0], clients[1])

    asyncio.run(run())


def test_who_as_json_and_as_a_page(trail: Trail, told: dict[str, str], tmp_path: Path) -> None:
    receipt = serve(trail, told["second"], 9)

    async def body(_: httpx.AsyncClient, tenant: httpx.AsyncClient) -> None:
        reply = await tenant.get("/who", params={"receipt": receipt})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert answer["question"] == "Who made this answer?" and answer["findings"][0]["subject"] == "ana"
        assert answer["findings"][0]["tier"] == "explain" and answer["tiers"]["explain"] == PROMISES["explain"]
        made = trail.find(told["second"])
        assert made is not None and {made.leaf_hash} == {record["leaf_hash"] for record in answer["records"]}
        assert answer["records"][0]["proof"].startswith("trailmark log proof") and answer["cost"]
        assert reply.headers["server-timing"].startswith("cpu;dur=")
        assert reply.content == (await tenant.get("/who", params={"receipt": receipt})).content
        page = await tenant.get("/who", params={"receipt": receipt, "format": "html"})
        assert page.headers["content-type"].startswith("text/html") and "<svg" in page.text
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert (await tenant.get("/who", params={"receipt": "rcpt_later"})).status_code == 202
        more = await tenant.get("/who", params={"receipt": receipt, "examples": 20})
        assert [row["bm25_rank"] for row in more.json()["details"]["examples"]] == [3] * 20
        refused = await tenant.get("/who", params={"receipt": receipt, "examples": 0})
        assert (refused.status_code, error(refused)["param"]) == (400, "examples")

    ask(trail, tmp_path, body, explained=attribution(adapter=told["second"]))


@pytest.mark.parametrize("name", ["improved", "dataset", "adapter"])
def test_a_tenant_asks_of_published_adapters(trail: Trail, told: dict[str, str], tmp_path: Path, name: str) -> None:
    async def body(operator: httpx.AsyncClient, tenant: httpx.AsyncClient) -> None:
        of_one = await tenant.get(f"/{name}", params={"adapter": "facts@2"})
        assert of_one.status_code == 200 and of_one.json()["findings"], of_one.text
        assert (await operator.get(f"/{name}")).json()["findings"]
        assert "</html>" in (await operator.get(f"/{name}", params={"format": "html"})).text
        refused = await tenant.get(f"/{name}")
        assert (refused.status_code, error(refused)["code"]) == (403, "operator_key_required")
        for unknown in (told["first"], "fact"):
            refused = await tenant.get(f"/{name}", params={"adapter": unknown})
            assert (refused.status_code, error(refused)["code"]) == (404, "adapter_not_found")
        assert (await operator.get(f"/{name}", params={"adapter": told["first"]})).status_code == 200
        near = await operator.get(f"/{name}", params={"adapter": "fact"})
        assert near.status_code == 404 and "did you mean" in error(near)["message"]

    ask(trail, tmp_path, body, explained={})


def test_what_was_served_is_for_operators(trail: Trail, told: dict[str, str], tmp_path: Path) -> None:
    serve(trail, told["second"], 30)

    async def body(operator: httpx.AsyncClient, tenant: httpx.AsyncClient) -> None:
        found = (await operator.get("/value")).json()
        assert "1 completions served" in found["summary"] and "counted" in found["tiers"]
        assert (await tenant.get("/value")).status_code == 403

    ask(trail, tmp_path, body, explained={})


def test_what_cannot_be_scored_is_answered_in_part(trail: Trail, told: dict[str, str], tmp_path: Path) -> None:
    receipt = serve(trail, told["second"], 9)

    async def body(_: httpx.AsyncClient, tenant: httpx.AsyncClient) -> None:
        answer = (await tenant.get("/who", params={"receipt": receipt})).json()
        assert answer["problem"] == "gradients/40.npy was altered"
        rows = {finding["subject"]: finding["value"] for finding in answer["findings"]}
        assert rows == {"ana": 5, "ben": 4} and answer["tiers"].keys() == {"counted"}

    ask(trail, tmp_path, body, explained={"problem": "gradients/40.npy was altered", "status": 422})


def test_scorers_that_are_away_or_slow_are_said(trail: Trail, told: dict[str, str], tmp_path: Path) -> None:
    receipt = serve(trail, told["second"], 9)
    for explained, status in (({"problem": "none runs", "status": 503}, 503), ({"slow": True}, 504)):

        async def body(_: httpx.AsyncClient, tenant: httpx.AsyncClient, status: int = status) -> None:
            assert (await tenant.get("/who", params={"receipt": receipt})).status_code == status

        folder = tmp_path / str(status)
        folder.mkdir()
        ask(trail, folder, body, explained=explained)


def test_mistakes_in_openais_form(trail: Trail, told: dict[str, str], tmp_path: Path) -> None:
    async def body(operator: httpx.AsyncClient, _: httpx.AsyncClient) -> None:
        for path, params, param in (
            ("/who", {}, "receipt"),
            ("/who", {"receipt": ""}, "receipt"),
            ("/improved", {"adapter": "facts@2", "format": "xml"}, "format"),
            ("/improved", {"adaptor": "facts@2"}, "adaptor"),
            ("/value", {"adapter": "facts@2"}, "adapter"),
        ):
            refused = await operator.get(path, params=params)
            assert (refused.status_code, error(refused)["param"]) == (400, param), (path, params, refused.text)
        assert (await operator.get("/value", headers={"Authorization": ""})).status_code == 401
        described = (await operator.get("/openapi.json")).json()
        assert set(described["paths"]) == {
            f"/v1/ask/{name}" for name in ("who", "improved", "dataset", "adapter", "value")
        }

    ask(trail, tmp_path, body, explained={})


def test_the_gateway_serves_it(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            model = next(iter((await client.get("/v1/models")).json()["data"][1:]))["id"]
            reply = await client.get("/v1/ask/adapter", params={"adapter": model})
            assert reply.status_code == 200, reply.text
            assert (await world.client().get("/v1/ask/adapter", params={"adapter": model})).status_code == 401
            lost = await client.get("/v1/ask/who", params={"receipt": "rcpt_nothing"})
            assert (lost.status_code, error(lost)["code"]) == (404, "receipt_not_found")

    asyncio.run(body())
