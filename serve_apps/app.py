"""The Serve application: which deployments there are, how they are sized, and how the gateway reaches the others."""

import asyncio
import contextvars
import itertools
import logging
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from attribution.actors import ranked_over, scorers
from attribution.influence.rows import ShardsElsewhere
from attribution.trail import Trail
from configs.errors import UserError
from configs.schema import ServeSettings
from serve_apps.calls import Answer, Call, Piece
from serve_apps.errors import Problem, internal, overloaded
from serve_apps.gateway import Base, Gateway, build_http
from serve_apps.replica import Replica
from serve_apps.router import AdapterAffinityRouter

logger = logging.getLogger(__name__)

APP_NAME = "trailmark"
REPLICA_CPUS = 1.0
GATEWAY_CPUS = 0.1
SHUTDOWN_TIMEOUT_S = 30.0
HEALTH_TIMEOUT_S = 60.0
# Training shares the cores: a starved replica is slow, not dead, and killing it would lose its requests.
REPLICA_HEALTH_TIMEOUT_S = 180.0


class ServeBackend:
    """Reaches replicas through a Serve handle and scorers through their names."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._turn = itertools.count()

    async def complete(self, call: Call) -> Answer | Problem:
        """Answer in one piece; a cancelled caller cancels the replica's work too."""
        response = _send(self._handle(call, "complete"), call)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # whatever Ray says: the caller gets OpenAI's form, the log the cause
            return _lost(call, error)

    async def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Answer as it is generated; a caller who leaves cancels the replica's work."""
        response = _send(self._handle(call, "stream").options(stream=True), call)
        is_finished = False
        try:
            async for piece in response:
                is_finished = isinstance(piece, Answer | Problem)
                yield piece
        except Exception as error:
            is_finished = True
            yield _lost(call, error)
        finally:
            if not is_finished:
                response.cancel()

    async def explain(self, receipt_id: str, num_examples: int | None = None) -> dict[str, Any] | Problem:
        """Ask the next scorer in turn."""
        found = await asyncio.to_thread(scorers)
        if not found:
            return overloaded("No scorer is running; `trailmark up` starts them.", retry_after_s=10).problem
        scorer = found[next(self._turn) % len(found)]
        try:
            explained: dict[str, Any] = await scorer.explain.remote(receipt_id, num_examples)
            return explained
        except RayError as error:
            cause = getattr(error, "cause", None)  # Ray's own text is the remote traceback
            if isinstance(cause, ShardsElsewhere):
                return await self._ranked(found, receipt_id, num_examples)
            return _unexplained(receipt_id, cause if isinstance(cause, UserError) else error)

    async def _ranked(self, found: list[Any], receipt_id: str, num_examples: int | None) -> dict[str, Any] | Problem:
        try:
            return await asyncio.to_thread(ranked_over, found, receipt_id, num_examples)
        except (RayError, UserError) as error:
            return _unexplained(receipt_id, error)

    def _handle(self, call: Call, method: str) -> DeploymentHandle:
        adapter = call.adapter.digest if call.adapter else ""
        return self._replicas.options(method_name=method, multiplexed_model_id=adapter)


def _send(handle: DeploymentHandle, call: Call) -> Any:
    """Send a call in a context of its own.

    In the context of an HTTP request Serve 2.60 gives all its calls one internal id, and a router that matches waiting
    calls by that id, as ours does, forgets all but one of those sent at the same time: they would wait for ever.
    """
    return contextvars.Context().run(handle.remote, call)


def _unexplained(receipt_id: str, error: Exception) -> Problem:
    if isinstance(error, UserError):
        return Problem(422, str(error), code="attribution_unavailable", param="receipt_id")
    logger.error("the attribution of %s failed: %s", receipt_id, error)
    return internal(receipt_id)


def _lost(call: Call, error: Exception) -> Problem:
    if isinstance(error, BackPressureError | DeploymentUnavailableError):
        return overloaded("Every replica is busy or starting. Try again shortly.").problem
    logger.error("request %s was lost: %s", call.receipt_id, error)
    return internal(call.receipt_id)


@serve.ingress()
class GatewayApp:
    """The shell round `Gateway` that Ray Serve starts."""

    def __init__(self, replicas: DeploymentHandle, *, home: str, settings: ServeSettings, base: Base) -> None:
        backend = ServeBackend(replicas)
        self._gateway = Gateway(trail=Trail.open(Path(home)), settings=settings, base=base, backend=backend)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the routes once the gateway stands."""
        return build_http(self._gateway)


def build(settings: ServeSettings, *, home: Path, base: Base) -> serve.Application:
    """Return the application: one gateway, `settings.num_replicas` replicas. The engine queues, the gateway refuses."""
    queue = settings.max_running_requests + settings.max_num_seqs
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=queue,
        ray_actor_options={"num_cpus": REPLICA_CPUS, "num_gpus": settings.num_gpus},
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_timeout_s=REPLICA_HEALTH_TIMEOUT_S,
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterAffinityRouter, request_router_kwargs={"max_spill": settings.max_num_seqs}
        ),
    )
    gateway = serve.deployment(
        GatewayApp,
        name="Gateway",
        # The gateway refuses what is too much itself, in OpenAI's form; Serve's own refusal is plain text.
        max_ongoing_requests=4 * queue,
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_timeout_s=REPLICA_HEALTH_TIMEOUT_S,
    )
    backend = replicas.bind(home=str(home), settings=settings, base_path=base.path, base_digest=base.digest)
    return gateway.bind(backend, home=str(home), settings=settings, base=base)


def deploy(
    settings: ServeSettings, *, home: Path | str, base_path: str, base_digest: str, base_name: str | None = None
) -> str:
    """Start serving on the Ray cluster this process is connected to, wait until it answers, and return its URL.

    The log writer and the scorers are attribution.actors' and start before. `base_name` (default `settings.base`) is
    what callers write as `model` for the base. A second call replaces the application.
    """
    http = HTTPOptions(host=settings.host, port=settings.port)
    serve.start(http_options=http, proxy_location=ProxyLocation.HeadOnly)
    base = Base(base_path, base_digest, base_name or settings.base)
    serve.run(build(settings, home=Path(home), base=base), name=APP_NAME, route_prefix="/")
    reachable = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{reachable}:{settings.port}"
    with urllib.request.urlopen(f"{url}/health", timeout=HEALTH_TIMEOUT_S) as response:
        assert response.status == 200, "serve.run returns when every deployment is healthy"
    return url


def stop() -> None:
    """Stop serving: running requests finish, receipts are flushed, then the replicas end."""
    serve.delete(APP_NAME)
    serve.shutdown()
