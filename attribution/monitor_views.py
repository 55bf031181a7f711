"""Does every view say what the log says? Registry, trust.json, the three indexes and, where it answers, MLflow."""

import sqlite3
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from attribution.bodies import KeyRevocationBody, KeyRotationBody, PublicationBody
from attribution.keys import key_id_of
from attribution.lineage import Lineage
from attribution.lineage_index import LineageIndex
from attribution.log.note import NoteKey
from attribution.monitor import Report
from attribution.receipt_index import Place, ReceiptIndex
from attribution.receipts import ReceiptError, completion_rows
from attribution.search_index import SearchIndex
from attribution.trust_file import TrustFile
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Trail

NOT_MADE = "nobody has asked it yet, so there is none; the next question makes it from the log"


def check_views(
    trail: "Trail", report: Report, *, mlflow_uri: str | None = None, no_mlflow: str = "no address of it was given"
) -> None:
    """Add to `report` every way in which a view departs from the log, and of each view whether it was compared.

    MLflow is asked when its address is given; else `no_mlflow` says why it is not.
    """
    checks: dict[str, Callable[[Trail, Report], str | None]] = {
        "registry": _check_registry,
        "trust": _check_trust,
        "receipts": _check_receipts,
        "lineage": _check_lineage,
        "search": _check_search,
        "mlflow": (lambda trail, report: no_mlflow) if mlflow_uri is None else partial(_check_mlflow, uri=mlflow_uri),
    }
    for name, check in checks.items():
        num_before = len(report.violations)
        try:
            omitted = check(trail, report)
        except (UserError, sqlite3.OperationalError) as error:  # a record was altered, or the view does not answer
            omitted = str(error)
            report.add(f"view {name}", None, f"cannot be compared: {error}")
        num_found = len(report.violations) - num_before
        told = f"differs from the log: {num_found} found" if num_found else "equals the log"
        report.views[name] = told if omitted is None else f"not compared: {omitted}"


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
    """trust.json names the log's and the operator's newest keys, and says of the others what the log's records say."""
    value = TrustFile(trail.home).read()
    log = NoteKey.parse(value["log"])
    told = {_told(entry) for entry in (*value.get("former", []), *value.get("revoked", []))}
    proven: dict[tuple[str, str, Any], int] = {}
    newest: dict[str, str] = {}
    is_whole = True
    for entry in trail.notices():
        body = entry.record.body if entry.record is not None else None
        is_whole &= body is not None
        report.count("view trust", isinstance(body, KeyRotationBody | KeyRevocationBody))
        if isinstance(body, KeyRevocationBody):
            proven[body.key_id, "revocation", (body.from_us, body.reason)] = entry.index
        elif isinstance(body, KeyRotationBody):
            newest[body.role] = body.public_key
            if body.role != "contributor":
                end = entry.index + 1 if body.role == "log" else entry.leaf.time_us
                proven[body.old_key_id, "rotation", end] = entry.index
    for key_id, what, detail in sorted(proven.keys() - told):
        index = proven[key_id, what, detail]
        report.add("view trust", index, f"trust.json does not have the {what} of key {key_id[:16]}, or not as it is")
    for key_id, what, _ in sorted(told - proven.keys()) if is_whole else ():
        report.add("view trust", None, f"trust.json has a {what} of key {key_id[:16]} that no record of the log tells")
    named = {"log": log.public_bytes.hex(), "operator": "".join(value["keys"].values())}
    for role, public_hex in named.items():
        if newest.get(role, public_hex) != public_hex:
            report.add("view trust", None, f"trust.json does not name the newest {role} key")


def _told(entry: Mapping[str, Any]) -> tuple[str, str, Any]:
    """What an entry of trust.json says: of which key, what happened, and when (and why)."""
    if "from_us" in entry:
        return entry["key_id"], "revocation", (entry["from_us"], entry["reason"])
    if entry["role"] == "log":
        return key_id_of(NoteKey.parse(entry["log"]).public_bytes), "rotation", entry["last_size"]
    return entry["key_id"], "rotation", entry["until_us"]


def _check_receipts(trail: "Trail", report: Report) -> str | None:
    """Every receipt of every batch stands in the index, at its place, and nothing else does."""
    index = ReceiptIndex(trail)
    if not index.exists:
        return NOT_MADE
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
    return None


def _check_lineage(trail: "Trail", report: Report) -> str | None:
    """The index of lineage, if anybody asked it yet, is what the log makes of it."""
    index = LineageIndex(trail.home, trail.log.key)
    if not index.path.exists():
        return NOT_MADE
    report.count("view lineage")
    for problem in index.check():
        report.add("view lineage", None, f"{problem}; `trailmark lineage check --rebuild` makes it anew")
    return None


def _check_search(trail: "Trail", report: Report) -> str | None:
    """The index behind the whole-graph search, if anybody searched yet, is what the log makes of it."""
    index = SearchIndex(trail, Lineage(trail))
    if not index.exists:
        return NOT_MADE
    report.count("view search", trail.log.size)
    for problem in index.check():
        report.add("view search", None, f"{problem}; remove HOME/views/search.sqlite")
    return None


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
