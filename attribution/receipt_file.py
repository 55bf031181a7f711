"""The receipt as a caller keeps it: under 4 kB, and enough to show offline that the log holds it. Its ancestry apart.

A receipt file says nothing twice. What of the batch's `completions` record follows from the receipt itself (replica,
root and number of receipts, kind of record) is left out; a reader puts it back and has the signed bytes again, or finds
that they lead to no leaf of the log. Where the adapter comes from is the same for all its receipts: an ancestry holds
those records, once. A receipt bundle (receipts.py) has both in one file.
"""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attribution.bodies import CompletionsBody, Digest, Hex32
from attribution.log.merkle import hash_leaf, root_from_inclusion
from attribution.log.note import decode_base64
from attribution.receipts import (
    Receipt,
    inner_path,
    makers_of,
    parse_receipt,
    receipt_commitment,
    required_receipt,
)
from attribution.records import (
    PAYLOAD_TYPE,
    Artefact,
    CodeIdentity,
    Record,
    build_leaf,
    canonical_bytes,
    from_plain,
    statement_of,
    to_plain,
)

if TYPE_CHECKING:
    from attribution.trail import Trail

RECEIPT_FILE_TYPE = "https://trailmark.dev/receipt/v2"
ANCESTRY_TYPE = "https://trailmark.dev/ancestry/v1"
FILE_FIELDS = ("type", "receipt", "inner", "batch", "proof")


@dataclass(frozen=True)
class Inner:
    """Entry `index` of `size` in the batch's tree; its path and salt in base64."""

    index: int
    size: int
    path: tuple[str, ...]
    salt: str


@dataclass(frozen=True)
class Signature:
    """One signature of the record, as in its DSSE envelope."""

    keyid: str
    sig: str


@dataclass(frozen=True)
class Batch:
    """A `completions` record without what the receipt says already; its salt in base64."""

    first_time_us: int
    last_time_us: int
    table: Digest
    inputs: tuple[Artefact, ...]
    code: CodeIdentity
    environment: Digest
    time_us: int
    parents: tuple[Hex32, ...]
    signatures: tuple[Signature, ...]
    salt: str


@dataclass(frozen=True)
class ReceiptFile:
    """A receipt, its place in its batch, the batch's record, and that record's tlog-proof."""

    type: str
    receipt: Receipt
    inner: Inner
    batch: Batch
    proof: str

    def record(self) -> Record:
        """Return the batch's record. MerkleError or NoteError when the inner path is malformed."""
        inner, batch = self.inner, self.batch
        entry = receipt_commitment(to_plain(self.receipt, "receipt"), decode_base64(inner.salt, what="receipt salt"))
        path = [decode_base64(node, what="inner path") for node in inner.path]
        root = root_from_inclusion(hash_leaf(entry), inner.index, inner.size, path).hex()
        replica, times = self.receipt.replica, (batch.first_time_us, batch.last_time_us)
        return completions_record(CompletionsBody(replica, root, inner.size, *times, batch.table), batch)


def completions_record(body: CompletionsBody, batch: Batch) -> Record:
    """Return the record that `receipts.append_completions` writes of a batch."""
    return Record(
        kind="completions",
        contributors=(),
        inputs=batch.inputs,
        outputs=(Artefact("receipts", body.replica, body.table),),
        code=batch.code,
        environment=batch.environment,
        config=None,
        seed=0,
        attempt=1,
        parent_attempt=None,
        time_us=batch.time_us,
        body=body,
    )


def receipt_file(trail: "Trail", receipt_id: str) -> dict[str, Any]:
    """Return what verifying a receipt offline needs, and no more, as JSON. ReceiptError when the log has it not."""
    from attribution.notices import prove_with_notices

    stored = required_receipt(trail, receipt_id)
    entry = trail.entry(stored.leaf_hash)
    assert entry.record is not None and entry.salt is not None, "a receipt that was found has its batch"
    assert isinstance(entry.record.body, CompletionsBody)
    (proved,), notices = prove_with_notices(trail, [stored.leaf_hash])
    body, record = entry.record.body, entry.record
    batch = Batch(
        first_time_us=body.first_time_us,
        last_time_us=body.last_time_us,
        table=body.table,
        inputs=record.inputs,
        code=record.code,
        environment=record.environment,
        time_us=record.time_us,
        parents=entry.leaf.parents,
        signatures=tuple(Signature(**signature) for signature in proved["envelope"]["signatures"]),
        salt=_base64(entry.salt),
    )
    assert completions_record(body, batch) == record, "a batch is always recorded in one way"
    path = tuple(map(_base64, inner_path(trail, stored)))
    inner = Inner(stored.inner_index, stored.inner_size, path, _base64(stored.row.salt))
    file = ReceiptFile(RECEIPT_FILE_TYPE, parse_receipt(stored.row.receipt), inner, batch, proved["proof"])
    return {**to_plain(file, "receipt file"), **notices}


def ancestry_file(trail: "Trail", receipt_id: str) -> dict[str, Any]:
    """Return the proofs of the records that a receipt's adapter, base and prompt come from; its siblings share them.

    Those of adapter, publication and base model and all their ancestors, in log order; none where the log knows none.
    """
    from attribution.lineage import Lineage
    from attribution.notices import prove_with_notices

    stored = required_receipt(trail, receipt_id)
    leaves = Lineage(trail).closure(makers_of(trail, parse_receipt(stored.row.receipt), stored.leaf_hash))
    lineage, notices = prove_with_notices(trail, leaves)
    return {"type": ANCESTRY_TYPE, "lineage": lineage, **notices}


def expanded(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a receipt file (an object of FILE_FIELDS) as a receipt bundle without lineage, its record whole again.

    Raises ReceiptError, RecordError, MerkleError or NoteError for a malformed file.
    """
    file: ReceiptFile = from_plain(ReceiptFile, {name: value[name] for name in FILE_FIELDS}, "receipt file")
    parse_receipt(value["receipt"])
    record, salt = file.record(), decode_base64(file.batch.salt, what="salt of the batch")
    envelope = {
        "payload": _base64(canonical_bytes(statement_of(record), "record")),
        "payloadType": PAYLOAD_TYPE,
        "signatures": to_plain(file.batch.signatures, "signatures"),
    }
    leaf = build_leaf(record, canonical_bytes(envelope, "envelope"), salt=salt, parents=file.batch.parents)
    path = [decode_base64(node, what="inner path").hex() for node in file.inner.path]
    return {
        "receipt": value["receipt"],
        "salt": decode_base64(file.inner.salt, what="receipt salt").hex(),
        "inner": {"index": file.inner.index, "size": file.inner.size, "path": path},
        "record": {"envelope": envelope, "salt": salt.hex(), "leaf": leaf.to_json(), "proof": file.proof},
    }


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
