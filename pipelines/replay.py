"""Run a recorded refinement, training or benchmark again from its record, and compare what comes out.

The second run reads the trail's own log and hard links of its inputs; it writes to a scratch folder that is removed,
and records nothing.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from attribution.bodies import AdapterBody, BenchmarkBody, Metric, RefinementBody
from attribution.provenance import code_identity, environment_digest
from attribution.records import SALT_BYTES, Record, build_leaf, record_to_envelope
from attribution.registry import RegistryError
from attribution.store import Store
from attribution.trail import Draft, Entry, Trail, record_of
from attribution.trust_file import TRUST_FILE
from configs.errors import UserError
from configs.schema import BenchmarkSettings, RefineSettings, Section, TrainSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("refinement", "adapter", "benchmark")
WEIGHTS_FILE = "adapter_model.safetensors"
RUNS_FOLDER = Path("run") / "replay"

SectionT = TypeVar("SectionT", bound=Section)


class ReplayError(UserError):
    """A record that cannot be found or run again."""


@dataclass(frozen=True)
class Compared:
    """One fact of a run as it was recorded and as it came out again."""

    fact: str
    recorded: str
    replayed: str

    @property
    def equal(self) -> bool:
        return self.recorded == self.replayed


@dataclass(frozen=True)
class ReplayReport:
    """All facts compared. `largest_difference`: of any adapter weight when the weights differ, else None."""

    entry: Entry
    facts: tuple[Compared, ...]
    largest_difference: float | None = None

    @property
    def equal(self) -> bool:
        return all(fact.equal for fact in self.facts)


def find_run(trail: Trail, reference: str, *, kind: str | None = None) -> Entry:
    """Return the record of a run by digest of its output, name, published name[@version], or leaf hash.

    A name means its newest record, or the adapter published under it.

    Raises:
        ReplayError: no such record, a name of several kinds without `kind`, an erased record, one of another kind.
    """
    if kind is not None and kind not in KINDS:
        raise ReplayError(f"kind {kind!r}: use one of {', '.join(KINDS)}")
    if reference.startswith("sha256:"):
        entry = trail.find(reference)
        if entry is None:
            raise ReplayError(f"digest {reference}: no record of this trail made it")
    else:
        named = {found: entry for found, entry in _named(trail, reference).items() if kind in (None, found)}
        if len(named) > 1:
            raise ReplayError(f"name {reference!r}: {' and '.join(named)} are called so; pass --kind")
        entry = next(iter(named.values())) if named else trail.entry(trail.leaf_hash(reference))
    if entry.leaf.kind not in KINDS or kind not in (None, entry.leaf.kind):
        wanted = kind or ", ".join(KINDS)
        raise ReplayError(f"record {entry.leaf_hash[:12]}: of kind {entry.leaf.kind}; can be replayed: {wanted}")
    _record_of(entry)
    return entry


def differences(entry: Entry) -> tuple[str, ...]:
    """Say in words how this code and environment are not those of the record; empty when they are."""
    record, code = _record_of(entry), code_identity()
    found = []
    if record.code.commit != code.commit:
        found.append(f"git commit: recorded {record.code.commit or 'none'}, now {code.commit or 'none'}")
    if record.code.dirty != code.dirty:
        found.append(f"uncommitted changes: recorded {_yes(record.code.dirty)}, now {_yes(code.dirty)}")
    elif code.dirty:
        found.append("uncommitted changes: recorded yes, now yes; they need not be the same changes")
    if record.environment != environment_digest():
        found.append(f"environment: recorded {record.environment}, now {environment_digest()}")
    return tuple(found)


def replay(trail: Trail, entry: Entry) -> ReplayReport:
    """Run the record's pipeline again, with its stored configuration on its stored inputs, and compare.

    A refinement and an adapter need a Ray cluster, as the first run did. Nothing is recorded.

    Raises:
        ReplayError: the configuration is missing or not one that this code understands.
        UserError: an input is missing or altered, or the run failed.
    """
    record = _record_of(entry)
    with _rehearsal(trail, record) as rehearsal:
        if isinstance(record.body, RefinementBody):
            return _replay_refinement(trail, rehearsal, entry)
        if isinstance(record.body, AdapterBody):
            return _replay_adapter(trail, rehearsal, entry)
        return _replay_benchmark(trail, rehearsal, entry)


def replay_from(trail: Trail, entry: Entry, step: int) -> ReplayReport:
    """Run an adapter's training again from the state kept after `step` updates to the next one, and compare the two.

    Raises:
        ReplayError: the record is not of an adapter.
        TraceError: an adapter trained without a recorder, erased rows, or no state after `step` updates.
    """
    from attribution.erasure import remaining
    from attribution.influence.store import Trace
    from pipelines.train.segment import replay_segment

    record = _record_of(entry)
    if not isinstance(record.body, AdapterBody):
        raise ReplayError(f"record {entry.leaf_hash[:12]}: of kind {entry.leaf.kind}; only a training run keeps states")
    base = next(source for source in record.inputs if source.digest == record.body.base)
    trace = Trace(trail.store.get_directory(remaining(trail, record.body.trace)))
    segment = replay_segment(
        trail,
        trace,
        base=trail.store.get_directory(base.digest),
        base_name=base.name,
        settings=recorded_settings(trail, entry, TrainSettings),
        start=step,
    )
    differences = segment.largest_differences
    facts = tuple(
        Compared(f"{name} after step {segment.stop}", "as stored", "as stored" if not value else f"{value:.3g} off")
        for name, value in differences.items()
    )
    return ReplayReport(entry, facts, max(differences.values()) or None)


class Rehearsal(Trail):
    """A trail for a run that leaves none: log and records are those of `trail`, its files go to `scratch`."""

    def __init__(self, trail: Trail, scratch: Path) -> None:
        super().__init__(trail.home, trail.log)
        self.home = scratch
        self.store = Store(scratch / "store")

    def record_many(self, drafts: Sequence[Draft], *, then: object = None) -> list[Entry]:
        """Return what would be recorded; append nothing and run nothing after it."""
        return [self._unrecorded(draft) for draft in drafts]

    def _unrecorded(self, draft: Draft) -> Entry:
        record = record_of(draft, time_us=0)
        envelope, salt = record_to_envelope(record, draft.signer or self.keys.get("operator")), bytes(SALT_BYTES)
        leaf = build_leaf(record, envelope, salt=salt, parents=())
        return Entry(self.log.size, leaf.leaf_hash, leaf, record, envelope, salt)


@contextmanager
def _rehearsal(trail: Trail, record: Record) -> Iterator[Rehearsal]:
    """Make a scratch folder that holds the record's inputs, and remove it afterwards."""
    parent = trail.home / RUNS_FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=parent))
    try:
        _link(trail.home / TRUST_FILE, scratch / TRUST_FILE)
        for artefact in record.inputs:
            source = trail.store.path_of(artefact.digest)
            target = scratch / "store" / source.relative_to(trail.store.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)
            elif not target.exists():
                _link(source, target)
        yield Rehearsal(trail, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _link(source: str | Path, target: str | Path) -> None:
    """Hard link a file, which takes no space (the store replaces files, it never writes into them); else copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _replay_refinement(trail: Trail, rehearsal: Rehearsal, entry: Entry) -> ReplayReport:
    from pipelines.refine.driver import refine

    record = _record_of(entry)
    settings = recorded_settings(trail, entry, RefineSettings)
    datasets = [
        leaf for leaf in entry.leaf.parents if trail.entry(leaf).leaf.kind == "dataset"
    ]  # not a workflow's patch
    report = refine(rehearsal, datasets, settings, name=_body_name(entry))
    counts = Compared("rows kept", str(getattr(record.body, "num_kept", "")), str(report.num_kept))
    return ReplayReport(entry, (Compared("refined dataset", _output(record, "refined"), report.digest), counts))


def _replay_adapter(trail: Trail, rehearsal: Rehearsal, entry: Entry) -> ReplayReport:
    from pipelines.train.driver import train

    record = _record_of(entry)
    assert isinstance(record.body, AdapterBody)
    body, settings = record.body, recorded_settings(trail, entry, TrainSettings)
    # The name only labels; one of an older record need not be a name that training still takes.
    report = train(rehearsal, body.dataset, name="replay", base=body.base, settings=settings)
    recorded = trail.store.get_directory(_output(record, "adapter")) / WEIGHTS_FILE
    replayed = rehearsal.store.get_directory(report.digest) / WEIGHTS_FILE
    again = _record_of(report.entry).body
    assert isinstance(again, AdapterBody)
    weights = Compared(WEIGHTS_FILE, _file_digest(trail, recorded), _file_digest(rehearsal, replayed))
    facts = (
        weights,
        Compared("steps", str(body.num_steps), str(again.num_steps)),
        Compared("loss of the last step, micro-nats", str(body.final_loss_micro), str(again.final_loss_micro)),
    )
    return ReplayReport(entry, facts, None if weights.equal else _largest_difference(recorded, replayed))


def _replay_benchmark(trail: Trail, rehearsal: Rehearsal, entry: Entry) -> ReplayReport:
    from pipelines.benchmark.run import benchmark

    body = _record_of(entry).body
    assert isinstance(body, BenchmarkBody)
    settings = recorded_settings(trail, entry, BenchmarkSettings)
    rehearsal.store.get_blob(body.suite)
    report = benchmark(rehearsal, body.adapter, suite=rehearsal.store.path_of(body.suite), settings=settings)
    again = _record_of(report.entry).body
    assert isinstance(again, BenchmarkBody)
    pairs = zip(body.metrics, again.metrics, strict=True)
    return ReplayReport(entry, tuple(Compared(old.metric, _shown(old), _shown(new)) for old, new in pairs))


def _named(trail: Trail, reference: str) -> dict[str, Entry]:
    """Return the newest run of that name by kind; a published name decides which adapter or dataset it means."""
    found: dict[str, Entry] = {}
    for kind in KINDS:
        for entry in trail.entries(kind=kind):
            if entry.record is not None and _body_name(entry) == reference:
                found[kind] = entry
    try:
        published = trail.find(trail.registry.resolve(reference).digest)
    except RegistryError:
        return found
    return found if published is None else {**found, published.leaf.kind: published}


def recorded_settings(trail: Trail, entry: Entry, section: type[SectionT]) -> SectionT:
    """Return the record's configuration; its floats are stored as text, which pydantic reads as numbers."""
    config = _record_of(entry).config
    if not config:
        raise ReplayError(f"record {entry.leaf_hash[:12]}: it names no configuration; it cannot be replayed")
    try:
        return section.model_validate(trail.get_json(config))
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        commit = _record_of(entry).code.commit or "of that time"
        raise ReplayError(
            f"configuration {config}: this code does not take its {fields}; replay it with the code {commit}"
        ) from error


def _record_of(entry: Entry) -> Record:
    if entry.record is None:
        raise ReplayError(f"record {entry.leaf_hash[:12]}: it was erased; it cannot be replayed")
    return entry.record


def _body_name(entry: Entry) -> str:
    body = _record_of(entry).body
    assert isinstance(body, RefinementBody | AdapterBody | BenchmarkBody)
    return body.name


def _output(record: Record, kind: str) -> str:
    return next(output.digest for output in record.outputs if output.kind == kind)


def _file_digest(trail: Trail, file: Path) -> str:
    """Return the SHA-256 that the manifest of the file's directory states."""
    files = trail.store.manifest(f"sha256:{file.parent.name}").files
    return next(f"sha256:{item.sha256}" for item in files if item.path == file.name)


def _largest_difference(recorded: Path, replayed: Path) -> float:
    """Return the largest absolute difference of any weight; infinite when names or shapes differ."""
    old, new = _weights(recorded), _weights(replayed)
    if {name: value.shape for name, value in old.items()} != {name: value.shape for name, value in new.items()}:
        return float("inf")
    return max(float(abs(value - new[name]).max()) for name, value in old.items())


def _weights(file: Path) -> "dict[str, NDArray[Any]]":
    from safetensors.torch import load_file

    return {name: tensor.double().numpy() for name, tensor in load_file(file).items()}


def _shown(metric: Metric) -> str:
    """Write all of a metric in micro-units."""
    interval = f"{metric.delta_micro:+} in {metric.low_micro}..{metric.high_micro}"
    return f"{metric.base_micro} -> {metric.adapter_micro} ({interval}; {metric.num_items} items)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
