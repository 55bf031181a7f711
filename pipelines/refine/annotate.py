"""One block of contributed rows -> refined candidates and a decision per row and rule. Pure: no store, no Ray.

Annotate first, decide later, as Dolma does (https://arxiv.org/abs/2402.00159): a dropped row keeps its decisions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.refine import dedup
from pipelines.refine.canonical import Messages, canonical_messages, content_id, duplicate_key
from pipelines.refine.rules import Rule, Verdict
from pipelines.refine.table import DECISIONS, REFINED

KEY = "duplicate_key"
CANDIDATES = REFINED.append(pa.field(KEY, pa.binary(dedup.KEY_BYTES)))


@dataclass(frozen=True)
class Origin:
    """The contribution that a block of rows comes from: key id, licence, leaf hash and index of its record."""

    contributor: str
    licence: str
    dataset: str
    leaf_index: int


@dataclass(frozen=True)
class Annotated:
    """A block after the row rules.

    candidates: CANDIDATES, the rows that passed, in line order.
    decisions: DECISIONS, in line order and rule order. Each candidate's last one is that of the duplicates rule, which
    needs all blocks: until then it says keep.
    """

    candidates: pa.Table
    decisions: pa.Table


def annotate(contributed: pa.Table, origin: Origin, *, rules: Sequence[Rule]) -> Annotated:
    """Ask `rules` of each row of `contributed` (CONTRIBUTED): one decision per row and rule, but for two cases.

    A row that is no conversation (the rule `schema`) is asked nothing more. Rows that a rule dropped do not compete as
    duplicates, so `exact_duplicates` has no decision about them.
    """
    candidates: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    duplicates_digest = dedup.digest()
    for row in contributed.to_pylist():
        messages = row["messages"] or []
        example_id = row["contribution_id"]
        verdicts = judge(messages, rules=rules)
        decisions += [_decision(example_id, rule.name, rule.digest, verdict) for rule, verdict in verdicts]
        if all(verdict.keep for _, verdict in verdicts):
            candidates.append(_candidate(row, origin, canonical_messages(messages)))
            decisions.append(_decision(example_id, dedup.NAME, duplicates_digest, Verdict(True)))
    return Annotated(
        pa.Table.from_pylist(candidates, schema=CANDIDATES), pa.Table.from_pylist(decisions, schema=DECISIONS)
    )


def judge(messages: Messages, *, rules: Sequence[Rule]) -> list[tuple[Rule, Verdict]]:
    """Return each rule's verdict, up to a gate that drops the row. Rules that see the contributed form come first."""
    verdicts: list[tuple[Rule, Verdict]] = []
    canonical: Messages | None = None
    for rule in rules:
        if rule.sees == "canonical" and canonical is None:
            canonical = canonical_messages(messages)
        verdict = rule.judge(messages if canonical is None else canonical)
        verdicts.append((rule, verdict))
        if rule.is_gate and not verdict.keep:
            break
    return verdicts


def _decision(example_id: str, name: str, digest: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "rule": name,
        "rule_digest": digest,
        "score": verdict.score,
        "keep": verdict.keep,
        "reason": verdict.reason,
        "see_also": "",
    }


def _candidate(row: Mapping[str, Any], origin: Origin, canonical: Messages) -> dict[str, Any]:
    return {
        "example_id": row["contribution_id"],
        "content_id": content_id(canonical),
        "original_content_id": row["content_id"],
        "contributor": origin.contributor,
        "licence": origin.licence,
        "dataset": origin.dataset,
        "leaf_index": origin.leaf_index,
        "line_number": row["line_number"],
        "messages": canonical,
        KEY: duplicate_key(canonical),
    }
