"""Refinement rules as players: with a rule off, the rows that it alone dropped come back."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.settle.game import Bits, Game, Player
from pipelines.settle.subject import SettleError, Subject

if TYPE_CHECKING:
    from attribution.trail import Trail

ALWAYS_ON = frozenset({"schema"})
"""Without it there is no conversation to train on."""


def game_of_rules(trail: "Trail", subject: Subject, _: tuple[str, ...]) -> Game:
    """Each rule that dropped rows. Rows are all contributed ones that can be trained on, in order of registration.

    Every rule's decision about every row is on record, so a coalition needs no new refinement; duplicates alone are
    settled anew among the rows that the other rules leave.
    """
    from transformers import AutoTokenizer

    from pipelines.refine import dedup
    from pipelines.train.data import encode_rows

    if subject.refinement is None:
        raise SettleError(f"dataset {subject.dataset}: its refinement is not in this log, so its rules are unknown")
    dropped_by, counts = _drops(trail, subject)
    names = [rule.name for rule in subject.refinement.rules if counts[rule.name] and rule.name not in ALWAYS_ON]
    if not names:
        raise SettleError(f"dataset {subject.dataset}: no rule dropped a row that can be trained on, so none mattered")
    tokenizer = AutoTokenizer.from_pretrained(subject.adapter.base_path, local_files_only=True)
    rows = [row for row in _contributed(trail, subject) if not dropped_by[row["example_id"]] & ALWAYS_ON]
    encoded = encode_rows(pa.Table.from_pylist(rows), tokenizer, max_length=subject.settings.max_length)
    by_id = {row["example_id"]: row for row in rows}
    used = [by_id[example.example_id] for example in encoded.examples]
    blocked = np.array([[name in dropped_by[row["example_id"]] for name in names] for row in used])
    keys = [row["key"] for row in used]
    place_of_dedup = names.index(dedup.NAME) if dedup.NAME in names else None

    def chosen(coalition: Bits) -> Bits:
        active = coalition.copy()
        if place_of_dedup is not None:
            active[place_of_dedup] = False
        left: Bits = np.logical_not(np.any(blocked[:, active], axis=1))
        return _first_of_each(keys, left) if place_of_dedup is None or coalition[place_of_dedup] else left

    digests = {rule.name: rule.digest for rule in subject.refinement.rules}
    players = tuple(Player("rule", digests[name], name, counts[name]) for name in names)
    return Game("rules", "train", players, chosen, examples=encoded.examples)


def _first_of_each(keys: list[bytes], left: Bits) -> Bits:
    """Of rows with one key, keep the one registered first."""
    seen: set[bytes] = set()
    kept = left.copy()
    for place in np.flatnonzero(left):
        kept[place] = keys[place] not in seen
        seen.add(keys[place])
    return kept


def _drops(trail: "Trail", subject: Subject) -> tuple[dict[str, set[str]], Counter[str]]:
    """Example id -> the rules that dropped it, and rows dropped by each rule."""
    from pipelines.refine.read import load_decisions

    dropped: dict[str, set[str]] = defaultdict(set)
    decisions = load_decisions(trail, subject.dataset).select(["example_id", "rule", "keep"])
    for row in decisions.filter(pa.compute.invert(decisions.column("keep"))).to_pylist():
        dropped[row["example_id"]].add(row["rule"])
    return dropped, Counter(rule for rules in dropped.values() for rule in rules)


def _contributed(trail: "Trail", subject: Subject) -> list[dict[str, Any]]:
    """The rows of every contribution behind the dataset, canonical, once per example id, with their duplicate keys."""
    from pipelines.refine.canonical import canonical_messages, duplicate_key
    from pipelines.refine.read import contributions, verified_rows

    assert subject.entry.record is not None
    maker = _refinement_entry(trail, subject)
    wanted = set(maker.leaf.parents)
    found: dict[str, dict[str, Any]] = {}
    for contribution in contributions(trail):
        if contribution.origin.dataset not in wanted:
            continue
        for row in pq.read_table(verified_rows(trail, contribution)).to_pylist():
            if not row["messages"]:
                continue
            messages = canonical_messages(row["messages"])
            found.setdefault(
                row["contribution_id"],
                {
                    "example_id": row["contribution_id"],
                    "contributor": contribution.origin.contributor,
                    "messages": messages,
                    "key": duplicate_key(messages),
                },
            )
    return list(found.values())


def _refinement_entry(trail: "Trail", subject: Subject) -> Any:
    from attribution.erasure import maker_of

    return maker_of(trail, subject.dataset)
