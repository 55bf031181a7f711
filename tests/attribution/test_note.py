"""Signed notes, checkpoints and proof texts against the specifications' own example and against malformed input."""

from base64 import b64encode

import pytest

from attribution.keys import SigningKey
from attribution.log.merkle import Tree, hash_leaf
from attribution.log.note import (
    Checkpoint,
    NoteError,
    NoteKey,
    open_checkpoint,
    open_note,
    sign_checkpoint,
    sign_note,
)
from attribution.log.proof import format_proof, parse_proof

# golang.org/x/mod/sumdb/note's documented example: key and note by the specification's first implementation.
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_NOTE = (
    GO_TEXT
    + "\n— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)

LOG = SigningKey.from_seed("log", bytes(32))
ORIGIN = "trailmark.test/log"
KEY = NoteKey(ORIGIN, LOG.public_bytes)


def test_reads_a_note_of_the_go_implementation() -> None:
    key = NoteKey.parse(GO_KEY)
    assert (key.name, str(key)) == ("PeterNeumann", GO_KEY)
    assert open_note(GO_NOTE, [key]) == GO_TEXT


def test_verifier_key_round_trip() -> None:
    assert NoteKey.parse(str(KEY)) == KEY
    name, hash_hex, encoded = str(KEY).split("+", 2)
    for wrong in (f"{name}x+{hash_hex}+{encoded}", f"{name}+00000000+{encoded}", f"{name}+{hash_hex}", ""):
        with pytest.raises(NoteError):
            NoteKey.parse(wrong)


def test_unknown_signatures_are_ignored_and_bad_known_ones_are_fatal() -> None:
    note = sign_note("text\n", name=ORIGIN, signer=LOG)
    witness = SigningKey.from_seed("w", bytes(31) + b"\x01")
    extra = sign_note("text\n", name="witness.test", signer=witness).rpartition("\n\n")[2]
    assert open_note(note + extra, [KEY]) == "text\n"
    witness_key = NoteKey("witness.test", witness.public_bytes)
    with pytest.raises(NoteError, match=r"no signature by a trusted key \(trusted: witness.test\)"):
        open_note(note, [witness_key])
    forged = sign_note("other\n", name="witness.test", signer=witness).rpartition("\n\n")[2]
    with pytest.raises(NoteError, match=r"the signature of witness\.test is wrong"):
        open_note(note + forged, [KEY, witness_key])


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note[:-1],
        lambda note: note.replace("\n\n", "\n"),
        lambda note: note.replace("— ", "- "),
        lambda note: note.replace("text", "texT"),
        lambda note: note.replace("=\n", "\n"),
        lambda note: note + "garbage\n",
        lambda note: "\x07" + note,
        lambda note: note + note.rpartition("\n\n")[2] * 64,
    ],
)
def test_malformed_notes_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NoteError):
        open_note(change(sign_note("text\n", name=ORIGIN, signer=LOG)), [KEY])


def test_base64_with_stray_bits_is_refused() -> None:
    """The last base64 digit before padding carries bits that decode to nothing: flipping them must not pass."""
    note = sign_note("text\n", name=ORIGIN, signer=LOG)
    assert note.endswith("=\n")
    digit = note[-3]
    other = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    stray = other[other.index(digit) ^ 1]
    with pytest.raises(NoteError, match="canonical"):
        open_note(note[:-3] + stray + note[-2:], [KEY])


@pytest.mark.parametrize(
    "text",
    [
        "o\n1\n",
        "o\n01\nAAAA\n",
        "o\n-1\nAAAA\n",
        "o\n1\nAAAA\n",
        "\n1\n" + b64encode(bytes(32)).decode() + "\n",
        "o\n1\n" + b64encode(bytes(32)).decode() + "\nextension\n",
        "o\n١\n" + b64encode(bytes(32)).decode() + "\n",
    ],
)
def test_malformed_checkpoints_are_refused(text: str) -> None:
    with pytest.raises(NoteError):
        Checkpoint.parse(text)


def test_a_checkpoint_is_of_the_log_that_signed_it() -> None:
    checkpoint = Checkpoint(ORIGIN, 3, bytes(range(32)))
    assert open_checkpoint(sign_checkpoint(checkpoint, LOG), KEY) == checkpoint
    other_origin = sign_note(Checkpoint("other.test", 3, bytes(32)).text(), name=ORIGIN, signer=LOG)
    with pytest.raises(NoteError, match="origin"):
        open_checkpoint(other_origin, KEY)


def test_proof_round_trip_and_malformed_proofs() -> None:
    tree = Tree(hash_leaf(bytes([index])) for index in range(5))
    note = sign_checkpoint(Checkpoint(ORIGIN, 5, tree.root()), LOG)
    text = format_proof(3, tree.inclusion_path(3), checkpoint=note)
    proof = parse_proof(text)
    proof.include(tree.leaf(3), proof.open(KEY))
    with_extra = parse_proof(text.replace("index 3", "extra aGVsbG8=\nindex 3"))
    assert (with_extra.extra, with_extra.path, with_extra.checkpoint) == (b"hello", proof.path, proof.checkpoint)
    for wrong in (
        text.replace("@v1", "@v2"),
        text.replace("index 3", "index 03"),
        text.replace("index 3", "index x"),
        text.replace("index 3", "extra \nindex 3"),
        text.replace("index 3", "extra aGVsbG9=\nindex 3"),
        text.replace("index 3\n", ""),
        text.replace("\n\n", "\n", 1),
        text.replace("index 3\n", "index 3\nAAAA\n"),
        text.replace("index 3\n", "index 3\n" + (b64encode(bytes(32)).decode() + "\n") * 65),
    ):
        with pytest.raises(NoteError):
            parse_proof(wrong).open(KEY)
