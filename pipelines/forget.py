"""Forget a row or a contributor: erase content and gradients, name the adapters that learnt from it, train them again.

Training again publishes nothing: the old adapter keeps its name until somebody publishes the new one. The new one's
record has the redaction among its parents, so lineage says what it takes the place of, and why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from attribution.bodies import AdapterBody
from attribution.erasure import ErasureError, remaining
from attribution.lineage import label_of
from configs.errors import UserError
from configs.schema import TrainSettings
from pipelines.erase import EXAMPLES_FILE, Erasing, erase, holds_any, plan
from pipelines.refine.table import ROWS_FILE
from pipelines.replay import recorded_settings

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail
    from pipelines.train.driver import Progress, TrainReport

REDACTED_KINDS = ("row_redaction", "redaction")


class ForgetError(UserError):
    """What cannot be forgotten, or not any more."""


@dataclass(frozen=True)
class Learner:
    """An adapter that learnt from forgotten rows. `num_rows`: how many its trace names, None without a trace."""

    entry: "Entry"
    name: str
    digest: str
    references: tuple[str, ...]
    num_rows: int | None

    @property
    def label(self) -> str:
        """The name people know it by."""
        return self.references[-1] if self.references else f"{self.name} ({self.digest[7:19]})"


@dataclass(frozen=True)
class Forgetting:
    """What forgetting takes, and which adapters it leaves behind."""

    erasing: Erasing
    learners: tuple[Learner, ...]


@dataclass(frozen=True)
class Relearnt:
    """An adapter and the one that was trained in its place; `report` is None when nothing was left, `why` says so."""

    learner: Learner
    report: "TrainReport | None"
    why: str = ""


def plan_forget(trail: "Trail", target: str) -> Forgetting:
    """Return what forgetting a row (its id) or a contributor (a name) takes.

    Raises:
        ForgetError: nothing of that name is left, or it names a record.
    """
    try:
        erasing = plan(trail, target)
    except ErasureError as error:
        raise ForgetError(f"{error}{_gone_already(trail)}") from error
    if erasing.what == "record":
        kind = trail.entry(erasing.name).leaf.kind.replace("_", " ")
        raise ForgetError(
            f"{target!r}: a record ({kind}); rows and contributors are forgotten, `trailmark erase {target}` erases it"
        )
    return Forgetting(erasing, tuple(_learners(trail, erasing)))


def forget(trail: "Trail", forgetting: Forgetting, *, reason: str, requester: str) -> "list[Entry]":
    """Erase content, ids and gradients, and return the redactions; safe to repeat after a crash."""
    return erase(trail, forgetting.erasing, reason=reason, requester=requester)


def train_again(trail: "Trail", learner: Learner, *, progress: "Progress | None" = None) -> Relearnt:
    """Train an adapter again, by its recorded settings and base, on what is left of its dataset; needs Ray.

    Call it after `forget`.

    Raises:
        ReplayError: the settings were erased, or this code does not take them.
        TrainError: the run failed.
    """
    from pipelines.refine.read import load_refined
    from pipelines.train.driver import train

    record = learner.entry.record
    assert record is not None and isinstance(record.body, AdapterBody)
    dataset = remaining(trail, record.body.dataset)
    if not trail.store.has(dataset) or load_refined(trail, dataset).num_rows == 0:
        return Relearnt(learner, None, "no row of its dataset is left")
    settings = recorded_settings(trail, learner.entry, TrainSettings)
    report = train(trail, dataset, name=learner.name, base=record.body.base, settings=settings, progress=progress)
    return Relearnt(learner, report)


def _learners(trail: "Trail", erasing: Erasing) -> Iterator[Learner]:
    """The adapters whose trace or dataset holds one of the rows, in log order."""
    ids = pa.array(sorted(erasing.row_ids), pa.string())
    published: dict[str, list[str]] = {}
    for item in trail.registry.list(kind="adapter"):
        published.setdefault(item.digest, []).append(item.reference)
    for entry in trail.entries(kind="adapter"):
        record = entry.record
        if record is None or not isinstance(record.body, AdapterBody) or entry.leaf_hash in erasing.leaves:
            continue
        num_rows = _rows_in(trail, remaining(trail, record.body.trace), EXAMPLES_FILE, ids)
        if num_rows is None and not _rows_in(trail, remaining(trail, record.body.dataset), ROWS_FILE, ids):
            continue
        if num_rows != 0:
            digest = next(output.digest for output in record.outputs if output.kind == "adapter")
            yield Learner(entry, record.body.name, digest, tuple(published.get(digest, ())), num_rows)


def _rows_in(trail: "Trail", digest: str, name: str, ids: pa.Array) -> int | None:
    """How many of the rows a stored table holds; None when it is not there."""
    if not trail.store.has(digest) or not (trail.store.path_of(digest) / name).is_file():
        return None
    return holds_any(trail.store.path_of(digest) / name, ids)


def _gone_already(trail: "Trail") -> str:
    """Say that a forgotten thing leaves no name to find it by."""
    found = [entry for kind in REDACTED_KINDS for entry in trail.entries(kind=kind)]
    if not found:
        return ""
    last = max(found, key=lambda entry: entry.index)
    return (
        f". If it was forgotten already, that is what is meant to be: {len(found)} redactions stand in the log, the "
        f"last as entry {last.index} ({label_of(last)})"
    )
