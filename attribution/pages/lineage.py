"""One self-contained page that shows where a record comes from, and proves it.

The page holds its graph, its style and its script; it loads nothing. Its content security policy names the digest of
that one style and that one script, so a browser refuses any other code, even if a name got past the escaping.
MLflow shows it as an artifact in an iframe with `sandbox="allow-scripts"`.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

_FOLDER = Path(__file__).parent
_SCRIPTS = (
    *("hashes.js", "ed25519.js", "proof.js", "proof_panel.js"),
    *("lineage_layout.js", "lineage_panel.js", "lineage.js"),
)
# A page with thousands of cards is no picture: beyond this many of one kind, the rest become one card that counts them.
MAX_CARDS_PER_KIND = 40

Graph = Mapping[str, Any]


def lineage_html(graph: Graph, proofs: Mapping[str, Any], *, focus: str, title: str, names: Mapping[str, str]) -> str:
    """Return the page for a `graph` of `page_graph` and its proofs (see `attribution.pages.proofs`).

    focus: id of the node the page is about, selected when it opens. names: key id -> contributor name.
    """
    style = (_FOLDER / "lineage.css").read_text(encoding="utf-8")
    script = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    page = Template((_FOLDER / "lineage.html").read_text(encoding="utf-8"))
    return page.substitute(
        policy=f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}",
        title=html.escape(title),
        style=style,
        script=script,
        graph=script_json({**graph, "proofs": proofs, "focus": focus, "names": dict(names)}),
    )


def page_graph(graph: Graph, *, focus: str) -> dict[str, list[dict[str, Any]]]:
    """Return {"nodes": [...], "edges": [...]} (see `attribution.lineage`) for a page: rows counted, crowds folded.

    Raises ValueError when `focus` is not a node of the graph.
    """
    if all(node["id"] != focus for node in graph["nodes"]):
        raise ValueError(f"focus={focus!r} is not a node of the graph; give the leaf hash of one of its records")
    return fold_crowds(with_row_counts(graph), focus=focus)


def script_json(value: Any) -> str:
    """Return JSON that cannot end or open a tag or a comment inside a `<script>` element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def with_row_counts(graph: Graph) -> dict[str, list[dict[str, Any]]]:
    """Return the graph with every contributor's rows given and kept, summed over the refinements in it."""
    given: dict[str, int] = {}
    kept: dict[str, int] = {}
    for node in graph["nodes"]:
        for row in (node.get("facts") or {}).get("per_contributor") or ():
            given[row["key_id"]] = given.get(row["key_id"], 0) + row["num_in"]
            kept[row["key_id"]] = kept.get(row["key_id"], 0) + row["num_kept"]
    nodes = []
    for node in graph["nodes"]:
        key_id = (node.get("facts") or {}).get("key_id")
        if node["kind"] == "contributor" and key_id in given:
            node = {**node, "facts": {**node["facts"], "num_in": given[key_id], "num_kept": kept[key_id]}}
        nodes.append(dict(node))
    return {"nodes": nodes, "edges": [dict(edge) for edge in graph["edges"]]}


def fold_crowds(graph: Graph, *, focus: str, max_cards: int = MAX_CARDS_PER_KIND) -> dict[str, list[dict[str, Any]]]:
    """Return the graph with at most `max_cards` cards of a kind; the smallest of the rest become one card `N more`."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for node in graph["nodes"]:
        by_kind.setdefault(node["kind"], []).append(node)
    nodes: list[dict[str, Any]] = []
    target: dict[str, str] = {}
    for kind, crowd in by_kind.items():
        if len(crowd) <= max_cards:
            nodes.extend(crowd)
            continue
        ranked = sorted(crowd, key=lambda node: (node["id"] != focus, -_weight(node), -node["time_us"]))
        nodes.extend(ranked[: max_cards - 1])
        rest = ranked[max_cards - 1 :]
        folded = _folded(kind, rest)
        nodes.append(folded)
        target.update({node["id"]: folded["id"] for node in rest})
    pairs = {(target.get(edge["from"], edge["from"]), target.get(edge["to"], edge["to"])) for edge in graph["edges"]}
    return {"nodes": nodes, "edges": [{"from": a, "to": b} for a, b in sorted(pairs) if a != b]}


def _weight(node: Mapping[str, Any]) -> int:
    facts = node.get("facts") or {}
    return int(facts.get("num_kept") or facts.get("num_rows") or facts.get("count") or 0)


def _folded(kind: str, rest: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    facts = {
        "num_records": len(rest),
        "weight": sum(map(_weight, rest)),
        "records": [node["label"] for node in rest[:200]],
    }
    newest = max(node["time_us"] for node in rest)
    return {
        "id": f"more-{kind}",
        "kind": kind,
        "label": f"{len(rest)} more",
        "time_us": newest,
        "contributors": [],
        "facts": facts,
    }


def _source(text: str) -> str:
    """Return a content-security-policy source that allows exactly this inline element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
