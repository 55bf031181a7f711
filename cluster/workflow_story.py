"""Looking back: the run a user means, what a waiting step asks for, and a workflow's events in order."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from attribution.approvals import Request
from attribution.bodies import ApprovalBody
from attribution.log.proved import VerifyError
from attribution.people import People, require_person
from attribution.workflow_effects import Effect, recorded_effects
from attribution.workflow_patches import Patch, recorded_patches
from attribution.workflow_runs import Run, StepRun, recorded_runs
from configs.errors import UserError
from configs.workflow import Workflow
from configs.workflow_file import nearest, parse_workflow

if TYPE_CHECKING:
    from attribution.trail import Trail

RUN_ID = re.compile(r"(?P<name>.+)-(?P<number>[1-9][0-9]*)")


@dataclass(frozen=True)
class Approval:
    """A decision as the log has it; `is_valid`: signed by the approver it names, with a key good then."""

    leaf_hash: str
    index: int
    time_us: int
    step: str
    name: str
    is_valid: bool
    body: ApprovalBody


def runs_of(trail: "Trail", reference: str) -> list[Run]:
    """Return the attempts of a workflow by its name, or those of one run by its id, in order of the log.

    Raises:
        UserError: neither; tells the nearest.
    """
    runs = recorded_runs(trail)
    found = [run for run in runs if run.workflow == reference]
    match = RUN_ID.fullmatch(reference)
    if not found and match is not None:
        found = [run for run in runs if (run.workflow, str(run.number)) == match.groups()]
    if not found:
        known = list(dict.fromkeys([run.workflow for run in runs] + [run.run_id for run in runs]))
        raise UserError(f"run {reference!r}: no such workflow or run; {nearest(reference, known)}")
    return found


def last_run(trail: "Trail", reference: str | None) -> Run:
    """Return the last attempt of a workflow or run, or of all when None."""
    if reference is not None:
        return runs_of(trail, reference)[-1]
    runs = recorded_runs(trail)
    if not runs:
        raise UserError("no workflow ran here yet; start one with `trailmark run WORKFLOW.yaml`")
    return runs[-1]


def recorded_workflow(trail: "Trail", run: Run) -> Workflow:
    """Return the workflow that a run was of, from the log; suites lie where its file lay."""
    definition: Any = yaml.safe_load(trail.store.get_blob(run.definition))
    folder = Path(run.source).parent if run.source else Path.cwd()
    return parse_workflow(definition, source=run.run_id, folder=folder)


def waiting_request(trail: "Trail", reference: str, step_name: str, name: str) -> Request:
    """Return what `step_name` of a run asks of `name`.

    Raises:
        UserError: no such run or step, one that asks for nothing (now), or a name that is not asked.
    """
    run = last_run(trail, reference)
    newest = runs_of(trail, run.workflow)[-1]
    if newest.leaf_hash != run.leaf_hash:
        raise UserError(
            f"run {run.run_id}: {newest.run_id} came after it, so what it asked for may have changed; "
            f"see `trailmark workflow show {run.workflow}` and approve that one"
        )
    workflow = recorded_workflow(trail, run)
    step = run.step(step_name)
    asking = [item.name for item in run.steps if item.kind == "approval"]
    if step is None or step.kind != "approval":
        raise UserError(f"step {step_name!r}: {run.run_id} has no such approval step; {nearest(step_name, asking)}")
    _require_asked(trail, workflow, step_name, name)
    if step.key is None or step.status not in ("waiting", "refused"):
        raise UserError(f"step {step_name!r}: asks for nothing now: it is {step.status} in {run.run_id}")
    return Request(run.workflow, step_name, step.key.inputs)


def _require_asked(trail: "Trail", workflow: Workflow, step_name: str, name: str) -> None:
    approvers = workflow.people(getattr(workflow.steps[step_name], "approvers", ()))
    require_person(trail, name, what="approver")
    if name not in approvers:
        raise UserError(f"approver {name!r}: step {step_name!r} asks {', '.join(approvers)}")


def approvals_of(trail: "Trail", workflow: str) -> list[Approval]:
    """Return every recorded decision on a workflow's steps, in order of the log."""
    people = People(trail)
    found = []
    for entry in trail.entries(kind="approval"):
        body = entry.record.body if entry.record is not None else None
        if entry.record is None or not isinstance(body, ApprovalBody) or not entry.record.outputs:
            continue
        subject, _, step = entry.record.outputs[0].name.partition(".")
        if subject != workflow:
            continue
        key_id = entry.record.contributors[0].key_id if entry.record.contributors else ""
        name = people.names.get(key_id, key_id[:12])
        try:
            is_valid = people.signer_of(entry) == name
        except VerifyError:
            is_valid = False
        found.append(Approval(entry.leaf_hash, entry.index, entry.leaf.time_us, step, name, is_valid, body))
    return found


def story_of(trail: "Trail", reference: str) -> list[Run | Patch | Effect | Approval]:
    """Return everything recorded about a workflow, in order of the log."""
    name = runs_of(trail, reference)[0].workflow
    events: list[tuple[int, Run | Patch | Effect | Approval]] = [
        (trail.entry_index(run.leaf_hash), run) for run in recorded_runs(trail, name)
    ]
    events += [(patch.index, patch) for patch in recorded_patches(trail, name)]
    events += [(effect.index, effect) for effect in recorded_effects(trail, name)]
    events += [(approval.index, approval) for approval in approvals_of(trail, name)]
    return [event for _, event in sorted(events, key=lambda pair: pair[0])]


def failed_steps(run: Run) -> list[StepRun]:
    """Return the steps that ended a run badly."""
    return [step for step in run.steps if step.status in ("failed", "killed", "refused", "waiting")]
