"""What MLflow shows in words: the description of a run, model, version and of the experiment, and a view of a trace.

Descriptions are Markdown, kept in the tag `mlflow.note.content`; names that people chose are escaped.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attribution.trail import Entry

_SPECIAL = re.compile(r"[^\w\s,.:]|_")
MAX_NAMED, MAX_TAGGED = 30, 100

VIEW_ID = "trailmark-provenance"
VIEW_TAG = f"mlflow.customView.view.v1.{VIEW_ID}"

EXPERIMENT_NOTE = """\
Everything here is a view of Trailmark's log: it can be deleted and rebuilt (`trailmark mlflow reconcile`), and
changing it changes nothing. What counts is the signed record behind each run, model and trace; the tag
`trailmark.leaf` holds its leaf hash.

- **Runs**: refinement, training and benchmark, with the datasets and models that went in and came out.
- **Models**: base models and adapters. `lineage.html` among a model's artifacts shows who and what is behind it.
- **Traces**: one per completion, linked to the model that answered; the span `provenance` names its receipt and
  contributors.
"""


@dataclass(frozen=True)
class Credit:
    """One contributor's rows behind a record."""

    key_id: str
    name: str
    num_in: int
    num_kept: int


def escape(text: str) -> str:
    """Return `text` as Markdown that shows exactly these characters on one line.

    Entities, because MLflow's renderer shows some backslash escapes as they stand (3.17.2, seen with `\\>`).
    """
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


def note(summary: str, entry: Entry, credits: Sequence[Credit], *, digest: str | None, has_pages: bool = False) -> str:
    """Return the description of a record: a sentence, its contributors, its digests and how to check it.

    has_pages: whether the server also serves our pages (attribution/mlflow_app.py), which are then linked.

    Lists, not tables: MLflow draws a table without lines or space between its columns.
    """
    parts = [summary]
    if credits:
        parts.append(credit_list(credits))
    facts = [f"- log entry {entry.index}, leaf hash `{entry.leaf_hash}`"]
    if digest:
        facts.append(f"- digest `{digest}`")
    parts.append("**Record**\n\n" + "\n".join(facts))
    short = entry.leaf_hash[:16]
    if has_pages:
        parts.append(f"[Record, graph and what came of it](trailmark/record/{entry.leaf_hash})")
    parts.append(
        "The whole graph is in `lineage.html` under Artifacts. Check the record without a network:\n\n"
        f"```sh\ntrailmark log proof {short} --out record.json\ntrailmark verify record.json\n```"
    )
    return "\n\n".join(parts)


def credit_list(credits: Sequence[Credit]) -> str:
    """Return the contributors with their rows, largest first, at most MAX_NAMED of them by name."""
    ranked = sorted(credits, key=lambda credit: (-credit.num_kept, -credit.num_in, credit.name))
    lines = [f"- {escape(item.name)}: {item.num_kept} of {item.num_in} rows kept" for item in ranked[:MAX_NAMED]]
    rest = ranked[MAX_NAMED:]
    if rest:
        kept, given = sum(item.num_kept for item in rest), sum(item.num_in for item in rest)
        lines.append(f"- {len(rest)} more: {kept} of {given} rows kept")
    return "**Contributors**\n\n" + "\n".join(lines)


def credits_json(credits: Sequence[Credit], *, max_chars: int) -> str:
    """Return the contributors as JSON for a tag, largest first, leaving out the last until it fits."""
    ranked = sorted(credits, key=lambda credit: (-credit.num_kept, -credit.num_in, credit.name))
    for length in range(min(len(ranked), MAX_TAGGED), -1, -1):
        shown: list[dict[str, Any]] = [
            {"name": credit.name, "key_id": credit.key_id, "kept": credit.num_kept, "given": credit.num_in}
            for credit in ranked[:length]
        ]
        if length < len(ranked):
            shown.append({"more": len(ranked) - length})
        text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
        if len(text) <= max_chars:
            return text
    return "[]"


def provenance_view() -> str:
    """Return MLflow's custom view that lays out the span `provenance` on every trace page.

    The format is MLflow's own and undocumented; taken from its demo (mlflow/demo/generators/custom_view.py, 3.17.2).
    """
    span = {"name": "provenance"}

    def field(name: str, *path: str) -> dict[str, Any]:
        marker: dict[str, Any] = {"$source": "spanField", "spanRef": span, "field": name}
        return {**marker, "path": list(path)} if path else marker

    def card(name: str, component: str, **properties: Any) -> list[dict[str, Any]]:
        inner = {"id": f"{name}-value", "component": component, **properties}
        return [{"id": name, "component": "Card", "child": inner["id"], "renderIfSpan": span}, inner]

    components: list[dict[str, Any]] = [
        {"id": "root", "component": "Column", "children": ["who", "receipt", "people"]},
        *card("who", "Markdown", text=field("outputs", "summary")),
        *card("receipt", "KeyValueViewer", label="Receipt", value=field("inputs"), initialFormat="json"),
        *card(
            "people",
            "KeyValueViewer",
            label="Contributors",
            value=field("outputs", "contributors"),
            initialFormat="json",
        ),
    ]
    view = {
        "id": VIEW_ID,
        "name": "Provenance",
        "label": "Who is behind this answer",
        "instruction": "Show the receipt, the adapter that answered and its contributors.",
        "template": [{"version": "v0.9", "updateComponents": {"surfaceId": "main", "components": components}}],
        "createdAtMs": 1,
    }
    return json.dumps(view, separators=(",", ":"))
