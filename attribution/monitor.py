"""The monitor: replays a log leaf by leaf, and says by name what does not hold.

It keeps its own memory of the last checkpoint and of every leaf hash, so that a log forked or rolled back since is
caught, whoever signed it. Run it where the operator of the log cannot write.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from attribution.bodies import NOTICE_KINDS, PublicationBody, RedactionBody
from attribution.log.key_history import KeyHistory, VoidKeyRecord
from attribution.log.merkle import Frontier, hash_leaf
from attribution.log.note import Checkpoint, NoteError
from attribution.log.proved import VerifyError
from attribution.log.sequencer import LogError
from attribution.monitor_state import Memory
from attribution.records import Leaf, RecordError
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

NEEDS_INPUT = frozenset({"refinement", "adapter", "benchmark", "publication", "completions", "influence", "settlement"})
CARRIED_KINDS = NOTICE_KINDS | {"contributor", "publication"}  # read again in each run: later entries lean on them
PROGRESS_LEAVES = 1000
Progress = Callable[[int, int], None]
"""Called with (leaves read, leaves in all)."""


@dataclass(frozen=True)
class Violation:
    """One thing that does not hold: `check` names the rule, `index` the entry (None: the log as a whole)."""

    check: str
    index: int | None
    detail: str


@dataclass
class Report:
    """What one run saw. `checked` counts by check; `views` says of each view whether it equals the log.

    `void`: records that count for nothing though the log is as it should be, such as a rotation by a revoked key.
    """

    origin: str
    size: int
    root: str
    first: int
    checked: dict[str, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    views: dict[str, str] = field(default_factory=dict)
    void: list[Violation] = field(default_factory=list)

    def count(self, check: str, number: int = 1) -> None:
        """Note that a check was made."""
        self.checked[check] = self.checked.get(check, 0) + number

    def add(self, check: str, index: int | None, detail: str) -> None:
        """Note a violation."""
        self.violations.append(Violation(check, index, detail))


class Source(Protocol):
    """A log to watch: its signed checkpoint and its leaves."""

    def checkpoint(self) -> str:
        """Return the signed note."""

    def leaves(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of leaves [start, stop)."""


def watch(
    source: Source,
    memory: Memory,
    history: KeyHistory,
    *,
    trail: "Trail | None" = None,
    full: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check everything that is new since the memory's last checkpoint, then remember this one.

    With `trail` the private records are checked too: commitments, signatures, redactions, what was made from what.
    The memory moves on only over what could be read; entries at fault stay in it until they are not. With `full` the
    records of entries seen before are checked again.
    """
    if trail is not None:
        _learn_keys(trail, history)
    try:
        checkpoint, _ = history.open_checkpoint(source.checkpoint())
    except (NoteError, VerifyError, LogError) as error:
        return Report("", 0, "", 0, {"checkpoint": 1}, [Violation("checkpoint", None, str(error))])
    report = Report(checkpoint.origin, checkpoint.size, checkpoint.root.hex(), memory.size, {"checkpoint": 1})
    if not _is_extension(checkpoint, memory, report):
        return report
    run = _Run(report, memory, trail, history)
    start = memory.size
    if not run.replay(source, checkpoint, progress or (lambda done, total: None)):
        return report
    # What is wrong with a header stays wrong, for the log only grows.
    memory.standing += [(item.check, item.index, item.detail) for item in report.violations]
    report.violations = [Violation(*item) for item in memory.standing]
    if trail is not None:
        report.first = 0 if full else start
        run.check_records(progress or (lambda done, total: None))
    memory.remember(checkpoint, run.frontier, {item.index for item in report.violations if item.index is not None})
    return report


def _is_extension(checkpoint: Checkpoint, memory: Memory, report: Report) -> bool:
    """Whether the checkpoint can follow the one that is remembered, by its size and root."""
    report.count("consistency")
    if memory.origin and checkpoint.origin != memory.origin:
        report.add("consistency", None, f"this is log {checkpoint.origin}, the memory is of {memory.origin}")
    elif checkpoint.size < memory.size:
        report.add("rollback", None, f"{checkpoint.size} entries, after {memory.size} were seen")
    elif checkpoint.size == memory.size and memory.size and checkpoint.root != memory.root:
        report.add("fork", None, f"another root over the same {memory.size} entries than was seen before")
    return not report.violations


@dataclass
class _Run:
    """The state of one replay."""

    report: Report
    memory: Memory
    trail: "Trail | None"
    history: KeyHistory

    def __post_init__(self) -> None:
        self.frontier = Frontier(self.memory.size, self.memory.peaks)
        self.last_time_us = self.memory.last_time_us
        self.outputs: dict[str, frozenset[str] | None] = {}
        self.makers: dict[str, int | None] = {}

    def replay(self, source: Source, checkpoint: Checkpoint, progress: Progress) -> bool:
        """Read the new leaves; whether they lead from the remembered tree to the signed root."""
        first, size = self.memory.size, checkpoint.size
        try:
            for index, data in enumerate(source.leaves(first, size), start=first):
                if index % PROGRESS_LEAVES == 0:
                    progress(index - first, size - first)
                self._take(index, data)
        except (LogError, OSError) as error:
            self.report.add("hashes", None, f"the leaves cannot be read: {error}")
            return False
        self.report.count("hashes", size - first)
        if self.frontier.size != size or self.frontier.root() != checkpoint.root:
            check = "fork" if first and self._differs_before(source, first) else "hashes"
            self.report.add(check, None, f"the leaves do not lead to the signed root over {size} entries")
            return False
        return True

    def _differs_before(self, source: Source, size: int) -> bool:
        """Whether a leaf that was seen before is another one now."""
        for index, data in enumerate(source.leaves(0, size)):
            if hash_leaf(data) != self.memory.leaf_hash(index):
                self.report.add("fork", index, "this entry was another one when it was last seen")
                return True
        return False

    def _take(self, index: int, data: bytes) -> None:
        leaf_hash = hash_leaf(data)
        self.frontier.append(leaf_hash)
        self.memory.append(leaf_hash)
        self.report.count("leaf")
        try:
            leaf = Leaf.from_bytes(data)
        except RecordError as error:
            self.report.add("leaf", index, str(error))
            return
        self._check_time(index, leaf)
        self._check_parents(index, leaf)

    def _check_time(self, index: int, leaf: Leaf) -> None:
        self.report.count("time")
        if leaf.time_us < self.last_time_us:
            self.report.add("time", index, f"{self.last_time_us - leaf.time_us} us before the entry above it")
        self.last_time_us = self.memory.last_time_us = max(self.last_time_us, leaf.time_us)

    def _check_parents(self, index: int, leaf: Leaf) -> None:
        """Parents stand above their children, so there is no cycle; what is made is made from something."""
        self.report.count("parents", len(leaf.parents))
        for parent in leaf.parents:
            place = self.memory.index_of(parent)
            if place is None or place >= index:
                self.report.add("parents", index, f"parent {parent[:16]} is not above it: unknown, younger or itself")
        if leaf.kind in NEEDS_INPUT:
            self.report.count("inputs")
            if not leaf.parents:
                self.report.add("inputs", index, f"a {leaf.kind} record made from nothing")

    def check_records(self, progress: Progress) -> None:
        """Check the private half of new entries, of those at fault before, and what tells of keys and names."""
        assert self.trail is not None
        self.published: dict[tuple[str, int], int] = {}
        for index, _, leaf in self.trail.leaves():
            if index % PROGRESS_LEAVES == 0:
                progress(index, self.report.size)
            is_new = index >= self.report.first or index in self.memory.suspects
            if index < self.report.size and (is_new or leaf.kind in CARRIED_KINDS):
                self._check_entry(index, leaf, is_new=is_new)
        for index, error in self.history.revoked_uses():
            self.report.add(error.check, index, error.reason.removeprefix(f"entry {index}: "))

    def _check_entry(self, index: int, leaf: Leaf, *, is_new: bool) -> None:
        assert self.trail is not None
        self.report.count("commitment", is_new)
        try:
            entry = self.trail.entry(index)
        except UserError as error:  # altered on disk: the record, or the log under it
            self.report.add("commitment", index, str(error))
            return
        if entry.record is None or entry.envelope is None:
            if entry.erasure is None:
                self.report.add("missing", index, f"the {leaf.kind} record is gone and no redaction says why")
            return
        self.report.count("signature", is_new)
        try:
            self.history.check(index, entry.record, entry.envelope, f"entry {index}")
        except VoidKeyRecord as error:
            self.report.void.append(Violation(leaf.kind, index, error.reason.removeprefix(f"entry {index}: ")))
        except VerifyError as error:
            self.report.add(error.check, index, error.reason.removeprefix(f"entry {index}: "))
        body = entry.record.body
        if isinstance(body, PublicationBody):
            self._check_name(entry, body)
        elif isinstance(body, RedactionBody):
            self.report.count("erasure", is_new)
            self._check_redaction(entry, body)
        if is_new and leaf.kind in NEEDS_INPUT:
            self._check_inputs(entry)

    def _check_inputs(self, entry: "Entry") -> None:
        """Each input that an earlier record made is joined to a record that made it."""
        record, trail = entry.record, self.trail
        assert record is not None and trail is not None
        known = [parent for parent in entry.leaf.parents if trail.log.index_of(parent) is not None]
        try:
            made = [self._outputs_of(parent) for parent in known]
            makers = {artefact.digest: self._maker_of(artefact.digest) for artefact in record.inputs}
        except UserError:
            return  # a record that was altered is told at its place; until it is whole, makers are unknown
        if None in made:
            return  # erased: what it made is not known any more
        for artefact in record.inputs:
            maker = makers[artefact.digest]
            is_joined = any(artefact.digest in outputs for outputs in made if outputs is not None)
            if not is_joined and maker is not None and maker < entry.index:
                self.report.add("inputs", entry.index, f"input {artefact.name!r} is not joined to what made it")

    def _outputs_of(self, leaf_hash: str) -> frozenset[str] | None:
        """The digests that a record made, None when it was erased; read once, for many records have one parent."""
        assert self.trail is not None
        if leaf_hash not in self.outputs:
            record = self.trail.entry(leaf_hash).record
            self.outputs[leaf_hash] = None if record is None else frozenset(item.digest for item in record.outputs)
        return self.outputs[leaf_hash]

    def _maker_of(self, digest: str) -> int | None:
        """The index of the newest record that made a thing."""
        assert self.trail is not None
        if digest not in self.makers:
            found = self.trail.find(digest)
            self.makers[digest] = None if found is None else found.index
        return self.makers[digest]

    def _check_name(self, entry: "Entry", body: PublicationBody) -> None:
        self.report.count("registry")
        first = self.published.setdefault((body.name, body.version), entry.index)
        if first != entry.index:
            self.report.add("registry", entry.index, f"{body.name}@{body.version} was published by entry {first}")

    def _check_redaction(self, entry: "Entry", body: RedactionBody) -> None:
        assert self.trail is not None
        place = self.trail.log.index_of(body.leaf)
        if place is None or place >= entry.index:
            self.report.add("erasure", entry.index, f"it erases {body.leaf[:16]}, which is not above it")
        elif self.trail.entry(place).record is not None:
            self.report.add(
                "erasure", entry.index, f"entry {place} is still here; `trailmark erase --finish` carries it out"
            )


def _learn_keys(trail: "Trail", history: KeyHistory) -> None:
    """Take on the log's keys from the log itself, so that its newest checkpoint can be opened."""
    for entry in trail.notices():
        if entry.record is not None and entry.envelope is not None:
            try:
                history.learn(entry.index, entry.record, entry.envelope)
            except VerifyError:
                continue  # `check_records` tells it at its place
    history.uses.clear()
