"""A receipted completion as a question to the gradient store of its adapter's trace, and stores held open."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.erasure import remaining
from attribution.influence.gradient_store import HEADER_FILE, GradientStore, GradientStoreError
from attribution.influence.rows import STORE_FOLDER
from attribution.influence.scores import Normalise
from attribution.influence.store import Trace
from attribution.influence.topk import Asked
from attribution.influence.who import NO_TRACE, OTHER_WEIGHTS, ExplainError, subject_of

if TYPE_CHECKING:
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
    """Return the question of a receipt: its gradient at `views`, by default at the last checkpoint alone.

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
    chosen = tuple(views or store.views[-1:])
    rows = models.store_features(subject.completion, trace, store, base=base, adapter=adapter, views=chosen)
    return Question(receipt["id"], digest, Asked(chosen, rows, normalise))
