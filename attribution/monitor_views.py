"""Does every view say what the log says? Registry, trust.json, both indexes and, where it answers, MLflow."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from attribution.bodies import KeyRevocationBody, KeyRotationBody, PublicationBody
from attribution.lineage_index import LineageIndex
from attribution.log.note import NoteKey
from attribution.monitor import Report
from attribution.receipt_index import Place, ReceiptIndex
from attribution.receipts import ReceiptError, completion_rows
from attribution.trust_file import TrustFile
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Trail


def check_views(trail: "Trail", report: Report, *, mlflow_uri: str | None = None) -> None:
    """Add to `report` every way in which a view departs from the log; MLflow is asked when its address is given."""
    checks: dict[str, Callable[[Trail, Report], None]] = {
        "registry": _check_registry,
        "trust": _check_trust,
        "receipts": _check_receipts,
        "lineage": _check_lineage,
    }
    if mlflow_uri is not None:
        checks["mlflow"] = partial(_check_mlflow, uri=mlflow_uri)
    for name, check in checks.items():
        try:
            check(trail, report)
        except UserError as error:  # a record under the view was altered, or MLflow does not answer
            report.add(f"view {name}", None, f"cannot be compared: {error}")


def _check_registry(trail: "Trail", report: Report) -> None:
    """The first publication of each name and version stands, unless what it names was erased."""
    expected: dict[tuple[str, int], str] = {}
    for entry in trail.entries(kind="publication"):
        if entry.record is not None and isinstance(entry.record.body, PublicationBody):
            body = entry.record.body
            if trail.find(body.digest) is not None:
                expected.setdefault((body.name, body.version), body.digest)
    actual = {(item.name, item.version): item.digest for item in trail.registry.list()}
    report.count("view registry", len(expected))
    for name, version in sorted(expected.items() ^ actual.items()):
        report.add("view registry", None, f"{name[0]}@{name[1]}: {version} stands on one side only")


def _check_trust(trail: "Trail", report: Report) -> None:
    """trust.json names the log's and the operator's newest keys, and every revocation."""
    value = TrustFile(trail.home).read()
    revoked = {(item["key_id"], item["from_us"]) for item in value.get("revoked", [])}
    newest: dict[str, str] = {}
    for entry in trail.notices():
        body = entry.record.body if entry.record is not None else None
        report.count("view trust", isinstance(body, KeyRotationBody | KeyRevocationBody))
        if isinstance(body, KeyRevocationBody) and (body.key_id, body.from_us) not in revoked:
            report.add("view trust", entry.index, f"trust.json does not have the revocation of key {body.key_id[:16]}")
        elif isinstance(body, KeyRotationBody):
            newest[body.role] = body.public_key
    named = {"log": NoteKey.parse(value["log"]).public_bytes.hex(), "operator": "".join(value["keys"].values())}
    for role, public_hex in named.items():
        if newest.get(role, public_hex) != public_hex:
            report.add("view trust", None, f"trust.json does not name the newest {role} key")


def _check_receipts(trail: "Trail", report: Report) -> None:
    """Every receipt of every batch stands in the index, at its place, and nothing else does."""
    index = ReceiptIndex(trail)
    if not index.exists:
        return
    expected: dict[str, Place] = {}
    for entry in trail.entries(kind="completions"):
        try:
            rows = completion_rows(trail, entry)
        except (ReceiptError, UserError) as error:
            report.add("view receipts", entry.index, str(error))
            continue
        for number, row in enumerate(rows):
            expected.setdefault(row.receipt["id"], Place(row.receipt["id"], entry.leaf_hash, number))
    actual = index.all()
    report.count("view receipts", len(expected))
    for receipt_id in sorted(expected.keys() | actual.keys()):
        if expected.get(receipt_id) != actual.get(receipt_id):
            problem = "is missing" if receipt_id not in actual else "is not what the log has"
            report.add("view receipts", None, f"{receipt_id} {problem} in the index; remove HOME/views/receipts.sqlite")


def _check_lineage(trail: "Trail", report: Report) -> None:
    """The index of lineage, if anybody asked it yet, is what the log makes of it."""
    index = LineageIndex(trail.home, trail.log.key)
    if not index.path.exists():
        return
    report.count("view lineage")
    for problem in index.check():
        report.add("view lineage", None, f"{problem}; `trailmark lineage check --rebuild` makes it anew")


def _check_mlflow(trail: "Trail", report: Report, uri: str) -> None:
    """The same comparison as `trailmark mlflow reconcile --no-repair`."""
    from attribution.mlflow_view import MlflowView

    view = MlflowView(trail, uri)
    try:
        report.count("view mlflow")
        for item in view.reconcile(repair=False):
            report.add("view mlflow", None, f"{item.problem} {item.role} of {item.leaf[:16]}: {item.detail}")
    finally:
        view.close()
