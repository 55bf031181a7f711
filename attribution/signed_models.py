"""Which model signature an adapter has: made at publication, recorded in the log, looked up before it is loaded.

The record binds the P-256 key and the signature to the operator's Ed25519 key: trust.json is all a reader trusts.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attribution.bodies import ModelSignatureBody
from attribution.log.proved import VerifyError
from attribution.model_signature import (
    ALGORITHM,
    FORMAT,
    ModelSignatureError,
    ensure_model_key,
    sign_model,
    verify_model,
)
from attribution.records import Artefact, Party

if TYPE_CHECKING:
    from attribution.log.key_history import KeyHistory
    from attribution.log.trust import Trust
    from attribution.trail import Draft, Entry, Trail

KIND = "model_signature"


@dataclass(frozen=True)
class SignedModel:
    """A recorded model signature: its leaf hash and what the record says."""

    leaf_hash: str
    body: ModelSignatureBody


class SignedModels:
    """The newest model signature of each artefact; every call catches up with the log."""

    def __init__(self, trail: "Trail", trust: "Trust") -> None:
        """Records count when an operator's key that was good at their time signed them; others' are passed over."""
        self._trail, self._trust = trail, trust
        self._newest: dict[str, SignedModel] = {}
        self._cursor = self._num_notices = 0

    def of(self, digest: str) -> SignedModel | None:
        """Return the signature of an artefact, None when it has none."""
        self._trail.refresh()
        size = self._trail.log.size
        notices = self._trail.notices()
        if len(notices) != self._num_notices:  # what a key signed may not count any more
            self._newest, self._cursor, self._num_notices = {}, 0, len(notices)
        keys = self._keys(notices) if self._cursor < size else None
        for entry in self._trail.entries(start=self._cursor, kind=KIND):
            if entry.record is not None and isinstance(entry.record.body, ModelSignatureBody) and _counts(entry, keys):
                self._newest[entry.record.body.digest] = SignedModel(entry.leaf_hash, entry.record.body)
        self._cursor = size
        return self._newest.get(digest)

    def check(self, digest: str, *, is_required: bool = False) -> SignedModel | None:
        """Return the signature of an artefact of the store once it holds, None when there is none.

        The files are not hashed here: check them against the manifest first (Store.get_directory).

        Raises:
            ModelSignatureError: it does not hold, or there is none and `is_required`.
            StoreError: the signature or the manifest is missing or altered.
        """
        signed = self.of(digest)
        if signed is None:
            if is_required:
                raise ModelSignatureError(f"adapter {digest}: has no model signature; run `trailmark sign {digest}`")
            return None
        bundle, manifest = self._trail.store.get_blob(signed.body.signature), self._trail.store.manifest(digest)
        verify_model(bundle, manifest, public_pem=signed.body.public_key)
        return signed

    def _keys(self, notices: "Sequence[Entry]") -> "KeyHistory":
        """The keys as the log's own records have them by now."""
        history = self._trust.history()
        for notice in notices:
            if notice.record is not None and notice.envelope is not None:
                with suppress(VerifyError):  # one that a revocation has condemned teaches nothing
                    history.learn(notice.index, notice.record, notice.envelope)
        return history


def _counts(entry: "Entry", keys: "KeyHistory | None") -> bool:
    assert keys is not None and entry.record is not None and entry.envelope is not None, "there is a new entry"
    try:
        return bool(keys.check(entry.index, entry.record, entry.envelope, KIND))
    except VerifyError:
        return False


def signature_draft(trail: "Trail", digest: str) -> "Draft | Artefact":
    """Return the record to append that signs an adapter directory, or the signature that is recorded already."""
    from attribution.trail import Draft

    key, name = ensure_model_key(trail.home), _name(trail, digest)
    blob = trail.store.put_blob(sign_model(name, trail.store.manifest(digest), key))
    signature = Artefact("signature", name, blob)
    if trail.find(blob) is not None:
        return signature
    return Draft(
        KIND,
        ModelSignatureBody(name, digest, FORMAT, ALGORITHM, key.public_pem, blob),
        inputs=(Artefact("adapter", name, digest),),
        outputs=(signature,),
        contributors=(Party(trail.keys.get("operator").key_id, "operator"),),
    )


def sign(trail: "Trail", digest: str) -> bool:
    """Record a signature of an adapter directory, whose files are checked first; return False when it has it already.

    Raises StoreError when its files are missing or altered.
    """
    trail.store.get_directory(digest)
    draft = signature_draft(trail, digest)
    if isinstance(draft, Artefact):
        return False
    made = trail.find(digest)
    named = [item.leaf_hash for item in trail.registry.list(kind="adapter") if item.digest == digest]
    parents = ([] if made is None else [made.leaf_hash]) + named  # so that its proof also proves the names
    trail.record_many([replace(draft, parents=parents)])
    return True


def _name(trail: "Trail", digest: str) -> str:
    """What the adapter's record calls it, or the digest when that was erased."""
    entry = trail.find(digest)
    outputs = () if entry is None or entry.record is None else entry.record.outputs
    return next((output.name for output in outputs if output.digest == digest), digest)
