"""A receipted completion as a question to the gradient store of its adapter's trace, and stores held open."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attribution.erasure import remaining
from attribution.influence.gradient_store import HEADER_FILE, GradientStore, GradientStoreError
from attribution.influence.rows import STORE_FOLDER
from attribution.influence.scores import Normalise
from attribution.influence.store import Trace
from attribution.influence.topk import Asked
from attribution.influence.who import NO_TRACE, OTHER_WEIGHTS, ExplainError, subject_of

if TYPE_CHECKING:
    from attribution.influence.gradients import Encoded
    from attribution.influence.query import AdapterModels
    from attribution.trail import Trail


@dataclass(frozen=True)
class Question:
    """What is asked of which trace's store."""

    receipt_id: str
    trace: str
    asked: Asked


class OpenStores:
    """Gradient stores of traces by digest, verified once and then held open."""

    def __init__(self, trail: "Trail") -> None:
        self._trail = trail
        self._stores: dict[str, GradientStore] = {}

    def get(self, trace: str) -> GradientStore:
        """Return a trace's store, of which this machine may hold some shards only.

        Raises GradientStoreError for files that are not those the trace's digest stands for, or a trace without a
        store; StoreError for a trace that is not here.
        """
        if trace not in self._stores:
            folder = self._trail.store.get_directory(trace, verify=False)
            self._require_header(trace, folder)
            self._stores[trace] = GradientStore(folder / STORE_FOLDER)
        return self._stores[trace]

    def _require_header(self, trace: str, folder: Path) -> None:
        """Hold the header to the trace's manifest: it names every other file by its own digest."""
        name = (STORE_FOLDER / HEADER_FILE).as_posix()
        known = {file.path: file.sha256 for file in self._trail.store.manifest(trace).files}
        if name not in known:
            raise GradientStoreError(
                f"trace {trace}: it is from before gradient stores; `trailmark ask who` still explains each receipt"
            )
        file = folder / name
        if not file.is_file() or sha256(file.read_bytes()).hexdigest() != known[name]:
            raise GradientStoreError(f"trace {trace}: {name} was altered or is missing; restore the trace")


def question_of(
    trail: "Trail",
    receipt_id: str,
    models: "AdapterModels",
    stores: OpenStores,
    *,
    views: Sequence[str] | None = None,
    normalise: Normalise = "cosine",
) -> Question:
    """Return the question of a receipt: its gradient at each of `views`; their mean where rows are sums.

    By default the mean of its gradients at the middle and the last checkpoint, cleared of the store's residual, against
    the rows of all of them: an answer's gradient lives where training ended, what an example did lies along the way,
    and half way the answer was not yet settled. Measured in docs/log.md of 2026-11-25. Rows that Adam preconditions
    differ from checkpoint to checkpoint, so there the last ones are asked alone.

    Raises ExplainError when the base answered, when the adapter has no trace, or its weights are not its trace's.
    """
    subject = subject_of(trail, receipt_id)
    receipt = subject.receipt
    if receipt["adapter"] is None:
        raise ExplainError(f"receipt {receipt['id']}: the request was for the base model; no row of ours made it")
    digest = remaining(trail, str(trail.store.manifest(receipt["adapter"]).meta.get("trace") or ""))
    if not digest or not trail.store.has(digest):
        raise ExplainError(f"receipt {receipt['id']}: {NO_TRACE}")
    store = stores.get(digest)
    trace = Trace(trail.store.get_directory(digest, verify=False))
    base, adapter = (models.folder(trail.store, receipt[key]) for key in ("base", "adapter"))
    if not models.is_own(trace, adapter):
        raise ExplainError(f"receipt {receipt['id']}: {OTHER_WEIGHTS}")
    is_pooled = store.is_summed or (views is None and store.preconditioner != "adam")
    chosen = tuple(views or _views(store))
    rows = models.store_features(subject.completion, trace, store, base=base, adapter=adapter, views=chosen)
    if is_pooled:
        return Question(receipt["id"], digest, asked_of_all(store, rows, normalise))
    return Question(receipt["id"], digest, Asked(chosen, rows, normalise))


def set_question(
    trace: Trace,
    store: GradientStore,
    queries: "Sequence[Encoded]",
    *,
    models: "AdapterModels",
    base: Path,
    adapter: Path,
    normalise: Normalise = "cosine",
) -> Asked:
    """Return a query set as a question, a row for each query, asked where `question_of` asks a receipt's."""
    views = _views(store)
    rows = models.set_features(queries, trace, store, base=base, adapter=adapter, views=views)
    return Asked(views, rows, normalise) if store.preconditioner == "adam" else asked_of_all(store, rows, normalise)


def _views(store: GradientStore) -> tuple[str, ...]:
    """Return where an answer's gradient is taken by default."""
    return store.views[-1:] if store.preconditioner == "adam" else asked_views(store.steps)


def asked_views(views: Sequence[str]) -> tuple[str, ...]:
    """Return the checkpoints at which an answer's gradient is taken: the middle one and the last."""
    return tuple(dict.fromkeys((views[(len(views) - 1) // 2], views[-1])))


def asked_of_all(store: GradientStore, rows: NDArray[np.float32], normalise: Normalise) -> Asked:
    """Return queries' rows [c, q, d] at some views as one question to all views of a store with one codec."""
    row = rows.mean(axis=0)
    if normalise == "cosine" and store.residual is not None:
        row = store.residual.take_from(row)
    return Asked(store.views, np.repeat(row[None], len(store.views), axis=0), normalise)
