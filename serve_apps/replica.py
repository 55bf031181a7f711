"""The replica: one engine in one process, a shell round `Completer` that Ray Serve starts."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from attribution.actors import log_writer
from attribution.receipts import DamagedTable, ReceiptError, ReceiptRow
from attribution.records import RecordError
from attribution.trail import Trail
from configs.schema import ServeSettings
from serve_apps.adapters import VerifiedAdapters, signature_check
from serve_apps.calls import Answer, Call, Piece
from serve_apps.completer import Completer
from serve_apps.engine.async_engine import AsyncEngine
from serve_apps.engine.config import EngineConfig
from serve_apps.errors import Problem
from serve_apps.spool import Spool, SpooledRow
from serve_apps.usage import Receipts, RowsRefused, Server

APPEND_TIMEOUT_S = 60.0


class ActorReceiptLog:
    """Sends receipts to the log writer actor, after their private content is in the store."""

    def __init__(self, trail: Trail, *, server: Server) -> None:
        self._trail, self._server = trail, server

    def append(self, rows: Sequence[SpooledRow]) -> None:
        """Append one record for each replica among the rows: those of an orphaned segment are a dead replica's.

        Raises RowsRefused, and what Ray or the store raises.
        """
        batches: dict[str, list[ReceiptRow]] = {}
        for row in rows:
            stored = ReceiptRow(row.receipt, row.salt, self._trail.put_json(row.content))
            batches.setdefault(str(row.receipt.get("replica")), []).append(stored)
        for replica, batch in batches.items():
            _wait(log_writer().append_completions.remote(batch, replica))

    def adapter_loaded(self, adapter: str) -> None:
        """Record the load. Raises RowsRefused, and what Ray raises."""
        _wait(log_writer().adapter_loaded.remote(self._server.replica, adapter, self._server.base_digest))


def _wait(reference: Any) -> None:
    """Wait for the log writer's answer; a refusal that is the rows' own fault becomes RowsRefused."""
    try:
        ray.get(reference, timeout=APPEND_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ReceiptError | RecordError) and not isinstance(cause, DamagedTable):
            raise RowsRefused(str(cause)) from None
        raise


class Replica:
    """Owns an engine and the receipts of what it answers."""

    def __init__(self, *, home: str, settings: ServeSettings, base_path: str, base_digest: str) -> None:
        trail = Trail.open(Path(home))
        server = Server(serve.get_replica_context().replica_id.unique_id, base_digest)
        spool = Spool(Path(home) / "run" / "spool")
        log = ActorReceiptLog(trail, server=server)
        self._engine = AsyncEngine(engine_config(settings, base_path=base_path, base_digest=base_digest))
        self._receipts = Receipts(log, spool, owner=server.replica, flush_s=settings.receipt_flush_s)
        adapters = VerifiedAdapters(trail.store, check=signature_check(trail, settings.model_signatures))
        self._completer = Completer(self._engine, adapters, self._receipts, server=server)

    async def complete(self, call: Call) -> Answer | Problem:
        """Answer one call in one piece."""
        return await self._completer.complete(call)

    async def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Answer one call as it is generated."""
        async with contextlib.aclosing(self._completer.stream(call)) as pieces:
            async for piece in pieces:
                yield piece

    async def stats(self) -> dict[str, Any]:
        """Return the engine's figures and how many receipts wait for the log."""
        return {**self._engine.stats(), "receipts_waiting": self._receipts.num_waiting}

    async def __del__(self) -> None:
        """Serve calls this when the last request has ended: open receipts go to the log, or stay in the spool."""
        if hasattr(self, "_receipts"):
            await asyncio.to_thread(self._receipts.close)
            await asyncio.to_thread(self._engine.close)


def engine_config(settings: ServeSettings, *, base_path: str, base_digest: str) -> EngineConfig:
    """Return the engine's own settings."""
    return EngineConfig(
        base_path=base_path,
        base_digest=base_digest,
        dtype=settings.dtype,
        device="cuda" if settings.num_gpus else "cpu",
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        kv_block_size=settings.kv_block_size,
        adapter_cache_bytes=settings.adapter_cache_mib << 20,
        adapter_host_bytes=settings.adapter_host_mib << 20,
        max_step_adapter_bytes=None if settings.max_step_adapter_mib is None else settings.max_step_adapter_mib << 20,
        enable_prefix_cache=settings.enable_prefix_cache,
        tenant_weights=tuple(settings.tenant_weights.items()),
        num_threads=settings.num_threads,
    )
