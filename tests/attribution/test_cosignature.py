"""Cosignatures against checkpoints that public logs and witnesses signed, and against every single changed bit."""

from base64 import b64decode
from pathlib import Path

import pytest

from attribution.keys import SigningKey, SigningKeyError
from attribution.log.cosignature import Cosigner, CosignerKey, cosigned_at
from attribution.log.mldsa import MlDsaKey
from attribution.log.note import NoteError, open_note, split_note, verified_signatures
from attribution.log.policy import Policy
from tests.attribution.story import GOLDEN
from tests.attribution.witnessed import NOW_S, note_of, tree_of

PUBLIC = GOLDEN / "cosigned"
NOTE = note_of(tree_of(5))
ED25519 = Cosigner("witness.test/w1", SigningKey.from_seed("w1", bytes(31) + b"\x01"))
ML_DSA = Cosigner("witness.test/w2", MlDsaKey.from_seed(bytes(31) + b"\x02"))


def test_checkpoint_of_a_public_log_with_four_of_five_witnesses() -> None:
    """Google's static CT staging log, cosigned by witnesses of four operators (23 May 2026)."""
    policy = Policy.load(PUBLIC / "arche2025h1.policy")
    checkpoint, cosigned = policy.open((PUBLIC / "arche2025h1.checkpoint").read_text())
    assert (checkpoint.origin, checkpoint.size) == ("arche2025h1.staging.ct.transparency.dev", 1_432_088_532)
    assert cosigned.times == dict.fromkeys(("little-garden", "smartit", "remora", "stagemole"), 1_779_573_024)
    assert str(cosigned).startswith("4 of 5 cosigned; the policy asks for 4 of little-garden")


def test_checkpoint_that_a_public_witness_cosigned_with_both_algorithms() -> None:
    """A witness that signs with Ed25519 and with ML-DSA-44: an implementation of the structure that is not ours."""
    policy = Policy.load(PUBLIC / "coachandhorses2026h1.policy")
    note = (PUBLIC / "coachandhorses2026h1.checkpoint").read_text()
    assert policy.require(note).times == {"ed25519": 1_785_704_691, "ml-dsa-44": 1_785_704_691}
    with pytest.raises(NoteError, match=r"signature of witness\.navigli.* is wrong"):
        policy.require(note.replace("185550722", "185550723"))


def test_the_specifications_own_example_line() -> None:
    """Its witness's key is not published, so only name, key id and time can be read from it."""
    line = "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA=="
    data = b64decode(line)
    assert (len(data), data[:4].hex(), cosigned_at(data[4:])) == (4 + 8 + 64, "8d66cf3f", 1_679_315_147)


@pytest.mark.parametrize("cosigner", [ED25519, ML_DSA], ids=["ed25519", "ml-dsa-44"])
def test_round_trip(cosigner: Cosigner) -> None:
    note = NOTE + cosigner.cosign(NOTE, NOW_S)
    assert CosignerKey.parse(str(cosigner.key)) == cosigner.key
    text, found = verified_signatures(note, [cosigner.key])
    assert text == split_note(NOTE)[0]
    assert [cosigned_at(signature) for signature in found.values()] == [NOW_S]
    with pytest.raises(NoteError, match="wrong"):
        open_note(note.replace("\n5\n", "\n6\n"), [cosigner.key])


def test_every_changed_bit_of_a_cosignature_is_refused_or_unknown() -> None:
    line = ED25519.cosign(NOTE, NOW_S)
    data = line.encode()
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        try:
            _, found = verified_signatures(NOTE + changed.decode("utf-8", "surrogateescape"), [ED25519.key])
        except NoteError:
            continue
        assert not found, f"bit {place} of {line!r} does not matter"


def test_times_that_no_cosignature_has() -> None:
    for time_s in (0, -1, 2**63):
        with pytest.raises(NoteError, match="time"):
            ED25519.cosign(NOTE, time_s)
    _, (line,) = split_note("text\n\n" + ED25519.cosign(NOTE, NOW_S))
    signature = bytearray(b64decode(line.rpartition(" ")[2]))
    signature[4] = 0x80  # above 2^63 - 1
    assert not ED25519.key.verifies(split_note(NOTE)[0], bytes(signature[4:]))


def test_keys_that_are_none() -> None:
    name, _, encoded = str(ED25519.key).split("+", 2)
    for wrong in (f"{name}+00000000+{encoded}", "x", f"x {ED25519.key!s}", str(ED25519.key)[:-2]):
        with pytest.raises(NoteError):
            CosignerKey.parse(wrong)
    with pytest.raises(NoteError, match="0x01"):
        CosignerKey.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    with pytest.raises(NoteError, match="1312 bytes"):
        CosignerKey("w", 0x06, bytes(32))


def test_ml_dsa_names_its_cosigner_and_origin() -> None:
    """The Ed25519 message names neither; this one binds both, in one byte of length each."""
    other = CosignerKey("witness.test/other", 0x06, ML_DSA.key.public_bytes)
    _, (line,) = split_note("text\n\n" + ML_DSA.cosign(NOTE, NOW_S))
    signature = b64decode(line.rpartition(" ")[2])[4:]
    text = split_note(NOTE)[0]
    assert ML_DSA.key.verifies(text, signature)
    assert not other.verifies(text, signature)
    assert not ML_DSA.key.verifies(text + "extension\n", signature)
    with pytest.raises(NoteError, match="1 to 255"):
        Cosigner("w" * 256, MlDsaKey.from_seed(bytes(32))).cosign(NOTE, NOW_S)


def test_ml_dsa_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = MlDsaKey.generate()
    key.save(path)
    assert MlDsaKey.load(path).public_bytes == key.public_bytes
    with pytest.raises(FileExistsError):
        key.save(path)
    path.chmod(0o644)
    with pytest.raises(SigningKeyError, match="chmod 600"):
        MlDsaKey.load(path)
    SigningKey.generate("w").save(tmp_path / "ed.key")
    with pytest.raises(SigningKeyError, match="no ML-DSA-44 key"):
        MlDsaKey.load(tmp_path / "ed.key")
