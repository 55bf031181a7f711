"""One offline verification: record proofs against one signed checkpoint, and their keys in log order."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attribution.bodies import NOTICE_KINDS
from attribution.log.facts import utc
from attribution.log.key_history import KeyHistory, LogKey, VoidKeyRecord
from attribution.log.merkle import MerkleError, hash_leaf
from attribution.log.note import Checkpoint, NoteError
from attribution.log.policy import Cosigned, PolicyError
from attribution.log.proof import parse_proof
from attribution.log.proved import ProvedRecord, VerifyError
from attribution.log.trust import Trust
from attribution.records import (
    Leaf,
    Record,
    RecordError,
    Subject,
    canonical_bytes,
    commitment_of,
    named_subjects,
    record_from_envelope,
)

RECORD_PROOF_FIELDS = frozenset({"envelope", "salt", "leaf", "proof"})
MAX_LINEAGE = 10_000
TAKE_AGAIN = "; if the record is new, take its proof again in a few seconds"


@dataclass(frozen=True)
class Verified:
    """What was shown: `kind` is `receipt` or the record's kind, `checks` one sentence each, `facts` for printing."""

    kind: str
    checks: list[str]
    facts: dict[str, Any]


@dataclass
class Session:
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
    withheld: frozenset[str] = frozenset()  # datasets in the lineage that may be signed with a revoked key

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
        notices = {item.leaf_hash for item in self.notices}
        signers: dict[str, tuple[str, ...]] = {}
        for proved, envelope, what in sorted(self.opened.values(), key=lambda item: item[0].index):
            assert proved.record is not None
            try:
                signers[proved.leaf_hash] = self.history.check(proved.index, proved.record, envelope, what)
            except VerifyError as error:
                if not self._leaves_the_rest(proved, error, is_notice=proved.leaf_hash in notices, what=what):
                    raise
        self.history.require_unrevoked()
        self.trust.require_agreement(item for item in self.notices if item.leaf_hash in signers)  # none that is void
        return [replace(item, signers=signers.get(item.leaf_hash, ())) for item in records]

    def _leaves_the_rest(self, proved: ProvedRecord, error: VerifyError, *, is_notice: bool, what: str) -> bool:
        """Whether a record that counts for nothing leaves the rest standing: it brings a key, or is not leant on."""
        if isinstance(error, VoidKeyRecord):
            return is_notice or (proved.leaf.kind == "contributor" and what != "record")
        return error.check == "revoked key" and proved.leaf.kind == "dataset" and proved.leaf_hash in self.withheld

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

    def finish(self, kind: str, facts: dict[str, Any], *, beside: "Session | None" = None) -> Verified:
        """Return the result, with the facts every file has; `beside` verified a second file that goes with it."""
        assert self.checkpoint is not None, "a file holds at least one proof"
        whose = {**({} if beside is None else beside._whose()), **self._whose()}
        common: dict[str, Any] = {
            "log": self.checkpoint.origin,
            "tree_size": self.checkpoint.size,
            "root": self.checkpoint.root.hex(),
            "keys": {str(self.log_key.key): "log", **dict(sorted(whose.items()))},
        }
        if self.trust.digest:
            common["trust"] = self.trust.digest
        if self.cosigned is not None:
            common["witnesses"] = {
                name: utc(time_s * 1_000_000) for name, time_s in sorted(self.cosigned.times.items())
            }
        return Verified(kind, self.checks, {**facts, **common})

    def _whose(self) -> dict[str, str]:
        """Whose the keys are that signed."""
        used = [self.history.keys[key_id] for _, _, key_id, _ in self.history.uses if key_id in self.history.keys]
        return {key.key_id: f"contributor {key.name}" if key.name else key.role for key in used}


def parse_hex(text: Any, check: str, what: str) -> bytes:
    """Return 32 bytes of lower-case hex."""
    if not isinstance(text, str) or len(text) != 64 or text.lower() != text:
        raise VerifyError(check, f"{what}: must be 64 hex digits")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise VerifyError(check, f"{what}: must be 64 hex digits") from error
