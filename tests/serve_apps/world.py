"""A gateway over HTTP with a real engine and a real log, all in one process."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from configs.schema import ServeSettings
from serve_apps.adapters import VerifiedAdapters, signature_check
from serve_apps.apikeys import ApiKeys, keys_path
from serve_apps.completer import Completer
from serve_apps.engine.async_engine import AsyncEngine
from serve_apps.engine.config import EngineConfig
from serve_apps.gateway import Gateway, build_http
from serve_apps.spool import Spool
from serve_apps.usage import Receipts, Server
from tests.serve_apps.published import LocalBackend, Published, TrailReceiptLog
from tests.tiny_model import QUESTIONS

QUESTION, ANSWER = QUESTIONS[0]
SETTINGS = ServeSettings(max_model_len=128, default_max_tokens=24, receipt_flush_s=0.02, max_running_requests=8)


class World:
    """A gateway with its engine, and clients for it."""

    def __init__(self, published: Published, home: Path, settings: ServeSettings) -> None:
        trail = published.trail
        server = Server("replica-1", published.base.digest)
        log = TrailReceiptLog(trail, replica="replica-1", base_digest=published.base.digest)
        self.receipts = Receipts(log, Spool(home / "spool"), owner="test", flush_s=settings.receipt_flush_s)
        self.engine = AsyncEngine(EngineConfig(published.base.path, max_model_len=128, max_num_seqs=8))
        adapters = VerifiedAdapters(trail.store, check=signature_check(trail, settings.model_signatures))
        completer = Completer(self.engine, adapters, self.receipts, server=server)
        backend = LocalBackend(completer)
        self.gateway = Gateway(trail=trail, settings=settings, base=published.base, backend=backend)
        self.keys = ApiKeys(keys_path(trail.home))
        self.published = published
        self.transport = httpx.ASGITransport(build_http(self.gateway), raise_app_exceptions=False)

    def client(self, secret: str = "") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return httpx.AsyncClient(transport=self.transport, base_url="http://test", headers=headers, timeout=60)

    def tenant(self, name: str, *, is_operator: bool = False) -> httpx.AsyncClient:
        with contextlib.suppress(Exception):
            self.keys.revoke(name)
        return self.client(self.keys.create(name, is_operator=is_operator))

    def close(self) -> None:
        assert self.receipts.close()
        self.engine.close()


Body = Callable[[World, httpx.AsyncClient], Awaitable[None]]


@contextlib.asynccontextmanager
async def opened(published: Published, home: Path, **changes: Any) -> AsyncIterator[tuple[World, httpx.AsyncClient]]:
    world = World(published, home, SETTINGS.model_copy(update=changes))
    try:
        async with world.tenant("acme") as client:
            yield world, client
    finally:
        world.close()


def chat(question: str = QUESTION, model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


async def events(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]
