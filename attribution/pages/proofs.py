"""What a page needs to prove itself: the proof of each record, a signed checkpoint, the log's keys."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from attribution.log.proof import parse_proof
from attribution.trail import TRUST_FILE, Trail

MAX_PROOFS = 400  # about 2 kB each


def page_proofs(trail: Trail, shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the proofs of the records on a page and of the contributors who signed them.

    {"checkpoint": note, "trust": {"log": verifier key, "keys": {key id: public key in hex}}, "records": {leaf hash:
    {"index", "path" (base64), "envelope", "salt", "leaf"}}}. `shown`: the nodes; one that only counts others has none.
    At most MAX_PROOFS are included, contributors and the newest records first; the page says what it lacks.
    """
    leaves = [node["id"] for node in shown if not node["id"].startswith("more-")]
    headers = {leaf: trail.entry(leaf) for leaf in leaves}
    parents = {parent for entry in headers.values() for parent in entry.leaf.parents}
    signers = [parent for parent in parents - set(leaves) if trail.entry(parent).leaf.kind == "contributor"]
    contributors = [leaf for leaf, entry in headers.items() if entry.leaf.kind == "contributor"]
    newest = sorted(leaves, key=lambda leaf: -headers[leaf].index)
    wanted = list(dict.fromkeys([*contributors, *sorted(signers), *newest]))[:MAX_PROOFS]
    trust = json.loads((trail.home / TRUST_FILE).read_text(encoding="utf-8"))
    records, checkpoint = {}, ""
    for leaf, proof in zip(wanted, trail.proofs(wanted), strict=True):
        parsed = parse_proof(proof["proof"])
        checkpoint = parsed.checkpoint
        place = {"index": parsed.index, "path": [b64encode(sibling).decode() for sibling in parsed.path]}
        records[leaf] = {**place, **{key: proof[key] for key in ("envelope", "salt", "leaf")}}
    return {"checkpoint": checkpoint, "trust": {"log": trust["log"], "keys": trust["keys"]}, "records": records}
