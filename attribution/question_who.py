"""Who made this answer: scores, audits and verbatim rows side by side, each under its own promise."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attribution.answers import Answer, Cost, Finding, Missing, Unexplained, links_of, records_of
from attribution.influence.rows import ShardsElsewhere
from attribution.influence.store import TraceError
from attribution.influence.who import ExplainError
from attribution.lineage import Lineage
from attribution.receipt_evidence import (
    audited_findings,
    lineage_findings,
    num_erased_rows,
    rows_per_contributor,
    spans_of,
    with_spans,
)
from attribution.receipts import find_receipt
from attribution.store import StoreError

if TYPE_CHECKING:
    from attribution.trail import Trail

QUESTION = "Who made this answer?"
NO_AUDIT = Missing(
    "cause: shares are stable under reweighting, not tested by leaving rows out",
    "trailmark audit RECEIPT, for small removals; trailmark settle ADAPTER, for what whole contributors are worth",
)
ONE_MACHINE = "copy the store's shards to one machine, and ask there"
MERGED = "this adapter was merged from others, so no training run of its own says which rows matter"


def ask_who(trail: "Trail", receipt_id: str, *, explain: Callable[[str], dict[str, Any]]) -> Answer:
    """Who made this completion? `explain` returns `Attribution.to_dict()`, computed here or by a scorer.

    Where it cannot, for the answer is empty or the store damaged, the reason is the answer's `problem`, and it says
    what lineage still says. Raises UserError for a receipt that is unknown or erased.
    """
    try:
        found = explain(receipt_id)
    except (StoreError, TraceError, ExplainError, Unexplained) as error:
        return _in_part(trail, receipt_id, error)
    names = dict(Lineage(trail).contributor_names())
    links = _links(trail, found)
    rows, verbatim, problem = _rows(trail, found, names)
    shares = [_share(part, rows.get(part["key_id"]), links, found["confidence"]) for part in found["contributors"]]
    audited = audited_findings(trail, found["receipt_id"], names=names)
    findings = [*audited, *(shares or [_of_model(found, links)])]
    is_unscored = found["adapter"] is not None and not found["base_did_it"] and not shares
    if is_unscored:
        findings += lineage_findings(trail, found["adapter"])
    return Answer(
        question=QUESTION,
        summary=_summary(found),
        findings=tuple(findings),
        missing=(
            *_missing(found, findings, is_unscored=is_unscored, is_audited=bool(audited)),
            *([] if problem else _erased(trail, found)),
        ),
        method=found["method"],
        confidence=found["confidence"],
        seed=found["seed"],
        details={**found, "examples": with_spans(found["examples"], verbatim), "verbatim": verbatim},
        cost=_cost(found, rows),
        records=records_of(trail, links_of(findings)),
        problem=problem,
    )


def _in_part(trail: "Trail", receipt_id: str, error: Exception) -> Answer:
    """What can be said of an answer whose scores cannot be had."""
    stored = find_receipt(trail, receipt_id)
    if stored is None:
        raise error
    receipt = stored.row.receipt
    findings = lineage_findings(trail, receipt["adapter"]) if receipt["adapter"] else []
    named = ", ".join(finding.subject for finding in findings[:3]) or "nobody that the log still names"
    named += f" and {len(findings) - 3} more" if len(findings) > 3 else ""
    return Answer(
        question=QUESTION,
        summary=f"The receipt says that {receipt['adapter_name'] or receipt['model']} answered; "
        f"its lineage leads to rows of {named}.",
        findings=tuple(findings),
        missing=(Missing(str(error), _remedy(error, receipt["id"])),),
        method="lineage alone: rows kept by refinement",
        confidence=None,
        seed=0,
        records=records_of(trail, (stored.leaf_hash, *links_of(findings))),
        problem=str(error),
    )


def _remedy(error: Exception, receipt_id: str) -> str:
    if isinstance(error, ShardsElsewhere):
        return ONE_MACHINE
    if isinstance(error, StoreError):
        return "trailmark fsck names every file that is damaged; restore it from a copy"
    if isinstance(error, TraceError):
        return "train the adapter again; its answers from then on can be explained"
    return f"trailmark ask who {receipt_id}" if isinstance(error, Unexplained) else "ask of another answer"


def _rows(
    trail: "Trail", found: dict[str, Any], names: dict[str, str]
) -> tuple[dict[str, int], dict[str, Any] | None, str]:
    """Return (training rows by key id, verbatim spans, why they could not be had)."""
    also = {example["example_id"] for example in found["examples"]}
    try:
        return (
            rows_per_contributor(trail, found["adapter"]),
            spans_of(trail, found["receipt_id"], names=names, also=also),
            "",
        )
    except (StoreError, TraceError) as error:
        return {}, None, str(error)


def _links(trail: "Trail", found: dict[str, Any]) -> tuple[str, ...]:
    made = trail.find(found["adapter"]) if found["adapter"] is not None else None
    recorded = found.get("influence_leaf")
    return tuple(filter(None, (found["receipt_leaf"], made.leaf_hash if made else None, recorded)))


def _share(part: dict[str, Any], num_rows: int | None, links: tuple[str, ...], confidence: float | None) -> Finding:
    measure = "share of the predicted gain" + ("" if num_rows is None else f", by {num_rows} row{'s'[: num_rows != 1]}")
    credited = part["share"] > 0  # nothing is nothing by rule, not by an estimate with an interval
    return Finding(
        part["name"],
        measure,
        part["share"],
        part["low"] if credited else None,
        part["high"] if credited else None,
        "of 1",
        _verdict(part),
        links,
        confidence if credited else None,
        tier="explain",
        kind="contributor",
    )


def _verdict(part: dict[str, Any]) -> str:
    if part["share"] > 0:
        return "credited"
    return "cannot be told from zero" if part["score"] > 0 else "did not help"


def _of_model(found: dict[str, Any], links: tuple[str, ...]) -> Finding:
    """Base or adapter, where no contributor is named."""
    gain, confidence = found["gain_nats"], found["confidence"]
    unshared = "its rows are ranked only" if found["examples"] else "its rows are unknown"
    verdict = "the base made it" if found["base_did_it"] else f"the adapter made it, {unshared}"
    if gain is None:
        if not found["base_did_it"]:
            verdict = "nobody was credited"
        return Finding("base model", "adapter's part", 0.0, None, None, "of 1", verdict, links, tier="explain")
    measure, bounds = "adapter's gain over the base per token", (gain["mean"], gain["low"], gain["high"])
    return Finding("adapter", measure, *bounds, "nats per token", verdict, links, confidence, tier="explain")


def _summary(found: dict[str, Any]) -> str:
    if found["base_did_it"]:
        return f"The base model made it: {found['reason']}."
    credited = [part for part in found["contributors"] if part["share"] > 0]
    if not credited:
        return f"The adapter {found['adapter_name']} made it; {found['reason']}."
    named = ", ".join(f"{part['name']} {part['share']:.0%}" for part in credited[:3])
    return f"The adapter {found['adapter_name']} made it, mostly on rows of {named}."


def _missing(found: dict[str, Any], findings: list[Finding], *, is_unscored: bool, is_audited: bool) -> list[Missing]:
    missing = []
    if is_unscored:
        is_merged = any(finding.kind == "adapter" for finding in findings)
        remedy = "ask of answers of the adapters it was merged from" if is_merged else "train again: it leaves a trace"
        if found["examples"]:  # ranked, but not shared out
            remedy = ONE_MACHINE
        missing.append(Missing(MERGED if is_merged else found["reason"], remedy))
    if not is_audited and found["adapter"] is not None:
        missing.append(NO_AUDIT)
    gain = found["gain_nats"]
    if gain is not None and gain["num_tokens"] < 2:
        missing.append(Missing("an interval over tokens: the answer is a single one", "ask of a longer answer"))
    return missing


def _erased(trail: "Trail", found: dict[str, Any]) -> list[Missing]:
    num_erased = num_erased_rows(trail, found["adapter"])
    if not num_erased:
        return []
    evidence = f"{num_erased} of the rows that the adapter learnt from were erased since: what they did cannot be told"
    return [Missing(evidence, "train again on what is left (`trailmark forget --retrain`), and ask of its answers")]


def _cost(found: dict[str, Any], rows: dict[str, int]) -> tuple[Cost, ...]:
    cost = []
    if found["gain_nats"] is not None:
        cost.append(Cost("passes over the answer, with adapter and without", 2, "forward passes"))
    if found.get("gradient_passes"):
        cost.append(Cost("the answer's gradients at the checkpoints", found["gradient_passes"], "backward passes"))
    if found["contributors"]:
        cost.append(Cost("training rows scored", sum(rows.values()), "rows"))
    return tuple(cost)
