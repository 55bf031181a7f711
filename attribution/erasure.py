"""Erasing records: the redaction is appended first, then blobs go, then record and salt.

Redaction first, because a hole that no record explains looks like tampering, while a redaction whose record still
stands is an intention: `finish_erasures` carries it out. The record goes last, for it alone says which blobs it owned.

A table that lost rows gives way to a new one; `remaining` follows it, digest by digest.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.bodies import NOTICE_KINDS, CompletionsBody, RedactionBody, RowRedactionBody, TableRewrite
from attribution.records import Party, Record, to_plain
from attribution.store import DIGEST, StoreError
from attribution.trust_file import OPERATOR
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Draft, Entry, Trail

# A version number once given stays taken, what explains a hole or a key must stand, and only a statement says which
# receipts were paid: without it they would be paid again.
PROTECTED_KINDS = NOTICE_KINDS | {"key", "publication", "statement"}


class ErasureError(UserError):
    """What cannot be erased, or by this person."""


@dataclass(frozen=True)
class Removal:
    """What goes with some records: their blobs and folders; those that other records own too stay."""

    leaves: tuple[str, ...]
    digests: tuple[str, ...]
    shared: tuple[str, ...]


def remaining(trail: "Trail", digest: str) -> str:
    """Return the digest of what is left of an artefact: its own, or of the table that followed it."""
    follows = {rewrite.before: rewrite.after for rewrite in rewrites(trail)}
    while digest in follows:
        digest = follows[digest]
    return digest


def rewrites(trail: "Trail") -> Iterator[TableRewrite]:
    """Yield every table that gave way to one without erased rows, oldest first."""
    for entry in trail.notices():
        if entry.record is not None and isinstance(entry.record.body, RowRedactionBody):
            yield from entry.record.body.rewritten


def maker_of(trail: "Trail", digest: str) -> "Entry | None":
    """Return the record that first made what `digest` is left of: of a table without erased rows, that of the whole."""
    origin = {rewrite.after: rewrite.leaf for rewrite in rewrites(trail)}
    return trail.entry(origin[digest]) if digest in origin else trail.find(digest)


def removal_of(trail: "Trail", leaf_hashes: Sequence[str]) -> Removal:
    """Return what goes with these records, as far as they are still there."""
    doomed = [entry for leaf_hash in leaf_hashes if (entry := trail.entry(leaf_hash)).record is not None]
    owned = {digest for entry in doomed for digest in owned_digests(trail, entry)}
    held = _held_by_others(
        trail, set(leaf_hashes), with_answers=any(item.leaf.kind == "completions" for item in doomed)
    )
    here = sorted(digest for digest in owned if trail.store.has(digest))
    return Removal(
        tuple(entry.leaf_hash for entry in doomed),
        tuple(digest for digest in here if digest not in held),
        tuple(digest for digest in here if digest in held),
    )


def redactions(trail: "Trail", leaf_hashes: Iterable[str], *, reason: str, parties: "Sequence[Party]") -> "list[Draft]":
    """Return the redactions that are still to be recorded, one for each record."""
    from attribution.trail import Draft

    known = trail.erasures()
    return [
        Draft("redaction", RedactionBody(leaf, reason), contributors=parties, parents=[leaf])
        for leaf in leaf_hashes
        if leaf not in known
    ]


def erase(trail: "Trail", leaf_hashes: Sequence[str], *, reason: str, requester: Party) -> "list[Entry]":
    """Erase records with what only they own; return the redactions. Safe to repeat, whatever a crash left.

    Raises:
        ErasureError: a record of a kind that must stand.
    """
    for leaf_hash in leaf_hashes:
        require_erasable(trail.entry(leaf_hash))
    drafts = redactions(trail, leaf_hashes, reason=reason, parties=parties_of(trail, requester))
    entries = trail.record_many(drafts)
    remove(trail, leaf_hashes)
    return entries


def remove(trail: "Trail", leaf_hashes: Sequence[str]) -> Removal:
    """Remove redacted records and their blobs from the disk."""
    removal = removal_of(trail, leaf_hashes)
    for digest in removal.digests:
        trail.store.delete(digest)
    for leaf_hash in removal.leaves:
        trail.delete_record(leaf_hash)
    _forget_in_views(trail)
    return removal


def finish_erasures(trail: "Trail") -> int:
    """Carry out what redactions say and a crash prevented; return how many records and tables that were."""
    leaves = [leaf_hash for leaf_hash in trail.erasures() if trail.entry(leaf_hash).record is not None]
    if leaves:
        remove(trail, leaves)
    return len(leaves) + remove_rewritten(trail)


def remove_rewritten(trail: "Trail") -> int:
    """Remove the tables that gave way to others; return how many were still there."""
    before = {rewrite.before for rewrite in rewrites(trail)}
    before -= {remaining(trail, digest) for digest in before}
    doomed = [digest for digest in before if trail.store.has(digest)]
    for digest in doomed:
        trail.store.delete(digest)
    _forget_in_views(trail)
    return len(doomed)


def _forget_in_views(trail: "Trail") -> None:
    """Have the lineage index, if there is one, take in the redactions now, and drop indexes of words: both name what
    they read.
    """
    from attribution.lineage_index import LineageIndex, size_of
    from attribution.span_files import forget_stale

    forget_stale(trail.home, trail.store)

    index = LineageIndex(trail.home, trail.log.key)
    if index.path.exists():
        index.ask(size_of)


def owned_digests(trail: "Trail", entry: "Entry") -> set[str]:
    """Return the digests of what a record made and keeps: outputs, tables, configuration; not what it was made from."""
    record = entry.record
    assert record is not None
    found = {output.digest for output in record.outputs} | set(_digests_in(record))
    found -= {artefact.digest for artefact in record.inputs}
    if isinstance(record.body, CompletionsBody):
        found |= set(_answers(trail, record.body))
    return {remaining(trail, digest) for digest in found}


def require_erasable(entry: "Entry") -> None:
    """Raise ErasureError for a record of a kind that must stand."""
    if entry.leaf.kind in PROTECTED_KINDS:
        raise ErasureError(
            f"{entry.leaf.kind} record {entry.leaf_hash[:12]}: cannot be erased, for it says what a name, a key or a "
            "hole in the log means, or which receipts were paid; erase the artefact's or the contributor's record "
            "instead"
        )


def parties_of(trail: "Trail", requester: Party) -> tuple[Party, ...]:
    """Return who took part in an erasure: who asked, and the operator, who signs and carries it out."""
    return (Party(requester.key_id, "requester"), Party(trail.keys.get(OPERATOR).key_id, "operator"))


def _digests_in(record: Record) -> Iterator[str]:
    if record.config is not None:
        yield record.config
    text = json.dumps(to_plain(record.body, record.kind))
    yield from (match.group() for match in DIGEST.finditer(text))


def _answers(trail: "Trail", body: CompletionsBody) -> Iterator[str]:
    """The private prompts and answers of a batch."""
    try:
        rows = trail.get_json(body.table)
    except (StoreError, ValueError):  # erased, altered or no table at all: no other record's erasure waits for it
        return
    yield from (row["content"] for row in rows if row["content"])


def _held_by_others(trail: "Trail", leaves: set[str], *, with_answers: bool) -> set[str]:
    """What records that stay own."""
    gone = trail.erasures().keys() | leaves
    held: set[str] = set()
    for entry in trail.entries():
        if entry.record is None or entry.leaf_hash in gone or (entry.leaf.kind == "completions" and not with_answers):
            continue
        held |= owned_digests(trail, entry)
    return held
