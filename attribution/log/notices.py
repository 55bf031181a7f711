"""Notices: records that bear on earlier ones (keys rotated or revoked, records or rows erased), told in sentences."""

from collections.abc import Sequence

from attribution.bodies import KeyRevocationBody, KeyRotationBody, RedactionBody, RowRedactionBody
from attribution.log.facts import utc
from attribution.log.key_history import LogKey
from attribution.log.proved import ProvedRecord


def notice_checks(notices: Sequence[ProvedRecord], records: Sequence[ProvedRecord], log_key: LogKey) -> list[str]:
    """Return one sentence per thing that a reader should know of the records: none where nothing happened."""
    told = []
    if log_key.last_size is not None:
        told.append(
            f"log key: {log_key.key_id[:16]}, in use up to {log_key.last_size} entries and rotated since; "
            "this checkpoint is of its time"
        )
    signers = {key_id for item in records for key_id in item.signers}
    for notice in notices:
        if notice.record is not None:
            told += _sentences(notice, records, signers)
    return told


def _sentences(notice: ProvedRecord, records: Sequence[ProvedRecord], signers: set[str]) -> list[str]:
    assert notice.record is not None
    body, day = notice.record.body, utc(notice.leaf.time_us)
    leaves = {item.leaf_hash: item.leaf.kind for item in records}
    match body:
        case KeyRotationBody() if signers & {body.old_key_id, body.key_id}:
            return [f"rotated: key {body.old_key_id[:16]} of {body.name} gave way to {body.key_id[:16]} on {day}"]
        case KeyRevocationBody() if body.key_id in signers:
            since = utc(body.from_us)
            return [f"revoked: key {body.key_id[:16]} of {body.name} from {since} ({body.reason}); all here is older"]
        case RedactionBody() if body.leaf in leaves:
            return [f"redaction: {leaves[body.leaf]} record {body.leaf[:16]} erased on {day} because: {body.reason}"]
        case RowRedactionBody():
            rows = f"{len(body.lines)} rows" if body.lines else "rows"
            return [
                f"redaction: {rows} of dataset record {body.contribution[:16]} erased on {day} because: {body.reason}"
            ]
    return []
