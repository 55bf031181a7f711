"""Records, envelopes and leaves: golden bytes, canonical form enforced, what may not be signed."""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from attribution.bodies import BODY_OF_KIND, KINDS, ApprovalBody, InfluenceBody, RuleUse, Share, WorkflowRunBody
from attribution.keys import SigningKey
from attribution.records import (
    MAX_ENVELOPE_BYTES,
    Artefact,
    CodeIdentity,
    Leaf,
    Party,
    Record,
    RecordError,
    Subject,
    build_leaf,
    commitment_of,
    from_plain,
    record_from_envelope,
    record_to_envelope,
    signers_of,
    to_plain,
)
from tests.attribution.story import GOLDEN, golden_files

KEY = SigningKey.from_seed("operator", bytes(range(32)))
DIGEST = "sha256:" + "ab" * 32
RECORD = Record(
    kind="approval",
    contributors=(Party(KEY.key_id, "operator"),),
    inputs=(Artefact("benchmark", "held out", DIGEST),),
    outputs=(Artefact("adapter", "support", DIGEST),),
    code=CodeIdentity("0" * 40, False, "0.1.0"),
    environment=DIGEST,
    config=None,
    seed=0,
    attempt=1,
    parent_attempt=None,
    time_us=1_795_000_000_000_000,
    body=ApprovalBody(DIGEST, "approved", "good — très bon"),
)


def test_golden_files(tmp_path: Path) -> None:
    """The formats that leave the system do not change: regenerate only with a new version in the format."""
    made = golden_files(tmp_path / "home")
    assert sorted(made) == sorted(path.name for path in GOLDEN.iterdir() if path.name in made)
    for name, data in made.items():
        assert data == (GOLDEN / name).read_bytes(), name


def test_round_trip() -> None:
    envelope = record_to_envelope(RECORD, KEY)
    assert record_from_envelope(envelope) == RECORD
    assert signers_of(envelope, {KEY.key_id: KEY.public_bytes}) == (KEY.key_id,)
    statement = json.loads(b64decode(json.loads(envelope)["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://trailmark.dev/record/approval/v1"
    assert statement["subject"][0]["digest"] == {"sha256": "ab" * 32}


def test_securesystemslib_reads_and_verifies_our_envelope() -> None:
    envelope = record_to_envelope(RECORD, KEY)
    theirs = Envelope.from_dict(json.loads(envelope))
    key = SSlibKey(KEY.key_id, "ed25519", "ed25519", {"public": KEY.public_hex})
    assert list(theirs.verify([key], 1)) == [KEY.key_id]
    assert rfc8785.dumps(theirs.to_dict()) == envelope


def test_every_kind_has_a_body_that_round_trips() -> None:
    samples: dict[Any, Any] = {int: 3, str: "text", bool: True}

    def sample(hint: Any) -> Any:
        origin, arguments = getattr(hint, "__origin__", None), getattr(hint, "__args__", ())
        if hasattr(hint, "__metadata__"):
            return DIGEST if hint.__metadata__[0] == "digest" else "cd" * 32
        if origin is tuple:
            return (sample(arguments[0]),)
        if arguments:
            return arguments[0]
        if hint in samples:
            return samples[hint]
        return hint(**{name: sample(inner) for name, inner in _hints(hint).items()})

    assert tuple(BODY_OF_KIND) == KINDS
    for kind, body_type in BODY_OF_KIND.items():
        body = sample(body_type)
        record = replace(RECORD, kind=kind, body=body)
        assert record_from_envelope(record_to_envelope(record, KEY)) == record
        assert from_plain(body_type, to_plain(body, kind), kind) == body


def _hints(cls: Any) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(cls, include_extras=True)


def _change_payload(envelope: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    value = json.loads(envelope)
    statement = json.loads(b64decode(value["payload"]))
    change(statement)
    value["payload"] = b64encode(rfc8785.dumps(statement)).decode()
    return rfc8785.dumps(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["predicate"].pop("seed"), "seed"),
        (lambda s: s["predicate"].update(extra=1), "extra"),
        (lambda s: s["predicate"].update(seed="0"), "seed"),
        (lambda s: s["predicate"].update(seed=True), "seed"),
        (lambda s: s["predicate"]["body"].update(subject="ab" * 32), "subject"),
        (lambda s: s["predicate"]["body"].update(decision="maybe"), "decision"),
        (lambda s: s["predicate"].update(kind="approval"), "unknown field"),
        (lambda s: s["subject"][0].pop("annotations"), "subject"),
        (lambda s: s["subject"][0]["digest"].update(sha512="00"), "subject"),
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "_type"),
        (lambda s: s.update(predicateType="https://trailmark.dev/record/approval/v2"), "predicateType"),
        (lambda s: s.update(predicateType="https://trailmark.dev/record/approvals/v1"), "unknown"),
        (lambda s: s.update(subject={}), "list"),
    ],
)
def test_malformed_statements_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record_from_envelope(_change_payload(record_to_envelope(RECORD, KEY), change))


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.replace(b'","', b'", "', 1),
        lambda e: e + b"\n",
        lambda e: b" " + e,
        lambda e: e.replace(b'"keyid":', b'"keyi\\u0064":'),
        lambda e: e.replace(b'{"payload":', b'{"x":1,"payload":'),
        lambda e: e.replace(b"in-toto+json", b"in-toto"),
        lambda e: b"[]",
        lambda e: b"\xff",
    ],
)
def test_other_spellings_of_an_envelope_are_refused(change: Callable[[bytes], bytes]) -> None:
    envelope = record_to_envelope(RECORD, KEY)
    changed = change(envelope)
    assert changed != envelope
    with pytest.raises(RecordError):
        record_from_envelope(changed)


def test_payload_bytes_must_be_canonical_too() -> None:
    value = json.loads(record_to_envelope(RECORD, KEY))
    payload = b64decode(value["payload"])
    for other in (payload.replace(b'":', b'": ', 1), payload.replace(b'"seed":0', b'"seed":0.0')):
        value["payload"] = b64encode(other).decode()
        with pytest.raises(RecordError, match=r"canonical|integer"):
            record_from_envelope(rfc8785.dumps(value))


def test_signatures() -> None:
    envelope = record_to_envelope(RECORD, KEY)
    other = SigningKey.from_seed("other", bytes(32))
    with pytest.raises(RecordError, match="not trusted"):
        signers_of(envelope, {other.key_id: other.public_bytes})
    with pytest.raises(RecordError, match="not made by key"):
        signers_of(envelope, {KEY.key_id: other.public_bytes})
    changed = _change_payload(envelope, lambda statement: statement["predicate"].update(seed=1))
    with pytest.raises(RecordError, match="altered"):
        signers_of(changed, {KEY.key_id: KEY.public_bytes})
    value = json.loads(envelope)
    for signatures in ([], value["signatures"] * 2, [{"keyid": 1, "sig": ""}]):
        with pytest.raises(RecordError):
            record_from_envelope(rfc8785.dumps({**value, "signatures": signatures}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (replace(RECORD, seed=0.5), r"approval\.seed = 0\.5: a float .*micro-units"),
        (replace(RECORD, seed=2**53), "2\\^53"),
        (replace(RECORD, kind="approvals"), "unknown; kinds: contributor"),
        (replace(RECORD, kind="benchmark"), "its body is a ApprovalBody"),
        (replace(RECORD, environment="none"), "environment"),
        (replace(RECORD, body=ApprovalBody("x", "approved", "")), r"approval\.body\.subject = 'x'"),
        (replace(RECORD, parent_attempt=3), "parent_attempt"),
        (
            replace(RECORD, body=ApprovalBody(DIGEST, "approved", "x" * MAX_ENVELOPE_BYTES)),
            "put the table in the store",
        ),
    ],
)
def test_what_cannot_be_signed(record: Record, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record_to_envelope(record, KEY)


def test_nested_lists_name_the_element_that_is_wrong() -> None:
    body = InfluenceBody("rcpt_1", "ab" * 32, "tracin", DIGEST, (Share("ab" * 32, 1, 0, 2), Share("no", 1, 0, 2)))
    with pytest.raises(RecordError, match=r"influence\.body\.top\[1\]\.key_id = 'no'"):
        record_to_envelope(replace(RECORD, kind="influence", body=body), KEY)
    with pytest.raises(RecordError, match="must be a list"):
        from_plain(WorkflowRunBody, {"name": "n", "status": "s", "steps": "abc"}, "workflow_run")
    with pytest.raises(RecordError, match="must be an object"):
        from_plain(RuleUse, [], "rule")


def test_a_public_header_names_only_adapters_and_base_models() -> None:
    artefacts = tuple(
        Artefact(kind, kind, DIGEST) for kind in ("dataset", "adapter", "table", "base_model", "receipts")
    )
    envelope = record_to_envelope(record := replace(RECORD, outputs=artefacts, inputs=artefacts), KEY)
    leaf = build_leaf(record, envelope, salt=bytes(32), parents=())
    assert [subject.kind for subject in leaf.subjects] == ["adapter", "base_model"]
    with pytest.raises(RecordError, match="could be guessed"):
        Subject("dataset", DIGEST)
    tampered = {**leaf.to_json(), "subjects": [{"kind": "prompt", "digest": DIGEST}]}
    with pytest.raises(RecordError, match="could be guessed"):
        Leaf.from_json(tampered)


def test_nothing_private_can_be_read_or_guessed_from_a_leaf() -> None:
    envelope = record_to_envelope(RECORD, KEY)
    one = build_leaf(RECORD, envelope, salt=bytes(32), parents=())
    two = build_leaf(RECORD, envelope, salt=b"\x01" * 32, parents=())
    assert one.commitment != two.commitment and one.leaf_hash != two.leaf_hash
    assert KEY.key_id.encode() not in one.to_bytes()
    with pytest.raises(RecordError, match="salt"):
        commitment_of(b"", envelope)


def test_leaf_round_trip_and_refusals() -> None:
    leaf = build_leaf(RECORD, record_to_envelope(RECORD, KEY), salt=bytes(32), parents=("ef" * 32,))
    assert Leaf.from_bytes(leaf.to_bytes()) == leaf
    value = leaf.to_json()
    for change in ({"v": 2}, {"kind": "other"}, {"parents": ["xyz"]}, {"commitment": "00"}, {"time_us": "1"}, {"x": 1}):
        with pytest.raises(RecordError):
            Leaf.from_json({**value, **change})
    with pytest.raises(RecordError):
        Leaf.from_bytes(leaf.to_bytes() + b" ")
    crowded = replace(leaf, parents=("ef" * 32,) * 1000)
    with pytest.raises(RecordError, match="combine the inputs in steps"):
        crowded.to_bytes()
