"""Receipts of completions: a private row each, a salted commitment in an inner tree, one record in the log per batch.

The inner tree is an RFC 6962 tree whose entries are the commitments SHA-256(salt || receipt), the receipt in RFC 8785
JSON; its root stands in a `completions` record. A receipt is proven by its inner path and that record's proof.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attribution.bodies import CompletionsBody, Digest, Hex32
from attribution.log.merkle import Tree, hash_leaf
from attribution.records import (
    SALT_BYTES,
    Artefact,
    RecordError,
    canonical_bytes,
    commitment_of,
    from_plain,
)
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.receipt_index import ReceiptIndex
    from attribution.staging import Draft
    from attribution.trail import Entry, Trail

RECEIPT_BUNDLE_TYPE = "https://trailmark.dev/receipt/v1"
RECEIPT_VERSION = 1
ID_PREFIX = "rcpt_"
ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32: no i, l, o, u to misread
TIME_BITS, RANDOM_BITS = 48, 80
NO_ROWS = "rows: empty; a completions record has at least one receipt"


class ReceiptError(UserError):
    """A receipt that is malformed, ambiguous or does not match the log."""


class DamagedTable(ReceiptError):
    """A batch in the store is not the one the log committed to."""


@dataclass(frozen=True)
class Receipt:
    """What was answered by what. Digests here are private: they reach the log only under a salt."""

    v: int
    id: str
    time_us: int
    model: str
    base: Digest
    adapter: Digest | None
    adapter_name: str | None
    adapter_record: Hex32 | None
    prompt_version: str | None
    retrieved: tuple[str, ...]
    request_digest: Digest
    output_digest: Digest
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    replica: str
    tenant: str


@dataclass(frozen=True)
class ReceiptRow:
    """A receipt (JSON object), its salt (32 bytes) and the digest of the private blob of prompt and answer."""

    receipt: dict[str, Any]
    salt: bytes
    content: str


@dataclass(frozen=True)
class StoredReceipt:
    """A receipt found in the log: entry `inner_index` of `inner_size` in the batch recorded at `leaf_hash`."""

    row: ReceiptRow
    inner_index: int
    inner_size: int
    leaf_hash: str


def new_receipt_id(time_us: int | None = None) -> str:
    """Return `rcpt_` and 26 characters: milliseconds, then 80 random bits; ids sort by time (as ULIDs do)."""
    time_ms = (time.time_ns() // 1000 if time_us is None else time_us) // 1000
    number = (time_ms % (1 << TIME_BITS)) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)
    return ID_PREFIX + "".join(ID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def parse_receipt(value: object) -> Receipt:
    """Return the typed receipt of a JSON object; ReceiptError names the field that is wrong."""
    try:
        receipt: Receipt = from_plain(Receipt, _as_object(value), "receipt")
    except RecordError as error:
        raise ReceiptError(str(error)) from error
    if receipt.v != RECEIPT_VERSION:
        raise ReceiptError(f"receipt.v = {receipt.v}: unknown; this program reads version {RECEIPT_VERSION}")
    return receipt


def receipt_commitment(receipt: dict[str, Any], salt: bytes) -> bytes:
    """Return SHA-256(salt || canonical receipt), 32 bytes: the receipt's entry in the inner tree."""
    return bytes.fromhex(commitment_of(salt, canonical_bytes(receipt, "receipt")))


def append_completions(trail: "Trail", rows: Sequence[ReceiptRow], *, replica: str) -> "Entry":
    """Record a batch of completions as one leaf and return its entry, durable.

    The adapters and bases of the rows become the record's inputs, and the records that made them its parents.

    Raises:
        ReceiptError: no row, a malformed receipt, another replica's receipt, a salt of the wrong length, or one id
            twice.
    """
    return trail.record_many([_draft(trail, rows, replica)])[0]


def append_once(trail: "Trail", rows: Sequence[ReceiptRow], *, replica: str) -> str:
    """Record rows in one commit, a batch for each adapter and prompt, but those the log has: a reply may be lost.

    A batch names one of each, so that its receipts stay small and tell nobody what else was asked at that time.
    Returns the leaf hash of the record that holds the last row. Two at a time could both find a row missing: the caller
    keeps calls with one row in common apart, and other writers are fenced.

    Raises:
        ReceiptError: as `append_completions`, or an id that another receipt in the log has.
    """
    places = _index(trail).places([parse_receipt(row.receipt).id for row in rows])
    leaf_hashes = {place.leaf_hash for place in places.values()}
    tables = {leaf_hash: completion_rows(trail, trail.entry(leaf_hash)) for leaf_hash in leaf_hashes}
    new: dict[tuple[str | None, str | None], list[ReceiptRow]] = {}
    for row in rows:
        place = places.get(row.receipt["id"])
        if place is None:
            new.setdefault(_made_with(row), []).append(row)
        # An erased batch has no rows to compare with; its ids are taken all the same.
        elif (table := tables[place.leaf_hash]) and _commitment(table[place.inner_index]) != _commitment(row):
            raise ReceiptError(f"receipt {place.receipt_id}: the log has another receipt of this id; give it a new id")
    if not rows:
        raise ReceiptError(NO_ROWS)
    entries = trail.record_many([_draft(trail, batch, replica) for batch in new.values()])
    made = {batch: entry.leaf_hash for batch, entry in zip(new, entries, strict=True)}
    place = places.get(rows[-1].receipt["id"])
    return made[_made_with(rows[-1])] if place is None else place.leaf_hash


def _made_with(row: ReceiptRow) -> tuple[str | None, str | None]:
    return row.receipt["adapter"], row.receipt["prompt_version"]


def _draft(trail: "Trail", rows: Sequence[ReceiptRow], replica: str) -> "Draft":
    from attribution.staging import Draft

    if not rows:
        raise ReceiptError(NO_ROWS)
    receipts = [parse_receipt(row.receipt) for row in rows]
    if len({receipt.id for receipt in receipts}) != len(rows):
        raise ReceiptError("rows: one receipt id occurs twice")
    for receipt in receipts:
        if receipt.replica != replica:
            raise ReceiptError(
                f"receipt {receipt.id}: its replica {receipt.replica!r} is not the batch's {replica!r}, so it would "
                "never verify; append it in a batch of its own replica"
            )
    if any(len(row.salt) != SALT_BYTES for row in rows):
        raise ReceiptError(f"rows: every salt has {SALT_BYTES} bytes")
    table = trail.put_json([{"receipt": row.receipt, "salt": row.salt.hex(), "content": row.content} for row in rows])
    body = CompletionsBody(
        replica=replica,
        root=_inner_tree(rows).root().hex(),
        count=len(rows),
        first_time_us=min(receipt.time_us for receipt in receipts),
        last_time_us=max(receipt.time_us for receipt in receipts),
        table=table,
    )
    inputs = [*_artefacts(receipts), *_prompts(trail, receipts)]
    return Draft("completions", body, inputs=inputs, outputs=(Artefact("receipts", replica, table),))


def completion_rows(trail: "Trail", entry: "Entry") -> list[ReceiptRow]:
    """Return the rows of a completions entry, checked against its inner root; [] when the record was erased.

    DamagedTable when the table in the store is not the one the log committed to.
    """
    if entry.record is None:
        return []
    body = entry.record.body
    assert isinstance(body, CompletionsBody)
    rows = [
        ReceiptRow(row["receipt"], bytes.fromhex(row["salt"]), row["content"]) for row in trail.get_json(body.table)
    ]
    if len(rows) != body.count or _inner_tree(rows).root().hex() != body.root:
        raise DamagedTable(f"completions {entry.leaf_hash}: their table does not lead to the recorded root")
    return rows


def find_receipt(trail: "Trail", receipt_id: str) -> StoredReceipt | None:
    """Return the receipt whose id is, or alone begins with, `receipt_id`; None when there is none.

    ReceiptError when several ids begin with it.
    """
    place = _index(trail).find(receipt_id)
    if place is None:
        return None
    rows = completion_rows(trail, trail.entry(place.leaf_hash))
    return StoredReceipt(rows[place.inner_index], place.inner_index, len(rows), place.leaf_hash) if rows else None


def recent_receipts(trail: "Trail", count: int = 20) -> list[str]:
    """Return the newest receipt ids, newest first."""
    return _index(trail).recent(count)


def rebuild_receipt_index(trail: "Trail") -> int:
    """Forget the index of receipt ids, read it again from the log, and return how many there are."""
    return _index(trail).rebuild()


def receipt_content(trail: "Trail", receipt_id: str) -> dict[str, Any]:
    """Return the private content of a receipt: messages or prompt, token ids, the text of the answer."""
    content: dict[str, Any] = trail.get_json(required_receipt(trail, receipt_id).row.content)
    return content


def receipt_bundle(trail: "Trail", receipt_id: str) -> dict[str, Any]:
    """Return all that verifying a receipt offline needs: its inner path, its record, and where its adapter comes from.

    The lineage holds the records of adapter, publication and base model and all their ancestors, in log order.
    """
    from attribution.lineage import Lineage
    from attribution.notices import prove_with_notices

    stored = required_receipt(trail, receipt_id)
    path = inner_path(trail, stored)
    lineage = Lineage(trail).closure(makers_of(trail, parse_receipt(stored.row.receipt), stored.leaf_hash))
    (record, *ancestors), notices = prove_with_notices(trail, [stored.leaf_hash, *lineage])
    return {
        "type": RECEIPT_BUNDLE_TYPE,
        "receipt": stored.row.receipt,
        "salt": stored.row.salt.hex(),
        "inner": {"index": stored.inner_index, "size": stored.inner_size, "path": [node.hex() for node in path]},
        "record": record,
        "lineage": ancestors,
        **notices,
    }


def inner_path(trail: "Trail", stored: StoredReceipt) -> list[bytes]:
    """Return the path of a receipt to the root of its batch, 32 bytes a node, leaf side first."""
    return _inner_tree(completion_rows(trail, trail.entry(stored.leaf_hash))).inclusion_path(stored.inner_index)


def makers_of(trail: "Trail", receipt: Receipt, completions: str) -> list[str]:
    """Return the records a receipt stands on: those that made its adapter, base and prompt, and that named them."""
    entry = trail.entry(completions)
    prompts = {item.digest for item in entry.record.inputs if item.kind == "prompt"} if entry.record else set()
    named = {receipt.base, receipt.adapter, *(prompts if receipt.prompt_version else ())} - {None}
    makers = []
    for parent in entry.leaf.parents:
        record = trail.entry(parent).record
        if record is not None and any(output.digest in named for output in record.outputs):
            makers.append(parent)
    for published in trail.registry.list():
        is_adapter = published.digest == receipt.adapter and receipt.adapter_name in (
            published.reference,
            published.name,
        )
        is_prompt = published.kind == "prompt" and published.reference == receipt.prompt_version
        if (is_adapter or is_prompt) and published.time_us <= entry.leaf.time_us:
            makers.append(published.leaf_hash)
    return makers


def required_receipt(trail: "Trail", receipt_id: str) -> StoredReceipt:
    """Return the receipt whose id is, or alone begins with, `receipt_id`. ReceiptError when the log has it not."""
    stored = find_receipt(trail, receipt_id)
    if stored is None:
        raise ReceiptError(
            f"receipt {receipt_id!r}: not in the log of {trail.home}; `trailmark log show` lists what is"
        )
    return stored


def _index(trail: "Trail") -> "ReceiptIndex":
    from attribution.receipt_index import ReceiptIndex

    return ReceiptIndex(trail)


def _inner_tree(rows: Sequence[ReceiptRow]) -> Tree:
    return Tree(hash_leaf(_commitment(row)) for row in rows)


def _commitment(row: ReceiptRow) -> bytes:
    return receipt_commitment(row.receipt, row.salt)


def _artefacts(receipts: Sequence[Receipt]) -> list[Artefact]:
    """The adapters and bases of a batch, each once, adapters first, sorted by digest so that retries agree."""
    adapters = {receipt.adapter: receipt.adapter_name or "adapter" for receipt in receipts if receipt.adapter}
    bases = sorted({receipt.base for receipt in receipts})
    found = [Artefact("adapter", adapters[digest], digest) for digest in sorted(adapters)]
    return found + [Artefact("base_model", "base", digest) for digest in bases]


def _prompts(trail: "Trail", receipts: Sequence[Receipt]) -> list[Artefact]:
    """The registered prompts that a batch was made with, each once."""
    from attribution.registry import RegistryError

    try:
        return [
            Artefact("prompt", name, trail.registry.resolve(name, kind="prompt").digest)
            for name in sorted({receipt.prompt_version for receipt in receipts if receipt.prompt_version})
        ]
    except RegistryError as error:
        raise ReceiptError(f"receipt.prompt_version: {error}") from error


def _as_object(value: object) -> Any:
    """JSON arrays arrive as lists; a caller's tuple is as good."""
    if isinstance(value, dict) and isinstance(value.get("retrieved"), tuple):
        return {**value, "retrieved": list(value["retrieved"])}
    return value
