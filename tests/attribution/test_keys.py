"""Keys: files only the owner reads, never overwritten, ids as securesystemslib computes them."""

import stat
from pathlib import Path

import pytest
from securesystemslib.signer import SSlibKey

from attribution.keys import KeyRing, SigningKey, SigningKeyError, key_id_of, verify_signature


def test_create_save_and_load(tmp_path: Path) -> None:
    key = KeyRing(tmp_path).create("Europe & co".replace("&", "and"))
    path = tmp_path / "keys" / "Europe and co.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.with_name("Europe and co.pub").read_text() == key.public_hex + "\n"
    again = KeyRing(tmp_path).get("Europe and co")
    assert (again.name, again.public_bytes, again.key_id) == ("Europe and co", key.public_bytes, key.key_id)
    assert verify_signature(key.public_bytes, again.sign(b"m"), b"m")
    assert not verify_signature(key.public_bytes, again.sign(b"m"), b"n")


def test_names_may_hold_dots(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path)
    assert ring.create("team.v2").name == "team.v2"
    assert (ring.list(), KeyRing(tmp_path).get("team.v2").name) == (["team.v2"], "team.v2")
    assert (tmp_path / "keys" / "team.v2.pub").is_file()


def test_key_id_is_securesystemslibs() -> None:
    key = SigningKey.from_seed("k", bytes(range(32)))
    described = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": key.public_hex}}
    assert key.key_id == key_id_of(key.public_bytes)
    theirs = SSlibKey.from_crypto(key._private_key.public_key())
    assert (theirs.keyid, theirs.to_dict()) == (key.key_id, described)


def test_refusals(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path)
    ring.create("a")
    with pytest.raises(SigningKeyError, match="exists already"):
        KeyRing(tmp_path).create("a")
    with pytest.raises(SigningKeyError, match="known keys: a"):
        ring.get("b")
    for name in ("", "../a", "a/b", ".hidden", "a ", "x" * 65, "a\n"):
        with pytest.raises(SigningKeyError, match="key name"):
            ring.create(name)


def test_a_key_others_can_read_is_refused(tmp_path: Path) -> None:
    KeyRing(tmp_path).create("a")
    path = tmp_path / "keys" / "a.key"
    path.chmod(0o640)
    with pytest.raises(SigningKeyError, match="chmod 600"):
        KeyRing(tmp_path).get("a")
    path.chmod(0o600)
    path.write_bytes(b"not a key")
    with pytest.raises(SigningKeyError, match="PEM"):
        KeyRing(tmp_path).get("a")
