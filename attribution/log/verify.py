"""Verify a receipt or a record offline: from its bytes and a few trusted keys alone, no log, no network, no Ray.

Every step that succeeds leaves a line in `Verified.checks`; the first that fails raises a VerifyError that names it.
Only light modules are imported here: a typical receipt is verified in a few milliseconds.

A receipt alone shows which adapter answered, and that the log holds it. Where the adapter comes from is shown by an
ancestry, a file of its own that serves for every receipt of that adapter, or by a bundle, which has both in one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attribution.log.facts import ancestry_facts, receipt_facts, record_facts
from attribution.log.merkle import MerkleError
from attribution.log.note import NoteError
from attribution.log.notices import notice_checks
from attribution.log.proved import ProvedRecord, VerifyError
from attribution.log.receipt_checks import (
    check_adapter,
    check_adapter_alone,
    check_base,
    check_connected,
    check_prompt,
    check_receipt,
    roots_of,
)
from attribution.log.session import RECORD_PROOF_FIELDS, Session, Verified
from attribution.log.trust import Trust
from attribution.receipt_file import ANCESTRY_TYPE, FILE_FIELDS, RECEIPT_FILE_TYPE, expanded
from attribution.receipts import RECEIPT_BUNDLE_TYPE, ReceiptError
from attribution.records import RecordError, parse_strict

__all__ = ["RECORD_BUNDLE_TYPE", "Trust", "Verified", "verify_bytes", "verify_file"]

RECORD_BUNDLE_TYPE = "https://trailmark.dev/record-proof/v1"
MAX_FILE_BYTES = 64 << 20
APART = "in a file of its own, or not kept: `--ancestry FILE` checks it too"


def verify_file(path: Path, *, trust: Trust, ancestry: Path | None = None) -> Verified:
    """Verify a receipt, an ancestry or a record proof in a file; VerifyError names the check that failed.

    `ancestry` is a second file, for a receipt that has its adapter's ancestry not in it.
    """
    return verify_bytes(_read(path), trust=trust, ancestry=None if ancestry is None else _read(ancestry))


def verify_bytes(
    data: bytes, *, trust: Trust, ancestry: bytes | None = None, withheld: frozenset[str] = frozenset()
) -> Verified:
    """Verify the bytes of a receipt, an ancestry, a record bundle or a single record proof (JSON, any layout).

    `withheld`: leaf hashes of datasets in the lineage that may be signed with a revoked key, for the caller says itself
    that nothing rests on them.
    """
    value = _parse(data, "file")
    session = Session(trust, trust.history(), withheld=withheld)
    if ancestry is not None and value.get("type") != RECEIPT_FILE_TYPE:
        raise VerifyError("ancestry", f"goes with a receipt of type {RECEIPT_FILE_TYPE}, not with this file")
    if set(value) == RECORD_PROOF_FIELDS:
        return _verify_record(session, value, None)
    kind = value.get("type")
    if kind == RECEIPT_FILE_TYPE:
        return _verify_receipt(session, value, None if ancestry is None else _parse(ancestry, "ancestry"))
    if kind == ANCESTRY_TYPE:
        return _verify_ancestry(trust, value)
    if kind == RECEIPT_BUNDLE_TYPE:
        _require_fields(value, {"type", "receipt", "salt", "inner", "record", "lineage"})
        session.learn_keys(value.get("notices", []))
        return _verify_bundle(session, value)
    if kind == RECORD_BUNDLE_TYPE:
        _require_fields(value, {"type", "record", "lineage"})
        session.learn_keys(value.get("notices", []))
        return _verify_record(session, value["record"], value["lineage"])
    known = ", ".join((RECEIPT_FILE_TYPE, RECEIPT_BUNDLE_TYPE, ANCESTRY_TYPE, RECORD_BUNDLE_TYPE))
    raise VerifyError("file", f"type {kind!r}: none of {known}, nor a single record proof")


def _verify_record(session: Session, value: Any, lineage_values: Any) -> Verified:
    lineage = [] if lineage_values is None else session.prove_lineage(lineage_values)
    record = session.prove(value, "record")
    record, *lineage = session.sign(record, *lineage)
    check_connected(record, lineage, {record.leaf_hash}, complete=lineage_values is not None)
    _note_common(session, [record, *lineage])
    if record.record is None:
        session.checks.append("the record itself was erased; only its place in the log is proven")
    return session.finish(record.leaf.kind, record_facts(record, [*session.notices, *lineage]))


def _verify_receipt(session: Session, value: Mapping[str, Any], ancestry: Mapping[str, Any] | None) -> Verified:
    """Verify a receipt file and, if given, the ancestry that goes with it, which may be of another time."""
    _require_fields(value, set(FILE_FIELDS))
    session.learn_keys(value.get("notices", []))
    try:
        bundle = expanded(value)
    except (ReceiptError, RecordError, NoteError, MerkleError) as error:
        raise VerifyError("receipt", str(error)) from error
    (completions,) = session.sign(session.prove(bundle["record"], "record"))
    _note_common(session, [completions])
    receipt = check_receipt(session, bundle, completions)
    check_prompt(session, receipt, completions)
    if ancestry is None:
        check_adapter_alone(session, receipt, completions)
        return session.finish("receipt", {**receipt_facts(receipt, completions, session.notices), "ancestry": APART})
    other, lineage = _prove_ancestry(session.trust, ancestry)
    session.history.require_unrevoked_by(other.history)
    other.history.require_unrevoked_by(session.history)
    session.checks += [f"ancestry: {check}" for check in other.checks]
    check_connected(completions, lineage, roots_of(receipt, completions, lineage), complete=False)
    session.checks.append(f"lineage: {len(lineage)} records, each joined to its parents by their leaf hashes")
    check_adapter(session, receipt, completions, lineage)
    check_base(session, receipt, lineage)
    facts = receipt_facts(receipt, completions, [*other.notices, *lineage])
    return session.finish("receipt", facts, beside=other)


def _verify_ancestry(trust: Trust, value: Mapping[str, Any]) -> Verified:
    session, lineage = _prove_ancestry(trust, value)
    if not lineage:
        raise VerifyError("ancestry", "holds no record: the log knows nothing of where that model comes from")
    with_children = {parent for item in lineage for parent in item.leaf.parents}
    *rest, newest = lineage
    youngest = {item.leaf_hash for item in lineage} - with_children
    check_connected(newest, rest, youngest, complete=True)
    return session.finish("ancestry", ancestry_facts([*session.notices, *lineage]))


def _prove_ancestry(trust: Trust, value: Mapping[str, Any]) -> tuple[Session, list[ProvedRecord]]:
    """Check the records of an ancestry under its own checkpoint."""
    if value.get("type") != ANCESTRY_TYPE:
        raise VerifyError("ancestry", f"type {value.get('type')!r} is not {ANCESTRY_TYPE}")
    _require_fields(value, {"type", "lineage"})
    session = Session(trust, trust.history())
    session.learn_keys(value.get("notices", []))
    lineage = session.sign(*session.prove_lineage(value["lineage"]))
    if lineage:
        _note_common(session, lineage)
    return session, lineage


def _verify_bundle(session: Session, bundle: Mapping[str, Any]) -> Verified:
    lineage = session.prove_lineage(bundle["lineage"])
    completions, *lineage = session.sign(session.prove(bundle["record"], "record"), *lineage)
    _note_common(session, [completions, *lineage])
    receipt = check_receipt(session, bundle, completions)
    check_prompt(session, receipt, completions)
    check_connected(completions, lineage, roots_of(receipt, completions, lineage), complete=False)
    session.checks.append(f"lineage: {len(lineage)} records, each joined to its parents by their leaf hashes")
    check_adapter(session, receipt, completions, lineage)
    check_base(session, receipt, lineage)
    return session.finish("receipt", receipt_facts(receipt, completions, [*session.notices, *lineage]))


def _note_common(session: Session, records: list[ProvedRecord]) -> None:
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


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise VerifyError("file", f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise VerifyError("file", f"{path}: over {MAX_FILE_BYTES >> 20} MiB; an ancestry has a few hundred kB at most")
    return data


def _parse(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = parse_strict(data, what)
    except RecordError as error:
        raise VerifyError(what, str(error)) from error
    if not isinstance(value, dict):
        raise VerifyError(what, "must be a JSON object")
    return value


def _require_fields(value: Mapping[str, Any], names: set[str]) -> None:
    """The fields are `names`, and `notices` where there are any."""
    if wrong := (set(value) ^ names) - {"notices"}:
        raise VerifyError("file", f"missing or unknown fields: {', '.join(sorted(wrong))}")
