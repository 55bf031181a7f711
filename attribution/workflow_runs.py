"""Runs of workflows as the log tells them: every attempt, its steps, what each was made from, and why it failed.

A `workflow_run` record's body has one line per step; the whole of it is a blob that the record names. What a step's
key has once made is found again here, so that it is not made twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from attribution.bodies import Digest, WorkflowRunBody
from attribution.people import People
from attribution.records import Artefact, Party, canonical_bytes, from_plain, to_plain
from attribution.store import digest_of
from attribution.void_records import void_record

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

RUN_VERSION = 1
KEY_VERSION = 1
MAX_REASON_CHARS = 300
SHORT = slice(7, 19)

Status = Literal[
    "done", "reused", "running", "failed", "skipped", "waiting", "refused", "killed", "stopped", "left out"
]
RunStatus = Literal["running", "done", "partial", "failed", "waiting", "refused", "killed", "stopped"]
GOOD: tuple[Status, ...] = ("done", "reused")
UNFINISHED: tuple[RunStatus, ...] = ("failed", "waiting", "refused", "killed", "stopped")


@dataclass(frozen=True)
class Key:
    """What a step's result depends on. `config`, `code`: digests of stored JSON; `name`: what the result is called."""

    kind: str
    name: str
    inputs: tuple[Artefact, ...]
    config: Digest
    code: Digest
    seed: int
    base: Digest | None

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over everything but the inputs' names."""
        inputs = [{"kind": item.kind, "digest": item.digest} for item in self.inputs]
        value = {**to_plain(self, "key"), "v": KEY_VERSION, "inputs": inputs}
        return digest_of(canonical_bytes(value, "key"))


@dataclass(frozen=True)
class Output:
    """A step's output under the name that other steps call it by."""

    name: str
    artefact: Artefact


@dataclass(frozen=True)
class StepRun:
    """One step of one attempt. `trace` is the blob of a failure's traceback; `log_size` the log's when it began."""

    name: str
    kind: str
    status: Status
    why: str = ""
    key: Key | None = None
    outputs: tuple[Output, ...] = ()
    records: tuple[str, ...] = ()
    reason: str = ""
    trace: Digest | None = None
    started_us: int = 0
    ended_us: int = 0
    log_size: int = 0

    @property
    def line(self) -> str:
        """The step in one line: name, status, its key, digests of what it made, why it failed."""
        parts = [self.name, self.status]
        if self.key is not None:
            parts.append(f"key={self.key.digest[SHORT]}")
        parts += [f"{output.name}={output.artefact.digest}" for output in self.outputs]
        return " ".join(parts) + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Run:
    """One attempt at a run. `definition` is the blob of what ran (YAML), `source` the file it was read from.

    `leaf_hash` and `parent`, the attempt before it, are '' where there is none.
    """

    workflow: str
    number: int
    attempt: int
    status: RunStatus
    definition: Digest
    source: str
    steps: tuple[StepRun, ...]
    started_us: int
    ended_us: int = 0
    parent: str = ""
    leaf_hash: str = ""

    @property
    def run_id(self) -> str:
        return f"{self.workflow}-{self.number}"

    def step(self, name: str) -> StepRun | None:
        """Return the step of a name, or None."""
        return next((step for step in self.steps if step.name == name), None)

    def with_step(self, step: StepRun) -> "Run":
        """Return the run with `step` in the place of the one of its name, or at the end."""
        steps = tuple(step if other.name == step.name else other for other in self.steps)
        return replace(self, steps=steps if self.step(step.name) else (*steps, step))


def definition_artefact(workflow: str, digest: str) -> Artefact:
    """Return a workflow's definition as an input of records; whoever patched it last made it."""
    return Artefact("workflow", workflow, digest)


def record_run(trail: "Trail", run: Run) -> "Entry":
    """Append a run that ended; its parents are the records that its steps made or reused, and its last patch."""
    table = trail.put_json({"v": RUN_VERSION, "run": to_plain(replace(run, leaf_hash=""), "run")})
    definition = definition_artefact(run.workflow, run.definition)
    patched = trail.find(run.definition)
    made = [leaf for step in run.steps for leaf in step.records]
    return trail.record(
        "workflow_run",
        WorkflowRunBody(run.workflow, run.status, tuple(step.line for step in run.steps)),
        inputs=[definition],
        outputs=[Artefact("table", f"{run.run_id}.steps", table)],
        contributors=[Party(trail.keys.get("operator").key_id, "operator")],
        parents=list(dict.fromkeys([*([patched.leaf_hash] if patched else []), *made])),
        config=run.definition,
        attempt=run.attempt,
        parent_attempt=run.parent or None,
    )


def recorded_runs(trail: "Trail", workflow: str | None = None) -> list[Run]:
    """Return the attempts of one workflow, or of all, in order of the log; those whose table is gone are left out."""
    found = []
    for entry in trail.entries(kind="workflow_run"):
        body = entry.record.body if entry.record is not None else None
        if entry.record is None or not isinstance(body, WorkflowRunBody) or workflow not in (None, body.name):
            continue
        table = entry.record.outputs[0].digest
        if trail.store.has(table):
            found.append(replace(run_from_plain(trail.get_json(table)["run"]), leaf_hash=entry.leaf_hash))
    return found


def run_from_plain(value: object) -> Run:
    """Return the run of its JSON form."""
    run: Run = from_plain(Run, value, "run")
    return run


def find_result(trail: "Trail", runs: Sequence[Run], key: Key) -> StepRun | None:
    """Return the newest step that a key stands for and whose outputs are all still in the store, or None.

    Neither its records nor the run's own may be signed with a revoked key.
    """
    wanted = key.digest
    for run in reversed(runs):
        for step in reversed(run.steps):
            is_it = step.status in GOOD and step.key is not None and step.key.digest == wanted
            if is_it and all(trail.store.has(output.artefact.digest) for output in step.outputs):
                people, own = People(trail), [run.leaf_hash] if run.leaf_hash else []
                if all(void_record(people, trail.entry(leaf)) is None for leaf in (*step.records, *own)):
                    return step
    return None


def last_of(runs: Sequence[Run], name: str) -> StepRun | None:
    """Return the newest attempt at a step that came so far as to have a key, or None."""
    return next((step for step in _newest_first(runs) if step.name == name and step.key is not None), None)


def _newest_first(runs: Sequence[Run]) -> Iterable[StepRun]:
    return (step for run in reversed(runs) for step in reversed(run.steps))
