"""Which notices a proof must carry to verify offline: what changed the keys in it, what was erased from it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from attribution.bodies import KeyRevocationBody, KeyRotationBody, RedactionBody, RowRedactionBody
from attribution.records import key_ids_of

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail


def prove_with_notices(trail: "Trail", leaf_hashes: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the proofs of records, and {"notices": [...]} of what bears on them, or {}; all under one checkpoint."""
    notices = notices_for(trail, leaf_hashes)
    proofs = trail.proofs([*leaf_hashes, *notices])
    rest = proofs[len(leaf_hashes) :]
    return proofs[: len(leaf_hashes)], {"notices": rest} if rest else {}


def notices_for(trail: "Trail", leaf_hashes: Sequence[str]) -> list[str]:
    """Return the leaf hashes of the notices that bear on records, in log order, the records themselves left out."""
    notices = trail.notices()
    if not notices:
        return []
    shown = [trail.entry(leaf_hash) for leaf_hash in leaf_hashes]
    keys = _keys_behind(notices, shown)
    leaves = set(leaf_hashes)
    return [item.leaf_hash for item in notices if item.leaf_hash not in leaves and _bears_on(item, keys, leaves)]


def _keys_behind(notices: "Sequence[Entry]", shown: "Iterable[Entry]") -> set[str]:
    """The keys that signed the records, and the contributors' keys that those took the place of."""
    keys = {key_id for entry in shown if entry.envelope is not None for key_id in key_ids_of(entry.envelope)}
    for notice in reversed(notices):
        body = notice.record.body if notice.record is not None else None
        if isinstance(body, KeyRotationBody) and body.key_id in keys:
            keys.add(body.old_key_id)
    return keys


def _bears_on(notice: "Entry", keys: set[str], leaves: set[str]) -> bool:
    body = notice.record.body if notice.record is not None else None
    match body:
        case KeyRotationBody() | KeyRevocationBody() if body.role != "contributor":
            return True  # whoever reads may trust any of the log's and the operator's keys
        case KeyRotationBody():
            return body.key_id in keys or body.old_key_id in keys
        case KeyRevocationBody():
            return body.key_id in keys
        case RedactionBody():
            return body.leaf in leaves
        case RowRedactionBody():
            return not leaves.isdisjoint({body.contribution, *(rewrite.leaf for rewrite in body.rewritten)})
    return False
