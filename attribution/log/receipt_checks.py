"""The checks of a receipt: its place in its batch, and where its adapter and base model come from."""

from collections.abc import Mapping
from typing import Any

from attribution.bodies import CompletionsBody
from attribution.log.merkle import MerkleError, hash_leaf, root_from_inclusion
from attribution.log.proved import ProvedRecord, VerifyError
from attribution.log.session import Session, parse_hex
from attribution.receipts import Receipt, ReceiptError, parse_receipt, receipt_commitment
from attribution.records import RecordError


def check_receipt(session: Session, bundle: Mapping[str, Any], completions: ProvedRecord) -> Receipt:
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


def roots_of(receipt: Receipt, completions: ProvedRecord, lineage: list[ProvedRecord]) -> set[str]:
    """The lineage records that the receipt names: its makers among the batch's parents, and its publications."""
    parents, prompt = set(completions.leaf.parents), prompt_of(receipt, completions)
    made = {
        item.leaf_hash
        for item in lineage
        if item.leaf_hash in parents and item.makes(receipt.adapter, receipt.base, prompt)
    }
    return made | {item.leaf_hash for item in lineage if item.publishes(receipt.adapter) or item.publishes(prompt)}


def prompt_of(receipt: Receipt, completions: ProvedRecord) -> str | None:
    """Return the digest of the prompt version that a receipt names; None when its batch's record does not have it."""
    if receipt.prompt_version is None or completions.record is None:
        return None
    inputs = completions.record.inputs
    found = [item.digest for item in inputs if (item.kind, item.name) == ("prompt", receipt.prompt_version)]
    return found[0] if found else None


def check_prompt(session: Session, receipt: Receipt, completions: ProvedRecord) -> None:
    """Tell which prompt the receipt names, when the batch's record has it as an input."""
    if (digest := prompt_of(receipt, completions)) is not None:
        session.checks.append(f"prompt: {receipt.prompt_version} is {digest}, named by the batch's record")


def check_connected(focus: ProvedRecord, lineage: list[ProvedRecord], roots: set[str], *, complete: bool) -> None:
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


def check_adapter(session: Session, receipt: Receipt, completions: ProvedRecord, lineage: list[ProvedRecord]) -> None:
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


def check_adapter_alone(session: Session, receipt: Receipt, completions: ProvedRecord) -> None:
    """The signed record of the batch names the receipt's adapter and base; where they come from is not shown."""
    assert completions.record is not None, "check_receipt read its body"
    named = {(item.kind, item.digest) for item in completions.record.inputs}
    if ("base_model", receipt.base) not in named:
        raise VerifyError("base model", f"{receipt.base} is not among the inputs of the completions record")
    session.checks.append(f"base model: {receipt.base} is named by the batch's record")
    if receipt.adapter is None:
        session.checks.append("adapter: none; the base model answered alone")
        return
    if ("adapter", receipt.adapter) not in named:
        raise VerifyError("adapter", f"{receipt.adapter} is not among the inputs of the completions record")
    if receipt.adapter_record is not None and receipt.adapter_record not in completions.leaf.parents:
        raise VerifyError("adapter", "its record is not among the parents of the completions record")
    made = f", made by record {receipt.adapter_record[:16]}" if receipt.adapter_record else ""
    session.checks.append(f"adapter: {receipt.adapter} is named by the batch's record{made}")


def check_base(session: Session, receipt: Receipt, lineage: list[ProvedRecord]) -> None:
    """The base model's record, when the log has one, made the receipt's base."""
    makers = [item for item in lineage if item.leaf.kind == "base_model" and item.makes(receipt.base)]
    if makers:
        session.checks.append(f"base model: {receipt.base} is the output of record {makers[-1].leaf_hash[:16]}")
    elif any(item.leaf.kind == "base_model" for item in lineage):
        raise VerifyError("base model", f"the lineage's base model is not {receipt.base}")
    else:
        session.checks.append("base model: its digest stands in the receipt; the log has no record of its origin")
