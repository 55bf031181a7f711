"""Records: signed statements of what was done, by whom, from what, with what; and the leaf each leaves in the log.

A record is an in-toto Statement v1 in a DSSE envelope (Ed25519), both in RFC 8785 JSON. Reading enforces the canonical
bytes: whatever would not be written back bit for bit is refused. The log holds only a leaf: a public header and a
salted commitment SHA-256(salt || envelope), so that a record can be erased and its proof stays valid.

Sources: github.com/secure-systems-lab/dsse protocol.md v1.0; in-toto attestation spec/v1/statement.md; RFC 8785.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from hashlib import sha256
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import rfc8785

from attribution.bodies import BODY_OF_KIND, DIGEST_FORMAT, HEX_FORMAT, KINDS, Body, Digest, Hex32
from attribution.canonical import MAX_INTEGER, canonical_json
from attribution.keys import key_id_of, verify_signature
from attribution.log.merkle import hash_leaf
from attribution.log.note import NoteError, decode_base64
from configs.errors import UserError

__all__ = ["KINDS", "Artefact", "Body", "CodeIdentity", "Leaf", "Party", "Record", "RecordError", "Subject"]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = re.compile(r"https://trailmark\.dev/record/([a-z_]+)/v1")
PUBLIC_SUBJECT_KINDS = ("adapter", "base_model")
MAX_ENVELOPE_BYTES = 64 * 1024
MAX_LEAF_BYTES = 65_535  # tlog-tiles: an entry's length is a uint16
SALT_BYTES = 32
LEAF_VERSION = 1
PATTERNS = {DIGEST_FORMAT: re.compile(r"sha256:[0-9a-f]{64}"), HEX_FORMAT: re.compile(r"[0-9a-f]{64}")}
EXPECTED = {DIGEST_FORMAT: "'sha256:' and 64 hex digits", HEX_FORMAT: "64 hex digits"}


class RecordError(UserError):
    """A record, envelope or leaf that is malformed, not canonical or wrongly signed."""


class Signer(Protocol):
    """What an envelope needs of a key."""

    @property
    def key_id(self) -> str: ...

    def sign(self, message: bytes) -> bytes: ...


@dataclass(frozen=True)
class Party:
    """Who took part: a key and a role (contributor, operator, refiner, trainer, ...)."""

    key_id: Hex32
    role: str


@dataclass(frozen=True)
class Artefact:
    """A thing by digest; kind is dataset, refined, adapter, base_model, benchmark, trace, table, receipts, ..."""

    kind: str
    name: str
    digest: Digest


@dataclass(frozen=True)
class CodeIdentity:
    """The code that ran: git commit ('' when unknown), whether it had local changes, the distribution's version."""

    commit: str
    dirty: bool
    version: str


@dataclass(frozen=True)
class Record:
    """One act. `outputs` are the statement's subjects; `config` is the digest of the resolved configuration, if any."""

    kind: str
    contributors: tuple[Party, ...]
    inputs: tuple[Artefact, ...]
    outputs: tuple[Artefact, ...]
    code: CodeIdentity
    environment: Digest
    config: Digest | None
    seed: int
    attempt: int
    parent_attempt: str | None
    time_us: int
    body: Body


@dataclass(frozen=True)
class Subject:
    """An artefact named in a public header: an adapter or a base model, nothing else."""

    kind: str
    digest: Digest

    def __post_init__(self) -> None:
        if self.kind not in PUBLIC_SUBJECT_KINDS:
            raise RecordError(
                f"subject kind {self.kind!r}: a public header names only {' and '.join(PUBLIC_SUBJECT_KINDS)}s, "
                "for the digest of a row, prompt or output could be guessed"
            )


@dataclass(frozen=True)
class Leaf:
    """What the log shows of a record: its kind, time, parents' leaf hashes and a salted commitment."""

    kind: str
    time_us: int
    parents: tuple[Hex32, ...]
    subjects: tuple[Subject, ...]
    commitment: Hex32
    version: int = LEAF_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the leaf as a JSON object."""
        subjects = [{"kind": subject.kind, "digest": subject.digest} for subject in self.subjects]
        return {
            "v": self.version,
            "kind": self.kind,
            "time_us": self.time_us,
            "parents": list(self.parents),
            "subjects": subjects,
            "commitment": self.commitment,
        }

    @classmethod
    def from_json(cls, value: object) -> "Leaf":
        """Return the leaf of a JSON object; RecordError names the field that is wrong."""
        names = {"v", "kind", "time_us", "parents", "subjects", "commitment"}
        if not isinstance(value, dict) or set(value) != names:
            raise RecordError(f"leaf: must be an object of {', '.join(sorted(names))}")
        leaf: Leaf = from_plain(cls, {**{k: v for k, v in value.items() if k != "v"}, "version": value["v"]}, "leaf")
        if leaf.version != LEAF_VERSION:
            raise RecordError(f"leaf: version {leaf.version} is unknown; this program reads version {LEAF_VERSION}")
        _check_kind(leaf.kind)
        return leaf

    def to_bytes(self) -> bytes:
        """Return the RFC 8785 bytes that the log hashes."""
        data = canonical_json(self.to_json())
        if len(data) > MAX_LEAF_BYTES:
            raise RecordError(
                f"leaf of a {self.kind} record: {len(data)} bytes with {len(self.parents)} parents, over the log's "
                f"{MAX_LEAF_BYTES}; combine the inputs in steps, so that each record has fewer parents"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Leaf":
        """Return the leaf of canonical bytes."""
        return cls.from_json(parse_canonical(data, "leaf"))

    @property
    def leaf_hash(self) -> str:
        """The RFC 6962 leaf hash, 64 hex digits: the record's name everywhere."""
        return hash_leaf(self.to_bytes()).hex()


def commitment_of(salt: bytes, envelope: bytes) -> str:
    """Return SHA-256(salt || envelope) in hex; the salt has 32 bytes, so the two cannot run into each other."""
    if len(salt) != SALT_BYTES:
        raise RecordError(f"salt: {len(salt)} bytes, not {SALT_BYTES}")
    return sha256(salt + envelope).hexdigest()


def build_leaf(record: Record, envelope: bytes, *, salt: bytes, parents: Iterable[str]) -> Leaf:
    """Return the public header of a record: adapters and base models among its artefacts are named, nothing else is."""
    return Leaf(record.kind, record.time_us, tuple(parents), named_subjects(record), commitment_of(salt, envelope))


def named_subjects(record: Record) -> tuple[Subject, ...]:
    """Return the artefacts of a record that its public header names, outputs first, each once."""
    artefacts = (*record.outputs, *record.inputs)
    named = [Subject(item.kind, item.digest) for item in artefacts if item.kind in PUBLIC_SUBJECT_KINDS]
    return tuple(dict.fromkeys(named))


def record_to_envelope(record: Record, signer: Signer, *cosigners: Signer) -> bytes:
    """Return the canonical bytes of the signed envelope of a record, one signature for each key.

    RecordError when a field has the wrong type or the envelope would exceed 64 KB.
    """
    return sign_record(record, signer, *cosigners)[0]


def sign_record(record: Record, signer: Signer, *cosigners: Signer) -> tuple[bytes, Record]:
    """As `record_to_envelope`, with the record as it will be read back from the envelope."""
    payload = canonical_json(statement_of(record))
    as_read = _record_of_statement(json.loads(payload))  # what could not be read back is not signed
    message = pre_auth_encoding(payload)
    signatures = [{"keyid": key.key_id, "sig": b64encode(key.sign(message)).decode()} for key in (signer, *cosigners)]
    envelope = canonical_json(
        {"payload": b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
    )
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise RecordError(
            f"{record.kind} record: {len(envelope)} bytes, over the limit of {MAX_ENVELOPE_BYTES}; "
            "put the table in the store (trail.put_table) and name its digest in the record"
        )
    return envelope, as_read


def record_from_envelope(envelope: bytes) -> Record:
    """Return the record of canonical envelope bytes; the signature is not checked here (see `signers_of`)."""
    payload, _ = _open_envelope(envelope)
    return _record_of_statement(parse_canonical(payload, "record"))


def signers_of(envelope: bytes, public_keys: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return the key ids that signed; RecordError unless all did with a key in `public_keys` (id -> 32 bytes)."""
    payload, signatures = _open_envelope(envelope)
    message = pre_auth_encoding(payload)
    for key_id, signature in signatures.items():
        public_bytes = public_keys.get(key_id)
        if public_bytes is None:
            raise RecordError(f"signature: key {key_id} is not trusted")
        if key_id_of(public_bytes) != key_id or not verify_signature(public_bytes, signature, message):
            raise RecordError(f"signature: not made by key {key_id}, or the record was altered")
    return tuple(signatures)


def key_ids_of(envelope: bytes) -> tuple[str, ...]:
    """Return the key ids that an envelope says signed it, unchecked."""
    return tuple(_open_envelope(envelope)[1])


def pre_auth_encoding(payload: bytes) -> bytes:
    """Return DSSE's PAE of a payload of our type: the bytes that are signed."""
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def parse_canonical(data: bytes, what: str) -> Any:
    """Return the JSON value of RFC 8785 bytes without floats; RecordError for any other spelling of it."""
    value = parse_strict(data, what)
    if canonical_bytes(value, what) != data:
        raise RecordError(f"{what}: bytes are not canonical JSON (RFC 8785)")
    return value


def parse_strict(data: bytes | str, what: str) -> Any:
    """Return a JSON value; RecordError for floats, repeated names and anything that is not JSON."""

    def refuse(text: str) -> Any:
        raise RecordError(f"{what}: number {text} is not an integer")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise RecordError(f"{what}: a name occurs twice in one object")
        return value

    try:
        return json.loads(data, parse_float=refuse, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what}: not JSON") from error


def canonical_bytes(value: Any, what: str) -> bytes:
    """Return the RFC 8785 bytes of a JSON value; RecordError when it has none."""
    try:
        return canonical_json(value)
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as error:
        raise RecordError(f"{what}: has no canonical JSON form: {error}") from error


def _open_envelope(envelope: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The payload and the signatures by key id of canonical envelope bytes."""
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise RecordError(f"envelope: {len(envelope)} bytes, over the limit of {MAX_ENVELOPE_BYTES}")
    value = parse_canonical(envelope, "envelope")
    if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
        raise RecordError("envelope: must be an object of payload, payloadType, signatures")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise RecordError(f"envelope: payload type {value['payloadType']!r} is not {PAYLOAD_TYPE}")
    entries = value["signatures"]
    if not isinstance(entries, list) or not entries:
        raise RecordError("envelope: carries no signature")
    signatures = dict(_signature(entry) for entry in entries)
    if len(signatures) != len(entries):
        raise RecordError("envelope: a key signed twice")
    return _decoded(value["payload"], "payload"), signatures


def _signature(entry: object) -> tuple[str, bytes]:
    if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"} or not isinstance(entry["keyid"], str):
        raise RecordError("envelope: a signature must be an object of keyid and sig")
    return entry["keyid"], _decoded(entry["sig"], "signature")


def _decoded(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        raise RecordError(f"envelope: {what} is not text")
    try:
        return decode_base64(text, what=what)
    except NoteError as error:
        raise RecordError(f"envelope: {error}") from error


def statement_of(record: Record) -> dict[str, Any]:
    """Return the in-toto Statement as JSON; an output's kind is an annotation of its resource descriptor."""
    _check_kind(record.kind)
    if type(record.body) is not BODY_OF_KIND[record.kind]:
        raise RecordError(f"{record.kind} record: its body is a {type(record.body).__name__}")
    subject = [
        {
            "name": output.name,
            "digest": {"sha256": output.digest.removeprefix("sha256:")},
            "annotations": {"kind": output.kind},
        }
        for output in record.outputs
    ]
    names = (field.name for field in fields(Record) if field.name not in ("kind", "outputs"))
    predicate = {name: to_plain(getattr(record, name), f"{record.kind}.{name}") for name in names}
    return {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": f"https://trailmark.dev/record/{record.kind}/v1",
        "predicate": predicate,
    }


def _record_of_statement(statement: object) -> Record:
    if not isinstance(statement, dict) or set(statement) != {"_type", "subject", "predicateType", "predicate"}:
        raise RecordError("record: must be an in-toto statement of _type, subject, predicateType, predicate")
    if statement["_type"] != STATEMENT_TYPE:
        raise RecordError(f"record: _type {statement['_type']!r} is not {STATEMENT_TYPE}")
    match = PREDICATE_TYPE.fullmatch(str(statement["predicateType"]))
    if match is None:
        raise RecordError(f"record: predicateType {statement['predicateType']!r} is unknown to this version")
    kind = match.group(1)
    _check_kind(kind)
    predicate, subject = statement["predicate"], statement["subject"]
    if not isinstance(predicate, dict) or not isinstance(subject, list):
        raise RecordError("record: predicate must be an object, subject a list")
    if "kind" in predicate or "outputs" in predicate:
        raise RecordError("record: predicate holds an unknown field")
    outputs = [_output(entry) for entry in subject]
    value = {**predicate, "kind": kind, "outputs": outputs}
    body = from_plain(BODY_OF_KIND[kind], value.pop("body", None), f"{kind}.body")
    types = {name: hint for name, hint in _hints(Record).items() if name != "body"}
    decoded = _decode_fields(types, value, kind)
    return Record(**decoded, body=body)


def _output(entry: Any) -> dict[str, Any]:
    match entry:
        case {"name": name, "digest": {"sha256": str(hexadecimal)}, "annotations": {"kind": kind}} if len(entry) == 3:
            if len(entry["digest"]) == 1 and len(entry["annotations"]) == 1:
                return {"kind": kind, "name": name, "digest": f"sha256:{hexadecimal}"}
    raise RecordError("record: a subject must have name, digest.sha256 and annotations.kind")


def _check_kind(kind: str) -> None:
    if kind not in BODY_OF_KIND:
        raise RecordError(f"record kind {kind!r}: unknown; kinds: {', '.join(KINDS)}")


def to_plain(value: object, where: str) -> Any:
    """Return a frozen record value as JSON types; RecordError names a field that has none."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INTEGER:
        raise RecordError(f"{where} = {value}: beyond 2^53 - 1, which JSON cannot carry exactly")
    if value is None or isinstance(value, str | bool | int):
        return value
    hint = "; use micro-units (value * 1e6, rounded)" if isinstance(value, float) else ""
    raise RecordError(f"{where} = {value!r}: a {type(value).__name__} cannot stand in a record{hint}")


def from_plain(hint: Any, value: Any, where: str) -> Any:
    """Return `value` (JSON types) as type `hint`: a frozen dataclass, tuple, literal, optional or scalar."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _decode_format(hint, value, where)
    if origin in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        return None if value is None else from_plain(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{where}: must be a list")
        return tuple(from_plain(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Literal:
        if value not in get_args(hint):
            raise RecordError(f"{where} = {value!r}: must be one of {', '.join(get_args(hint))}")
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecordError(f"{where}: must be an object")
        construct: Callable[..., Any] = hint
        return construct(**_decode_fields(_hints(hint), value, where))
    if type(value) is not hint or (hint is int and abs(value) > MAX_INTEGER):
        raise RecordError(f"{where} = {value!r}: must be {hint.__name__}")
    return value


def _decode_format(hint: Any, value: Any, where: str) -> str:
    form = get_args(hint)[1]
    if not isinstance(value, str) or not PATTERNS[form].fullmatch(value):
        raise RecordError(f"{where} = {value!r}: must be {EXPECTED[form]}")
    return value


def _decode_fields(types: Mapping[str, Any], value: Mapping[str, Any], where: str) -> dict[str, Any]:
    if set(value) != set(types):
        wrong = sorted(set(value) ^ set(types))
        raise RecordError(f"{where}: missing or unknown fields: {', '.join(wrong)}")
    return {name: from_plain(hint, value[name], f"{where}.{name}") for name, hint in types.items()}


@lru_cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)
