"""GET /v1/lineage/...: answers, pages, whose key may ask what, and errors in OpenAI's form."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from attribution.trail import Trail
from serve_apps.apikeys import ApiKeys, Principal
from serve_apps.errors import missing_key, wrong_key
from serve_apps.gateway import add_error_forms
from serve_apps.lineage import LineageApi
from tests.attribution.lineage_story import Versions, tell_versions
from tests.serve_apps.published import Published
from tests.serve_apps.world import error, opened

Body = Callable[[httpx.AsyncClient, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def story(trail: Trail) -> Versions:
    return tell_versions(trail)


def ask(story: Versions, tmp_path: Path, body: Body) -> None:
    """Run `body` with an operator's and a tenant's client."""
    keys = ApiKeys(tmp_path / "keys.json")
    secrets = [keys.create("root", is_operator=True), keys.create("acme")]

    def authenticate(request: Request) -> Principal:
        secret = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secret:
            raise missing_key()
        found = keys.authenticate(secret)
        if found is None:
            raise wrong_key()
        return found

    app = FastAPI(openapi_url=None)
    LineageApi(story.trail, authenticate=authenticate).add_routes(app)
    add_error_forms(app)

    async def run() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        clients = [
            httpx.AsyncClient(
                transport=transport,
                base_url="http://test/v1/lineage",
                headers={"Authorization": f"Bearer {secret}"} if secret else {},
            )
            for secret in secrets
        ]
        async with clients[0], clients[1]:
            await body(clients[0], clients[1])

    asyncio.run(run())


def test_an_operator_asks_about_anything(story: Versions, tmp_path: Path) -> None:
    async def body(operator: httpx.AsyncClient, _: httpx.AsyncClient) -> None:
        reply = (await operator.get("/impact", params={"thing": story.rows["otto"][0]})).json()
        assert reply["counts"]["adapter"] == 1 and reply["subject"]["role"] == "row"
        assert reply["items"][0]["receipts"] == story.receipts["second"]
        seen: list[Any] = []
        before: dict[str, int] = {}
        while True:
            params = {"thing": "mira", "limit": 3, **before}
            page = (await operator.get("/descendants", params=params)).json()
            seen += page["items"]
            if page["next_before"] is None:
                break
            before = {"before": page["next_before"]}
        assert len(seen) == page["total"] == len({item["leaf_hash"] for item in seen})
        chain = (await operator.get("/path", params={"from": "otto", "to": "support@2"})).json()
        assert [item["kind"] for item in chain["items"]] == ["contributor", "dataset", "refinement", "adapter"]
        empty = (await operator.get("/path", params={"from": "otto", "to": "support@1"})).json()
        assert empty["items"] == []
        changed = (await operator.get("/diff", params={"older": "support@2"})).json()
        assert changed["older"]["reference"] == "support@1" and changed["scores"][0]["verdict"] == "improved"
        kinds = (
            await operator.get("/ancestors", params={"thing": "support", "kind": ["dataset", "base_model"]})
        ).json()
        assert {item["kind"] for item in kinds["items"]} == {"dataset", "base_model"}

    ask(story, tmp_path, body)


def test_a_tenant_looks_upwards_from_what_is_its_own(story: Versions, tmp_path: Path) -> None:
    async def body(_: httpx.AsyncClient, tenant: httpx.AsyncClient) -> None:
        assert (await tenant.get("/ancestors", params={"thing": "support@2"})).json()["total"] == 6
        own, foreign = story.receipts["both"][1], story.receipts["both"][0]
        assert (await tenant.get("/ancestors", params={"thing": own})).json()["total"] == 7
        assert (await tenant.get("/path", params={"from": "otto", "to": own})).status_code == 200
        assert (await tenant.get("/diff", params={"older": "support@1", "newer": "support@2"})).status_code == 200
        private = story.leaf("mira-rows")
        for path, params in (
            ("/ancestors", {"thing": foreign}),
            ("/ancestors", {"thing": private}),
            ("/ancestors", {"thing": own[:-1]}),
            ("/ancestors", {"thing": "mira"}),
            ("/ancestors", {"thing": "mirra"}),
            ("/path", {"from": "otto", "to": "support@1"}),
            ("/path", {"from": "ottto", "to": "support@1"}),
            ("/diff", {"older": private, "newer": story.leaf("otto-rows")}),
        ):
            refused = await tenant.get(path, params=params)
            assert (refused.status_code, error(refused)["code"]) == (404, "lineage_not_found"), (path, params)
            assert "mira" not in error(refused)["message"]
        for path in ("/impact", "/descendants"):
            refused = await tenant.get(path, params={"thing": "support@2"})
            assert (refused.status_code, error(refused)["code"]) == (403, "operator_key_required")

    ask(story, tmp_path, body)


def test_mistakes_in_openais_form(story: Versions, tmp_path: Path) -> None:
    async def body(operator: httpx.AsyncClient, _: httpx.AsyncClient) -> None:
        near = await operator.get("/impact", params={"thing": "suport@2"})
        assert near.status_code == 404 and "did you mean support" in error(near)["message"]
        for path, params, param in (
            ("/impact", {}, "thing"),
            ("/impact", {"thing": ""}, "thing"),
            ("/impact", {"thing": "mira", "limit": "0"}, "limit"),
            ("/impact", {"thing": "mira", "limit": "many"}, "limit"),
            ("/impact", {"thing": "mira", "before": "-1"}, "before"),
            ("/impact", {"thing": "mira", "kind": "adaptor"}, "thing"),
            ("/impact", {"thing": "mira", "things": "x"}, "things"),
            ("/path", {"from": "mira"}, "to"),
            ("/diff", {"older": "support@1", "newer": "tiny"}, "older"),
        ):
            refused = await operator.get(path, params=params)
            assert (refused.status_code, error(refused)["param"]) == (400, param), (path, params, refused.text)
        nobody = await operator.get("/impact", params={"thing": "mira"}, headers={"Authorization": ""})
        assert (nobody.status_code, error(nobody)["code"]) == (401, "invalid_api_key")
        posted = await operator.post("/impact", params={"thing": "mira"})
        assert posted.status_code == 405 and error(posted)["code"] == "method_not_allowed"

    ask(story, tmp_path, body)


def test_it_is_described(story: Versions, tmp_path: Path) -> None:
    async def body(operator: httpx.AsyncClient, _: httpx.AsyncClient) -> None:
        described = (await operator.get("/openapi.json")).json()
        paths = {path.removeprefix("/v1/lineage/") for path in described["paths"]}
        assert paths == {"ancestors", "descendants", "impact", "path", "diff"}
        names = [one["name"] for one in described["paths"]["/v1/lineage/path"]["get"]["parameters"]]
        assert names == ["from", "to"]

    ask(story, tmp_path, body)


def test_the_gateway_serves_it(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            model = next(iter((await client.get("/v1/models")).json()["data"][1:]))["id"]
            reply = await client.get("/v1/lineage/ancestors", params={"thing": model})
            assert reply.status_code == 200, reply.text
            assert (await world.client().get("/v1/lineage/ancestors", params={"thing": model})).status_code == 401

    asyncio.run(body())
