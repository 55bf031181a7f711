"""What the page of one record shows, gathered from the log and from the memory of what stands where in MLflow."""

from dataclasses import dataclass
from typing import Any

from attribution.bodies import CompletionsBody, InfluenceBody, PublicationBody, RefinementBody
from attribution.lineage import Lineage, label_of
from attribution.mlflow_cursor import CURSOR_FILE, Cursor
from attribution.mlflow_traces import trace_id_of
from attribution.receipts import completion_rows
from attribution.records import to_plain
from attribution.settlement import player_name
from attribution.trail import Entry, Trail

MICRO = 1e6
MAX_NEIGHBOURS = 60
APART = frozenset({"per_contributor", "top", "metrics", "dropped", "rules", "players"})


@dataclass(frozen=True)
class Link:
    """A record, or a page of MLflow, by its words."""

    label: str
    kind: str
    target: str


def record_view(trail: Trail, lineage: Lineage, entry: Entry) -> dict[str, Any]:
    """Return what the template shows of a record."""
    record = entry.record
    body = {} if record is None else to_plain(record.body, record.kind)
    children = lineage.graph(entry.leaf_hash, depth=1)
    nodes = {node["id"]: node for node in children["nodes"]}
    before = [edge["from"] for edge in children["edges"] if edge["to"] == entry.leaf_hash]
    after = [edge["to"] for edge in children["edges"] if edge["from"] == entry.leaf_hash]
    names = lineage.contributor_names()
    return {
        "entry": entry,
        "label": label_of(entry),
        "kind": entry.leaf.kind,
        "facts": {key: fact for key, fact in body.items() if key not in APART and fact not in (None, "", [])},
        "people": _people(entry, names),
        "shares": _shares(trail, entry, after, names),
        "metrics": [_micros(item) for item in body.get("metrics", [])],
        "dropped": body.get("dropped", []),
        "players": [
            {**_micros(item), "name": item["name"] or player_name(trail, item["kind"], item["id"])}
            for item in body.get("players", [])
        ],
        "signers": [f"{names.get(party.key_id, party.key_id[:12])} ({party.role})" for party in record.contributors]
        if record
        else [],
        "made": {} if record is None else _made(entry),
        "before": [_link(nodes[leaf]) for leaf in before[:MAX_NEIGHBOURS]],
        "after": [_link(nodes[leaf]) for leaf in reversed(after[-MAX_NEIGHBOURS:])],
        "num_before": len(before),
        "num_after": len(after),
        "mlflow": mlflow_links(trail, entry),
        "previous": _previous(trail, entry),
    }


def words(key: str) -> str:
    """Return a field's name as people read it."""
    text = key.removesuffix("_micro").removesuffix("_us").removeprefix("num_").replace("_", " ")
    return text[:1].upper() + text[1:]


def mlflow_links(trail: Trail, entry: Entry) -> list[Link]:
    """Return the pages of MLflow (after `#`) that show a record, as far as the view has come."""
    cursor = Cursor(trail.home / CURSOR_FILE)
    try:
        experiment = cursor.experiment
        if experiment is None:
            return []
        place = f"/experiments/{experiment}"
        known = {role: cursor.get(entry.leaf_hash, role) for role in ("run", "model", "version", "dataset", "prompt")}
    finally:
        cursor.close()
    version, prompt = known["version"] or "", known["prompt"] or ""
    targets = {
        "run": f"{place}/runs/{known['run']}",
        "model": f"{place}/models/{known['model']}",
        "version": f"/models/{version.rpartition('/')[0]}/versions/{version.rpartition('/')[2]}",
        "dataset": f"{place}/datasets/{known['dataset']}",
        "prompt": f"{place}/prompts/{prompt.rpartition('/')[0]}",
    }
    titles = {"run": "Run", "model": "Model", "version": "Registered version", "dataset": "Rows", "prompt": "Prompt"}
    return [
        *(Link(titles[role], role, targets[role]) for role in targets if known[role]),
        *_traces(trail, entry, place),
    ]


def _traces(trail: Trail, entry: Entry, place: str) -> list[Link]:
    body = None if entry.record is None else entry.record.body
    if isinstance(body, InfluenceBody):
        return [Link(f"Trace {body.receipt_id}", "trace", f"{place}/traces/{trace_id_of(body.receipt_id)}")]
    if not isinstance(body, CompletionsBody) or not trail.store.has(body.table):
        return []
    rows = completion_rows(trail, entry)[:MAX_NEIGHBOURS]
    return [
        Link(f"Trace {row.receipt['id']}", "trace", f"{place}/traces/{trace_id_of(row.receipt['id'])}") for row in rows
    ]


def _people(entry: Entry, names: dict[str, str]) -> list[dict[str, Any]]:
    body = None if entry.record is None else entry.record.body
    if not isinstance(body, RefinementBody):
        return []
    rows = sorted(body.per_contributor, key=lambda row: (-row.num_kept, -row.num_in))
    return [{"name": names.get(row.key_id, row.key_id[:12]), "given": row.num_in, "kept": row.num_kept} for row in rows]


def _shares(trail: Trail, entry: Entry, after: list[str], names: dict[str, str]) -> list[dict[str, Any]]:
    """The contributors' shares that were recorded for an answer, of its newest explanation."""
    bodies = [trail.entry(leaf) for leaf in after] if entry.leaf.kind == "completions" else [entry]
    found = [one.record.body for one in bodies if one.record and isinstance(one.record.body, InfluenceBody)]
    return [
        {
            "receipt": body.receipt_id,
            "name": names.get(share.key_id, share.key_id[:12]),
            "share": share.share_micro / MICRO,
            "low": share.low_micro / MICRO,
            "high": share.high_micro / MICRO,
        }
        for body in found[-MAX_NEIGHBOURS:]
        for share in body.top
    ]


def _micros(item: dict[str, Any]) -> dict[str, Any]:
    return {
        key.removesuffix("_micro"): value / MICRO if key.endswith("_micro") else value for key, value in item.items()
    }


def _made(entry: Entry) -> dict[str, str]:
    assert entry.record is not None
    record = entry.record
    code = f"{record.code.commit[:12] or 'unknown commit'}{', with local changes' if record.code.dirty else ''}"
    return {
        "Log entry": str(entry.index),
        "Code": f"{code}, version {record.code.version}",
        "Environment": record.environment,
        "Configuration": record.config or "none",
        "Seed": str(record.seed),
        "Inputs": "; ".join(f"{item.kind} {item.name} {item.digest[7:19]}" for item in record.inputs) or "none",
        "Outputs": "; ".join(f"{item.kind} {item.name} {item.digest[7:19]}" for item in record.outputs) or "none",
    }


def _link(node: dict[str, Any]) -> Link:
    return Link(node["label"], node["kind"], node["id"])


def _previous(trail: Trail, entry: Entry) -> tuple[str, str] | None:
    """The published version before this one and this one, or None for a first version and for anything else."""
    body = None if entry.record is None else entry.record.body
    if not isinstance(body, PublicationBody):
        return None
    earlier = [item for item in trail.registry.list() if item.name == body.name and item.version < body.version]
    return (earlier[-1].reference, f"{body.name}@{body.version}") if earlier else None
