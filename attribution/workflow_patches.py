"""Changes to a workflow's definition as contributions: diff, author and reason, signed with the author's key."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.bodies import WorkflowPatchBody
from attribution.people import People, signing_key
from attribution.records import Party
from attribution.workflow_runs import definition_artefact

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

ROLE = "author"


@dataclass(frozen=True)
class Patch:
    """A recorded change of a definition; `before` is '' for the first one of a workflow."""

    leaf_hash: str
    index: int
    time_us: int
    workflow: str
    author: str
    reason: str
    diff: str
    before: str
    after: str


def unified_diff(workflow: str, before: str, after: str) -> str:
    """Return the unified diff of two definitions (YAML text); '' before means there was none."""
    old = "/dev/null" if not before else f"a/{workflow}.yaml"
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), old, f"b/{workflow}.yaml", lineterm="")
    return "\n".join(lines) + "\n"


def record_patch(trail: "Trail", workflow: str, *, before: str, after: str, author: str, reason: str) -> "Entry":
    """Append a change of definition from blob `before` ('' for none) to blob `after`, signed by its author.

    Raises:
        UserError: an author nobody knows, or whose key is not here.
    """
    key = signing_key(trail, author, what="author")
    old = trail.store.get_blob(before).decode() if before else ""
    diff = unified_diff(workflow, old, trail.store.get_blob(after).decode())
    return trail.record(
        "workflow_patch",
        WorkflowPatchBody(workflow, trail.store.put_blob(diff.encode()), reason),
        inputs=[definition_artefact(workflow, before)] if before else [],
        outputs=[definition_artefact(workflow, after)],
        contributors=[Party(key.key_id, ROLE)],
        signer=key,
        config=after,
    )


def recorded_patches(trail: "Trail", workflow: str | None = None) -> list[Patch]:
    """Return the patches of one workflow, or of all, in order of the log."""
    names = People(trail).names
    found = []
    for entry in trail.entries(kind="workflow_patch"):
        body = entry.record.body if entry.record is not None else None
        if entry.record is None or not isinstance(body, WorkflowPatchBody) or workflow not in (None, body.workflow):
            continue
        author = entry.record.contributors[0].key_id
        before = entry.record.inputs[0].digest if entry.record.inputs else ""
        diff = trail.store.get_blob(body.diff).decode() if trail.store.has(body.diff) else "(its diff is gone)\n"
        found.append(
            Patch(
                entry.leaf_hash,
                entry.index,
                entry.leaf.time_us,
                body.workflow,
                names.get(author, author[:12]),
                body.reason,
                diff,
                before,
                entry.record.outputs[0].digest,
            )
        )
    return found
