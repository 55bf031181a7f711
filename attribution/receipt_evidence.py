"""What the home knows of one answer beside its scores: who trained on what, verbatim spans, recorded explanations."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from attribution.answers import Finding, Unexplained
from attribution.bodies import AdapterBody, InfluenceBody
from attribution.erasure import remaining
from attribution.evidence import MICRO, contributions, is_audit, measured_adapters
from attribution.influence.bm25 import WordMatches, random_ranking
from attribution.influence.store import Trace
from attribution.influence.who import MAX_TEXT_CHARS, NO_TRACE, bm25_examples, searched_text
from attribution.lineage import Lineage
from attribution.receipts import StoredReceipt, find_receipt, receipt_content
from attribution.spans import METHOD, covered, find_spans
from attribution.store import StoreError

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

NUM_TOP = 5
SMALL_SHARE = 0.05
"""Of the rows; what leaving more out would do is no small removal, so the sum of derivatives is only a hint."""
INEXACT = "NOT exact"
"""How an audit's method says that its replay did not end where training did."""
EXAMPLES_FILE = "examples.parquet"


def trained_on(trail: "Trail", adapter: str) -> tuple[str, Trace] | None:
    """Return (digest, trace) of an adapter's training as far as erasures left it; None without one that lists its rows.

    Only the table of rows is verified, for the gradients may be many gigabytes. StoreError when it was altered.
    """
    if not _is_folder(trail, adapter):
        return None
    digest = remaining(trail, str(trail.store.manifest(adapter).meta.get("trace") or ""))
    if not digest or not _is_folder(trail, digest):
        return None
    folder = trail.store.get_directory(digest, verify=False)
    wanted = {file.path: file.sha256 for file in trail.store.manifest(digest).files}.get(EXAMPLES_FILE)
    if wanted is None:
        return None
    file = folder / EXAMPLES_FILE
    if not file.is_file() or sha256(file.read_bytes()).hexdigest() != wanted:
        raise StoreError(f"directory {digest}: {EXAMPLES_FILE} is missing or was altered")
    return digest, Trace(folder)


def _is_folder(trail: "Trail", digest: str) -> bool:
    return trail.store.has(digest) and trail.store.path_of(digest).is_dir()


def spans_of(
    trail: "Trail", receipt_id: str, *, names: dict[str, str], also: Collection[str] = ()
) -> dict[str, Any] | None:
    """Return the verbatim spans of a receipt's answer in its adapter's training rows; None without a trace.

    `also`: examples whose places are told of every span, however many rows have it.

    {"text", "method", "covered" (share of characters), "spans": [{"start", "end", "text", "num_words", "rarity",
    "num_rows", "occurrences": [{"example_id", "contributor", "name", "start", "end"}]}]}
    """
    stored = find_receipt(trail, receipt_id)
    receipt = stored.row.receipt if stored is not None else {}
    found = trained_on(trail, receipt["adapter"]) if receipt.get("adapter") else None
    if found is None:
        return None
    digest, trace = found
    text = str(receipt_content(trail, receipt["id"])["output_text"])
    spans = find_spans(trail.home, trace, digest, text, also=also)
    shown = [asdict(span) for span in spans]
    for span in shown:
        for place in span["occurrences"]:
            place["name"] = names.get(place["contributor"], place["contributor"][:12])
    return {"text": text, "method": METHOD, "covered": covered(spans, len(text)), "spans": shown}


def with_spans(examples: Sequence[dict[str, Any]], verbatim: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return examples, each with the spans of the answer that it says too: characters of the answer and of the row."""
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for span in verbatim["spans"] if verbatim else ():
        for place in span["occurrences"]:
            said = {key: span[key] for key in ("start", "end", "text")}
            held[place["example_id"]].append({**said, "row_start": place["start"], "row_end": place["end"]})
    return [{**example, "spans": held[example["example_id"]]} for example in examples]


def rows_per_contributor(trail: "Trail", adapter: str | None) -> dict[str, int]:
    """Return how many training rows each contributor (key id) has behind an adapter; empty when nothing says."""
    found = trained_on(trail, adapter) if adapter else None
    return dict(Counter(example.contributor for example in found[1].examples)) if found else {}


def num_erased_rows(trail: "Trail", adapter: str | None) -> int:
    """Return how many of the rows that an adapter learnt from were erased since: their text and gradients are gone."""
    found = trained_on(trail, adapter) if adapter else None
    return sum(not example.text for example in found[1].examples) if found else 0


def lineage_findings(trail: "Trail", adapter: str) -> list[Finding]:
    """Return what is still known of an adapter that cannot be scored: whose rows it learnt from, what it merges."""
    made = trail.find(adapter)
    if made is None or made.record is None or not isinstance(made.record.body, AdapterBody):
        return []
    names = Lineage(trail).contributor_names()
    found = [
        Finding(
            source.name,
            f"adapter merged into {made.record.body.name}; ask of its own answers",
            1,
            None,
            None,
            "adapters",
            "a part of it",
            (made.leaf_hash,),
            tier="counted",
            kind="adapter",
        )
        for source in made.record.inputs
        if source.kind == "adapter"
    ]
    refinement, items = contributions(trail, measured_adapters(trail, adapter)[0])
    kept: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for item in items:
        kept[item.contributor].append((item.leaf_hash, item.num_kept))
    for key_id, parts in sorted(kept.items(), key=lambda pair: -sum(count for _, count in pair[1])):
        links = (*(leaf for leaf, _ in parts), *([refinement] if refinement else []), made.leaf_hash)
        found.append(
            Finding(
                names.get(key_id, key_id[:12]),
                f"rows that {made.record.body.name} was trained on",
                sum(count for _, count in parts),
                None,
                None,
                "rows",
                "trained on",
                links,
                tier="counted",
                kind="contributor",
            )
        )
    return found


def audited_findings(trail: "Trail", receipt_id: str, *, names: dict[str, str]) -> list[Finding]:
    """Return what the newest audit of a receipt found, by contributor.

    In nats per token that the answer's loss would rise without their rows, to first order. For more than a few rows at
    once that is a hint; a replay that was not exact ranks.
    """
    recorded = [(entry, body) for entry, body in _influences(trail, receipt_id, audited=True)]
    if not recorded or not trail.store.has(recorded[-1][1].table):
        return []
    entry, body = recorded[-1]
    sums: dict[str, float] = defaultdict(float)
    rows = trail.get_table(body.table).select(["contributor", "score_micro"]).to_pylist()
    count = Counter(row["contributor"] for row in rows)
    for row in rows:
        sums[row["contributor"]] += row["score_micro"] / MICRO
    return [
        Finding(
            names.get(key_id, key_id[:12]),
            "rise of the answer's loss without their rows, by differentiating the recorded run"
            f", by {count[key_id]} row{'s'[: count[key_id] != 1]}",
            total,
            None,
            None,
            "nats per token",
            _audit_verdict(total, count[key_id] / len(rows)),
            (entry.leaf_hash,),
            tier="explain" if INEXACT in body.method else "audit",
            kind="contributor",
        )
        for key_id, total in sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def _audit_verdict(total: float, share_of_rows: float) -> str:
    verdict = "raised the answer's likelihood" if total > 0 else "lowered the answer's likelihood"
    return verdict if share_of_rows <= SMALL_SHARE else "a hint: too many rows for a small removal"


def recorded_explanation(trail: "Trail", receipt_id: str, *, num_examples: int = NUM_TOP) -> dict[str, Any]:
    """Return what the newest `influence` record says of a receipt, in the form of `Attribution.to_dict()`.

    For readers that load no model: the gain over the base and the scores' intervals are not in the record.

    Raises:
        Unexplained: nobody asked who made it yet.
    """
    stored = _stored(trail, receipt_id)
    receipt = stored.row.receipt
    common = _unscored(receipt, stored.leaf_hash)
    if receipt["adapter"] is None:
        return {**common, "base_did_it": True, "reason": "the request was for the base model"}
    recorded = list(_influences(trail, receipt["id"], audited=False))
    if not recorded:
        raise Unexplained(
            f"receipt {receipt['id']}: no explanation of it is recorded; `trailmark ask who {receipt['id']}` makes one"
        )
    entry, body = recorded[-1]
    names = Lineage(trail).contributor_names()
    rows = trail.get_table(body.table).to_pylist() if trail.store.has(body.table) else []
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        sums[row["contributor"]] += row["score_micro"] / MICRO
    parts: list[dict[str, Any]] = [
        {
            "key_id": share.key_id,
            "name": names.get(share.key_id, share.key_id[:12]),
            "share": share.share_micro / MICRO,
            "low": share.low_micro / MICRO,
            "high": share.high_micro / MICRO,
            "score": sums.get(share.key_id, 0.0),
            "score_low": None,
            "score_high": None,
        }
        for share in body.top
    ]
    trained = trained_on(trail, receipt["adapter"])
    searched = searched_text(receipt_content(trail, receipt["id"])) if trained else ""
    words = WordMatches.of(trained[1].examples, searched) if trained else None
    seed = entry.record.seed if entry.record is not None else 0
    return {
        **common,
        "reason": "shares of the predicted gain, as recorded",
        "contributors": parts,
        "unattributed": max(0.0, 1.0 - sum(part["share"] for part in parts)),
        "examples": _top_rows(rows, words, names, num_examples),
        "baselines": _baselines(receipt["id"], words, names, seed) if words else {},
        "bm25_examples": [asdict(one) for one in bm25_examples(words, names, num_examples)] if words else [],
        "method": body.method,
        "seed": seed,
        "influence_leaf": entry.leaf_hash,
    }


def _unscored(receipt: dict[str, Any], leaf_hash: str) -> dict[str, Any]:
    return {
        "receipt_id": receipt["id"],
        "receipt_leaf": leaf_hash,
        **{key: receipt[key] for key in ("model", "base", "adapter", "adapter_name")},
        "base_did_it": False,
        "reason": NO_TRACE,
        "gain_nats": None,
        "contributors": [],
        "unattributed": 1.0,
        "examples": [],
        "baselines": {},
        "bm25_examples": [],
        "method": "the receipt alone",
        "label": "stability",
        "confidence": None,
        "seed": 0,
    }


def _top_rows(
    rows: Sequence[dict[str, Any]], words: WordMatches | None, names: dict[str, str], num_examples: int
) -> list[dict[str, Any]]:
    best = sorted(rows, key=lambda row: (-row["score_micro"], row["example_id"]))[:num_examples]
    texts = {example.example_id: example.text for example in words.examples} if words else {}
    places = words.places({row["example_id"] for row in best}) if words else {}
    return [
        {
            "example_id": row["example_id"],
            "contributor": row["contributor"],
            "name": names.get(row["contributor"], row["contributor"][:12]),
            "score": row["score_micro"] / MICRO,
            "low": None,
            "high": None,
            "text": texts.get(row["example_id"], "")[:MAX_TEXT_CHARS],
            **dict(zip(("bm25", "bm25_rank"), places.get(row["example_id"], (None, None)), strict=True)),
        }
        for row in best
    ]


def _baselines(receipt_id: str, words: WordMatches, names: dict[str, str], seed: int) -> dict[str, list[Any]]:
    rankings = {
        "bm25": words.contributors(NUM_TOP),
        "random": random_ranking(words.examples, seed=f"{seed}:{receipt_id}"),
    }
    return {
        name: [
            {"key_id": one.key_id, "name": names.get(one.key_id, one.key_id[:12]), "score": one.score}
            for one in ranking
        ]
        for name, ranking in rankings.items()
    }


def _influences(trail: "Trail", receipt_id: str, *, audited: bool) -> "Iterator[tuple[Entry, InfluenceBody]]":
    for entry in trail.entries(kind="influence"):
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, InfluenceBody) and body.receipt_id == receipt_id and is_audit(body.method) == audited:
            yield entry, body


def _stored(trail: "Trail", receipt_id: str) -> StoredReceipt:
    stored = find_receipt(trail, receipt_id)
    if stored is None:
        raise Unexplained(f"receipt {receipt_id!r}: not in this home's log; `trailmark log show` lists what is")
    return stored
