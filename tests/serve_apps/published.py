"""What tests of serving stand on: a trail with published adapters, and the engine side without Ray."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.bodies import AdapterBody, AdapterLoadedBody, BaseModelBody, PublicationBody
from attribution.receipts import ReceiptRow, append_once
from attribution.records import Artefact
from attribution.trail import Trail
from serve_apps.calls import Answer, Call, Piece
from serve_apps.completer import Completer
from serve_apps.errors import Problem
from serve_apps.gateway import Base
from serve_apps.spool import SpooledRow

NOTHING = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Published:
    """A trail that serves: its base and the digest of each published adapter."""

    trail: Trail
    base: Base
    digests: dict[str, str]


def add_base(trail: Trail, folder: Path, *, name: str) -> str:
    """Store and record a base model as `trailmark base add` does; return its digest."""
    digest = trail.store.put_directory(folder, kind="base_model", meta={})
    body = BaseModelBody(name, "tests", "LlamaForCausalLM", "Apache-2.0", "float32", "", 100_000)
    trail.record("base_model", body, outputs=[Artefact("base_model", name, digest)])
    return digest


def publish(trail: Trail, name: str, folder: Path, *, base_digest: str) -> str:
    """Store, record and publish an adapter folder as the next version of `name`; return its digest."""
    digest = trail.store.put_directory(folder, kind="adapter", meta={"base": base_digest})
    adapter, base = Artefact("adapter", name, digest), Artefact("base_model", "base", base_digest)
    body = AdapterBody(
        name=name,
        base=base_digest,
        dataset=NOTHING,
        rank=1,
        alpha=2,
        target_modules=("q_proj",),
        num_steps=0,
        num_examples=0,
        final_loss_micro=0,
        reload_max_abs_diff_micro=0,
        trace=NOTHING,
    )
    trail.record("adapter", body, inputs=[base], outputs=[adapter])
    publication = PublicationBody(name, trail.registry.next_version(name), "adapter", digest)
    trail.record("publication", publication, inputs=[adapter], outputs=[adapter])
    return digest


class TrailReceiptLog:
    """Receipts straight into a trail: what the log writer actor does, without the actor."""

    def __init__(self, trail: Trail, *, replica: str, base_digest: str) -> None:
        self._trail, self._replica, self._base_digest = trail, replica, base_digest

    def append(self, rows: Sequence[SpooledRow]) -> None:
        batch = [ReceiptRow(row.receipt, row.salt, self._trail.put_json(row.content)) for row in rows]
        append_once(self._trail, batch, replica=self._replica)

    def adapter_loaded(self, adapter: str) -> None:
        self._trail.record("adapter_loaded", AdapterLoadedBody(self._replica, adapter, self._base_digest))


class LocalBackend:
    """The gateway's backend in this process."""

    def __init__(self, completer: Completer) -> None:
        self._completer = completer

    async def complete(self, call: Call) -> Answer | Problem:
        return await self._completer.complete(call)

    def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        return self._completer.stream(call)

    async def explain(self, receipt_id: str, num_examples: int | None = None) -> dict[str, Any] | Problem:
        return {"receipt_id": receipt_id, "contributors": []}
