"""What a verified file tells, for people: model, adapter, contributors and their rows, times."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from attribution.bodies import ContributorBody, DatasetBody, KeyRotationBody, RefinementBody
from attribution.log.proved import ProvedRecord
from attribution.receipts import Receipt
from attribution.records import to_plain


def receipt_facts(receipt: Receipt, completions: ProvedRecord, lineage: list[ProvedRecord]) -> dict[str, Any]:
    """Return the facts of a receipt and of where its adapter comes from."""
    return {
        "receipt": receipt.id,
        "time": utc(receipt.time_us),
        "model": receipt.model,
        "adapter_name": receipt.adapter_name,
        "adapter": receipt.adapter,
        "adapter_record": receipt.adapter_record,
        "base": receipt.base,
        "prompt": receipt.prompt_version,
        "request_digest": receipt.request_digest,
        "output_digest": receipt.output_digest,
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": receipt.completion_tokens,
        "finish_reason": receipt.finish_reason,
        "contributors": contributors(lineage),
        "completions_record": completions.leaf_hash,
        "logged": utc(completions.leaf.time_us),
    }


def record_facts(record: ProvedRecord, lineage: list[ProvedRecord]) -> dict[str, Any]:
    """Return the facts of a single record."""
    return {
        "kind": record.leaf.kind,
        "leaf_hash": record.leaf_hash,
        "index": record.index,
        "time": utc(record.leaf.time_us),
        "signed_by": list(record.signers),
        "body": None if record.record is None else to_plain(record.record.body, record.leaf.kind),
        "contributors": contributors([*lineage, record]),
    }


def ancestry_facts(lineage: list[ProvedRecord]) -> dict[str, Any]:
    """Return the facts of the records that a model comes from."""
    artefacts = [item for record in lineage if record.record is not None for item in record.record.outputs]
    return {
        "adapters": {item.name: item.digest for item in artefacts if item.kind == "adapter"},
        "base_models": {item.name: item.digest for item in artefacts if item.kind == "base_model"},
        "contributors": contributors(lineage),
    }


def contributors(records: Iterable[ProvedRecord]) -> list[dict[str, Any]]:
    """Return {"name", "key_id", "num_rows", "num_kept"} per contributor, most kept rows first.

    `num_rows` are the rows of the datasets the contributor signed, `num_kept` those that the refinements kept.
    """
    records = list(records)
    found: dict[str, dict[str, Any]] = {}
    rotations = [item.record.body for item in records if item.record is not None]
    first = {body.key_id: body.old_key_id for body in rotations if isinstance(body, KeyRotationBody)}

    def of(key_id: str) -> dict[str, Any]:
        while key_id in first:  # one person, however often the key was rotated
            key_id = first[key_id]
        return found.setdefault(key_id, {"name": "", "key_id": key_id, "num_rows": 0, "num_kept": 0})

    for item in records:
        body = item.record.body if item.record is not None else None
        if isinstance(body, ContributorBody):
            of(body.key_id)["name"] = body.name
        elif isinstance(body, DatasetBody):
            for key_id in item.signers:
                of(key_id)["num_rows"] += body.num_rows
        elif isinstance(body, RefinementBody):
            for part in body.per_contributor:
                of(part.key_id)["num_kept"] += part.num_kept
    return sorted(found.values(), key=lambda part: (-part["num_kept"], -part["num_rows"], part["name"]))


def utc(time_us: int) -> str:
    """Return a time in microseconds since 1970 as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
