"""Verify a receipt or a record offline: from its bytes and a few trusted keys alone, no log, no network, no Ray.

Every step that succeeds leaves a line in `Verified.checks`; the first that fails raises a VerifyError that names it.
Only light modules are imported here: a typical receipt is verified in a few milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attribution.bodies import NOTICE_KINDS, CompletionsBody
from attribution.log.facts import receipt_facts, record_facts, utc
from attribution.log.key_history import KeyHistory, LogKey
from attribution.log.merkle import MerkleError, hash_leaf, root_from_inclusion
from attribution.log.note import Checkpoint, NoteError
from attribution.log.notices import notice_checks
from attribution.log.policy import Cosigned, PolicyError
from attribution.log.proof import parse_proof
from attribution.log.proved import ProvedRecord, VerifyError
from attribution.log.trust import Trust
from attribution.receipts import (
    RECEIPT_BUNDLE_TYPE,
    Receipt,
    ReceiptError,
    parse_receipt,
    receipt_commitment,
)
from attribution.records import (
    Leaf,
    Record,
    RecordError,
    Subject,
    canonical_bytes,
    commitment_of,
    named_subjects,
    parse_strict,
    record_from_envelope,
)

RECORD_BUNDLE_TYPE = "https://trailmark.dev/record-proof/v1"
RECORD_PROOF_FIELDS = frozenset({"envelope", "salt", "leaf", "proof"})
MAX_FILE_BYTES = 64 << 20
MAX_LINEAGE = 10_000
TAKE_AGAIN = "; if the record is new, take its proof again in a few seconds"


@dataclass(frozen=True)
class Verified:
    """What was shown: `kind` is `receipt` or the record's kind, `checks` one sentence each, `facts` for printing."""

    kind: str
    checks: list[str]
    facts: dict[str, Any]


def verify_file(path: Path, *, trust: Trust) -> Verified:
    """Verify a receipt bundle or a record proof in a file; VerifyError names the check that failed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise VerifyError("file", f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise VerifyError("file", f"{path}: over {MAX_FILE_BYTES >> 20} MiB; a receipt has a few hundred kB at most")
    return verify_bytes(data, trust=trust)


def verify_bytes(data: bytes, *, trust: Trust) -> Verified:
    """Verify the bytes of a receipt bundle, a record bundle or a single record proof (JSON, any layout)."""
    try:
        value = parse_strict(data, "file")
    except RecordError as error:
        raise VerifyError("file", str(error)) from error
    if not isinstance(value, dict):
        raise VerifyError("file", "must be a JSON object")
    session = _Session(trust, trust.history())
    if set(value) == RECORD_PROOF_FIELDS:
        return _verify_record(session, value, None)
    if value.get("type") == RECORD_BUNDLE_TYPE:
        _require_fields(value, {"type", "record", "lineage"})
        session.learn_keys(value.get("notices", []))
        return _verify_record(session, value["record"], value["lineage"])
    if value.get("type") == RECEIPT_BUNDLE_TYPE:
        _require_fields(value, {"type", "receipt", "salt", "inner", "record", "lineage"})
        session.learn_keys(value.get("notices", []))
        return _verify_receipt(session, value)
    raise VerifyError(
        "file", f"type {value.get('type')!r}: neither a receipt ({RECEIPT_BUNDLE_TYPE}) nor a record proof"
    )


@dataclass
class _Session:
    """One verification: the keys and when they were good, the one checkpoint, and the sentences to print."""

    trust: Trust
    history: KeyHistory
    checks: list[str] = field(default_factory=list)
    opened: dict[str, tuple[ProvedRecord, bytes, str]] = field(default_factory=dict)  # leaf hash -> with envelope, what
    notice_values: list[Any] = field(default_factory=list)
    notices: list[ProvedRecord] = field(default_factory=list)
    note: str | None = None
    checkpoint: Checkpoint | None = None
    cosigned: Cosigned | None = None
    log_key: LogKey = None  # type: ignore[assignment]  # set with the checkpoint

    def learn_keys(self, notices: Any) -> None:
        """Read what the file's notices say of the log's and the operator's keys; they are proven like the rest."""
        if not isinstance(notices, list) or len(notices) > MAX_LINEAGE:
            raise VerifyError("notices", f"must be a list of at most {MAX_LINEAGE} records")
        self.notice_values = notices
        for number, value in enumerate(notices):
            what = f"notices[{number}]"
            if not isinstance(value, dict) or not isinstance(value.get("proof"), str):
                raise VerifyError("notices", f"{what}: must be a record proof")
            try:
                envelope = canonical_bytes(value.get("envelope"), "envelope")
                index, record = parse_proof(value["proof"]).index, record_from_envelope(envelope)
            except (RecordError, NoteError) as error:
                raise VerifyError("notices", f"{what}: {error}") from error
            if record.kind not in NOTICE_KINDS:
                raise VerifyError("notices", f"{what}: a {record.kind} record is no notice")
            self.history.learn(index, record, envelope)

    def prove(self, value: Any, what: str) -> ProvedRecord:
        """Check one record proof: leaf, place in the tree, commitment and header; signatures follow in `sign`."""
        if not isinstance(value, dict) or set(value) != RECORD_PROOF_FIELDS:
            raise VerifyError("file", f"{what}: must be an object of {', '.join(sorted(RECORD_PROOF_FIELDS))}")
        try:
            leaf = Leaf.from_json(value["leaf"])
            leaf_bytes = leaf.to_bytes()
        except RecordError as error:
            raise VerifyError("leaf", f"{what}: {error}") from error
        index = self._include(value["proof"], leaf_bytes, what)
        leaf_hash = hash_leaf(leaf_bytes).hex()
        if value["envelope"] is None and value["salt"] is None:
            return ProvedRecord(index, leaf_hash, leaf, None)
        record, envelope = self._open(value, leaf, what)
        proved = ProvedRecord(index, leaf_hash, leaf, record)
        self.opened[leaf_hash] = (proved, envelope, what)
        return proved

    def _include(self, text: Any, leaf_bytes: bytes, what: str) -> int:
        """The leaf's index, once its proof leads to the signed checkpoint that all proofs of the file share."""
        if not isinstance(text, str):
            raise VerifyError("inclusion proof", f"{what}: is not text")
        try:
            proof = parse_proof(text)
        except NoteError as error:
            raise VerifyError("inclusion proof", f"{what}: {error}") from error
        if proof.extra:
            raise VerifyError("inclusion proof", f"{what}: has an extra line, for which nothing vouches; take it out")
        if self.note is not None and proof.checkpoint != self.note:
            raise VerifyError("checkpoint", f"{what}: stands under another checkpoint than the rest of the file")
        try:
            if self.checkpoint is None:
                self.checkpoint, self.log_key = self.history.open_checkpoint(proof.checkpoint)
                self.note = proof.checkpoint
                self._require_witnesses()
            proof.include(hash_leaf(leaf_bytes), self.checkpoint)
        except NoteError as error:
            raise VerifyError("checkpoint", f"{what}: {error}") from error
        except MerkleError as error:
            raise VerifyError("inclusion proof", f"{what}: {error}") from error
        return proof.index

    def _require_witnesses(self) -> None:
        """Check the checkpoint's cosignatures, when a policy is trusted."""
        assert self.note is not None
        if self.trust.policy is None:
            return
        try:
            self.cosigned = self.trust.policy.require(self.note)
        except NoteError as error:
            hint = TAKE_AGAIN if isinstance(error, PolicyError) else ""
            raise VerifyError("witnesses", f"{error}{hint}") from error

    def _open(self, value: Mapping[str, Any], leaf: Leaf, what: str) -> tuple[Record, bytes]:
        """The record and its envelope, once they match the leaf's commitment and header."""
        salt = parse_hex(value["salt"], "salt", what)
        try:
            envelope = canonical_bytes(value["envelope"], "envelope")
            commitment = commitment_of(salt, envelope)
        except RecordError as error:
            raise VerifyError("commitment", f"{what}: {error}") from error
        if commitment != leaf.commitment:
            raise VerifyError("commitment", f"{what}: record or salt is not the one the leaf commits to")
        try:
            record = record_from_envelope(envelope)
        except RecordError as error:
            raise VerifyError("record", f"{what}: {error}") from error
        subjects: tuple[Subject, ...] = named_subjects(record)
        if (record.kind, record.time_us, subjects) != (leaf.kind, leaf.time_us, leaf.subjects):
            raise VerifyError("record", f"{what}: kind, time or subjects differ from the leaf's")
        return record, envelope

    def sign(self, *records: ProvedRecord) -> list[ProvedRecord]:
        """Check every signature in log order, each key at its record's time; return `records` with their signers."""
        self.notices = [self.prove(value, f"notices[{number}]") for number, value in enumerate(self.notice_values)]
        signers: dict[str, tuple[str, ...]] = {}
        for proved, envelope, what in sorted(self.opened.values(), key=lambda item: item[0].index):
            assert proved.record is not None
            signers[proved.leaf_hash] = self.history.check(proved.index, proved.record, envelope, what)
        self.history.require_unrevoked()
        return [replace(item, signers=signers.get(item.leaf_hash, ())) for item in records]

    def prove_lineage(self, values: Any) -> list[ProvedRecord]:
        """Check a list of record proofs, oldest first."""
        if not isinstance(values, list) or len(values) > MAX_LINEAGE:
            raise VerifyError("lineage", f"must be a list of at most {MAX_LINEAGE} records")
        proved: list[ProvedRecord] = []
        for number, value in enumerate(values):
            item = self.prove(value, f"lineage[{number}]")
            if proved and item.index <= proved[-1].index:
                raise VerifyError("lineage", f"lineage[{number}]: records must stand once each and in log order")
            proved.append(item)
        return proved

    def finish(self, kind: str, facts: dict[str, Any]) -> Verified:
        """Return the result, with the facts every file has."""
        assert self.checkpoint is not None, "a file holds at least one proof"
        common = {
            "log": self.checkpoint.origin,
            "tree_size": self.checkpoint.size,
            "root": self.checkpoint.root.hex(),
            "keys": {str(self.log_key.key): "log", **dict(sorted(self._whose().items()))},
        }
        if self.cosigned is not None:
            common["witnesses"] = {
                name: utc(time_s * 1_000_000) for name, time_s in sorted(self.cosigned.times.items())
            }
        return Verified(kind, self.checks, {**facts, **common})

    def _whose(self) -> dict[str, str]:
        """Whose the keys are that signed."""
        used = [self.history.keys[key_id] for _, _, key_id, _ in self.history.uses if key_id in self.history.keys]
        return {key.key_id: f"contributor {key.name}" if key.name else key.role for key in used}


def _verify_record(session: _Session, value: Any, lineage_values: Any) -> Verified:
    lineage = [] if lineage_values is None else session.prove_lineage(lineage_values)
    record = session.prove(value, "record")
    record, *lineage = session.sign(record, *lineage)
    _check_connected(record, lineage, {record.leaf_hash}, complete=lineage_values is not None)
    _note_common(session, [record, *lineage])
    if record.record is None:
        session.checks.append("the record itself was erased; only its place in the log is proven")
    return session.finish(record.leaf.kind, record_facts(record, [*session.notices, *lineage]))


def _verify_receipt(session: _Session, bundle: Mapping[str, Any]) -> Verified:
    lineage = session.prove_lineage(bundle["lineage"])
    completions, *lineage = session.sign(session.prove(bundle["record"], "record"), *lineage)
    _note_common(session, [completions, *lineage])
    receipt = _check_receipt(session, bundle, completions)
    _check_connected(completions, lineage, _roots(receipt, completions, lineage), complete=False)
    session.checks.append(f"lineage: {len(lineage)} records, each joined to its parents by their leaf hashes")
    _check_adapter(session, receipt, completions, lineage)
    _check_base(session, receipt, lineage)
    return session.finish("receipt", receipt_facts(receipt, completions, [*session.notices, *lineage]))


def _note_common(session: _Session, records: list[ProvedRecord]) -> None:
    assert session.checkpoint is not None
    size, num_erased = session.checkpoint.size, sum(item.record is None for item in records)
    whole = len(records) - num_erased
    witnesses = [] if session.cosigned is None else [f"witnesses: {session.cosigned}"]
    session.checks += [
        f"checkpoint: signed by log {session.checkpoint.origin} over {size} entries",
        *witnesses,
        f"inclusion: {len(records)} records lie in that tree",
        f"commitments: {whole} records match the salted commitments of their leaves",
        f"signatures: {whole} records signed by known keys ({_num_contributors(records)} contributors' own)",
    ]
    if num_erased:
        session.checks.append(
            f"erased: {num_erased} records; their places in the log are proven, their contents are gone"
        )
    session.checks += notice_checks(session.notices, records, session.log_key)


def _num_contributors(records: list[ProvedRecord]) -> int:
    return sum(item.leaf.kind == "contributor" and item.record is not None for item in records)


def _check_receipt(session: _Session, bundle: Mapping[str, Any], completions: ProvedRecord) -> Receipt:
    """The receipt, once its inner path leads to the root in the completions record."""
    try:
        receipt = parse_receipt(bundle["receipt"])
        commitment = receipt_commitment(bundle["receipt"], parse_hex(bundle["salt"], "receipt salt", "receipt"))
    except (ReceiptError, RecordError) as error:
        raise VerifyError("receipt", str(error)) from error
    body = completions.record.body if completions.record is not None else None
    if not isinstance(body, CompletionsBody):
        raise VerifyError("receipt", "the record is not one of completions, or it was erased")
    inner = bundle["inner"]
    if not isinstance(inner, dict) or set(inner) != {"index", "size", "path"} or not isinstance(inner["path"], list):
        raise VerifyError("inner path", "must be an object of index, size, path")
    index, size = inner["index"], inner["size"]
    if type(index) is not int or type(size) is not int or size != body.count:
        raise VerifyError("inner path", f"size {size!r} is not the {body.count} receipts of the record")
    path = [parse_hex(node, "inner path", f"path[{number}]") for number, node in enumerate(inner["path"])]
    try:
        root = root_from_inclusion(hash_leaf(commitment), index, size, path)
    except MerkleError as error:
        raise VerifyError("inner path", str(error)) from error
    if root.hex() != body.root:
        raise VerifyError("inner path", "receipt, salt or path is not what the completions record commits to")
    if receipt.replica != body.replica or not body.first_time_us <= receipt.time_us <= body.last_time_us:
        raise VerifyError("receipt", "its replica or time contradicts the completions record")
    session.checks.append(f"receipt: number {index + 1} of {size} in the batch of replica {receipt.replica}")
    return receipt


def _roots(receipt: Receipt, completions: ProvedRecord, lineage: list[ProvedRecord]) -> set[str]:
    """The lineage records that the receipt names: its makers among the batch's parents, and its publications."""
    parents = set(completions.leaf.parents)
    made = {
        item.leaf_hash for item in lineage if item.leaf_hash in parents and item.makes(receipt.adapter, receipt.base)
    }
    return made | {item.leaf_hash for item in lineage if item.publishes(receipt.adapter)}


def _check_connected(focus: ProvedRecord, lineage: list[ProvedRecord], roots: set[str], *, complete: bool) -> None:
    """Every record is an ancestor of `roots`, every ancestor's parents are there, and parents come first in the log."""
    known = {item.leaf_hash: item for item in [*lineage, focus]}
    reached, waiting = set(roots), list(roots)
    while waiting:
        item = known[waiting.pop()]
        if item is focus and not complete:
            continue
        for parent in item.leaf.parents:
            if parent not in known:
                raise VerifyError(
                    "lineage", f"{item.leaf.kind} record {item.leaf_hash}: its parent {parent} is missing"
                )
            if known[parent].index >= item.index:
                raise VerifyError("lineage", f"{item.leaf.kind} record {item.leaf_hash}: a parent is younger than it")
            if parent not in reached:
                reached.add(parent)
                waiting.append(parent)
    for item in lineage:
        if item.leaf_hash not in reached:
            raise VerifyError("lineage", f"{item.leaf.kind} record {item.leaf_hash}: joined to nothing in this file")


def _check_adapter(session: _Session, receipt: Receipt, completions: ProvedRecord, lineage: list[ProvedRecord]) -> None:
    """The receipt's adapter is the output of an adapter record among the batch's parents, and published."""
    if receipt.adapter is None:
        session.checks.append("adapter: none; the base model answered alone")
        return
    makers = [item for item in lineage if item.leaf.kind == "adapter" and item.makes(receipt.adapter)]
    if receipt.adapter_record is not None:
        makers = [item for item in makers if item.leaf_hash == receipt.adapter_record]
    if not makers:
        raise VerifyError("adapter", f"no adapter record in the lineage made {receipt.adapter} as the receipt says")
    if makers[-1].leaf_hash not in completions.leaf.parents:
        raise VerifyError("adapter", "its record is not among the parents of the completions record")
    record = makers[-1].record
    if record is not None and getattr(record.body, "base", None) != receipt.base:
        raise VerifyError("adapter", "it was trained on another base model than the receipt names")
    session.checks.append(f"adapter: {receipt.adapter} is the output of record {makers[-1].leaf_hash[:16]}")
    if receipt.adapter_name is None:
        return
    names = [item for item in lineage if item.publishes(receipt.adapter, receipt.adapter_name)]
    if not names:
        raise VerifyError("publication", f"no publication in the lineage names this adapter {receipt.adapter_name}")
    session.checks.append(f"publication: {receipt.adapter_name} names that adapter")


def _check_base(session: _Session, receipt: Receipt, lineage: list[ProvedRecord]) -> None:
    """The base model's record, when the log has one, made the receipt's base."""
    makers = [item for item in lineage if item.leaf.kind == "base_model" and item.makes(receipt.base)]
    if makers:
        session.checks.append(f"base model: {receipt.base} is the output of record {makers[-1].leaf_hash[:16]}")
    elif any(item.leaf.kind == "base_model" for item in lineage):
        raise VerifyError("base model", f"the lineage's base model is not {receipt.base}")
    else:
        session.checks.append("base model: its digest stands in the receipt; the log has no record of its origin")


def parse_hex(text: Any, check: str, what: str) -> bytes:
    """Return 32 bytes of lower-case hex."""
    if not isinstance(text, str) or len(text) != 64 or text.lower() != text:
        raise VerifyError(check, f"{what}: must be 64 hex digits")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise VerifyError(check, f"{what}: must be 64 hex digits") from error


def _require_fields(value: Mapping[str, Any], names: set[str]) -> None:
    """The fields are `names`, and `notices` where there are any."""
    if wrong := (set(value) ^ names) - {"notices"}:
        raise VerifyError("file", f"missing or unknown fields: {', '.join(sorted(wrong))}")
