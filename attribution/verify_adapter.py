"""Verify an adapter offline: its files against their digest, its model signature, and its place in the log.

From a folder, the signature and proof beside it and a few trusted keys; no network, no Ray, no log, no model_signing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attribution.bodies import AdapterBody, Body, ModelSignatureBody, PublicationBody
from attribution.log.proved import VerifyError
from attribution.log.verify import MAX_FILE_BYTES, Trust, Verified, verify_bytes
from attribution.model_signature import ALGORITHM, FORMAT, ModelSignatureError, verify_model
from attribution.records import canonical_bytes, parse_strict, record_from_envelope
from attribution.store import Manifest, StoreError, digest_of, open_directory

SIGNATURE_FILE, PROOF_FILE, PROOF_SUFFIX = "model.sig", "proof.json", ".proof.json"


def verify_adapter(
    folder: Path, *, trust: Trust, signature: Path | None = None, proofs: Sequence[Path] = ()
) -> Verified:
    """Verify an adapter folder that was exported or copied out of a store.

    `signature` defaults to model.sig beside the folder, `proofs` (record bundles) to proof.json and the *.proof.json
    there. VerifyError names the failed check.
    """
    beside = folder.resolve().parent
    proofs = proofs or [beside / PROOF_FILE, *sorted(beside.glob(f"*{PROOF_SUFFIX}"))]
    if not proofs[0].is_file():
        raise VerifyError("proof", f"{proofs[0]}: not found; export it with the adapter, or give it with --proof")
    signature = signature or beside / SIGNATURE_FILE
    bundle = _read(signature, "model signature") if signature.is_file() else None
    return verify_parts(folder, bundle=bundle, proofs=[_read(proof, "proof") for proof in proofs], trust=trust)


def verify_adapter_of(home: Path, reference: str, *, trust: Trust) -> Verified:
    """Verify an adapter of a home by NAME, NAME@VERSION or digest, as a stranger would who was sent the files."""
    from attribution.exports.dossier import gather
    from attribution.lineage import record_bundle
    from attribution.trail import Trail

    trail = Trail.open(home, create=False)
    dossier = gather(trail, reference)
    proofs = [json.dumps(record_bundle(trail, leaf)).encode() for leaf in dossier.proofs.values()]
    try:
        bundle = None if dossier.signature is None else trail.store.get_blob(dossier.signature[1].signature)
        folder = trail.store.path_of(dossier.digest)
    except StoreError as error:
        raise VerifyError("files", str(error)) from error
    return verify_parts(folder, bundle=bundle, proofs=proofs, trust=trust)


def verify_parts(folder: Path, *, bundle: bytes | None, proofs: Sequence[bytes], trust: Trust) -> Verified:
    """Verify a folder against the bytes of its model signature, if there is one, and of its record proofs.

    The first proof's facts are the ones told; of the others the records count, once they are verified.
    """
    try:
        digest, manifest = open_directory(folder)
    except (StoreError, OSError) as error:
        raise VerifyError("files", str(error)) from error
    verified, *_ = [verify_bytes(proof, trust=trust) for proof in proofs]
    bodies = _bodies(proofs, digest)
    trained = [body.name for body in bodies if isinstance(body, AdapterBody)]
    names = [f"{body.name}@{body.version}" for body in bodies if isinstance(body, PublicationBody)]
    if not trained and not names:
        raise VerifyError("adapter", f"the proof speaks of another adapter: none of its records made {digest}")
    checks = [f"files: {len(manifest.files)} files have the digests of their manifest, {digest}", *verified.checks]
    checks += [f"adapter: that directory is the output of the training record of {name}" for name in trained]
    checks += [f"publication: {name} names that adapter" for name in names]
    signatures = [body for body in bodies if isinstance(body, ModelSignatureBody)]
    checks.append(_check_signature(bundle, manifest, signatures))
    facts: dict[str, Any] = {"adapter": digest, "published_as": ", ".join(names) or None}
    kept = ("time", "contributors", "log", "tree_size", "root", "keys")
    return Verified("adapter", checks, {**facts, **{name: verified.facts[name] for name in kept}})


def _check_signature(bundle: bytes | None, manifest: Manifest, recorded: Sequence[ModelSignatureBody]) -> str:
    """The sentence that says what is known of the model signature, which the log's record vouches for."""
    if not recorded:
        if bundle is not None:
            raise VerifyError("model signature", "the proof holds no record that vouches for the key it was made with")
        return "model signature: none; the proof holds no record of one"
    if bundle is None:
        raise VerifyError(
            "model signature", f"missing, and the log records one; give {SIGNATURE_FILE} with --signature"
        )
    found = next((body for body in recorded if body.signature == digest_of(bundle)), None)
    if found is None:
        raise VerifyError("model signature", f"is not the one that the log records, {recorded[-1].signature}")
    if (found.format, found.algorithm) != (FORMAT, ALGORITHM):
        raise VerifyError("model signature", f"of a kind this version does not know: {found.format}, {found.algorithm}")
    try:
        num_files = verify_model(bundle, manifest, public_pem=found.public_key)
    except ModelSignatureError as error:
        raise VerifyError("model signature", str(error)) from error
    return f"model signature: {num_files} files signed by the P-256 key that the log records"


def _bodies(proofs: Iterable[bytes], digest: str) -> list[Body]:
    """What verified proofs say of an adapter: the bodies of the records that made, named or signed it, each once."""
    found: dict[Body, None] = {}
    for proof in proofs:
        value = parse_strict(proof, "proof")
        for item in [*value.get("lineage", ()), value.get("record", value)]:
            if item["envelope"] is None:
                continue  # erased
            record = record_from_envelope(canonical_bytes(item["envelope"], "envelope"))
            named = [output.digest for output in record.outputs] + [getattr(record.body, "digest", "")]
            if digest in named:
                found[record.body] = None
    return list(found)


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise VerifyError(what, f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise VerifyError(what, f"{path}: over {MAX_FILE_BYTES >> 20} MiB")
    return data
