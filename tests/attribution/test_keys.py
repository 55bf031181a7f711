"""Keys: files only the owner reads, never overwritten, ids as securesystemslib computes them."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from securesystemslib.signer import SSlibKey

from attribution.keys import KeyRing, SigningKey, SigningKeyError, encrypt_key_file, key_id_of, verify_signature
from attribution.remote_keys import RemoteKey


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


def test_a_key_under_a_passphrase_signs_when_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = KeyRing(tmp_path).create("a")
    encrypt_key_file(KeyRing(tmp_path), "a", "correct horse")
    path = tmp_path / "keys" / "a.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
    locked = KeyRing(tmp_path).get("a")
    assert locked.key_id == key.key_id, "known without the passphrase"
    with pytest.raises(SigningKeyError, match="set TRAILMARK_KEY_PASSPHRASE"):
        locked.sign(b"m")
    monkeypatch.setenv("TRAILMARK_KEY_PASSPHRASE", "wrong")
    with pytest.raises(SigningKeyError, match="does not open"):
        locked.sign(b"m")
    monkeypatch.setenv("TRAILMARK_KEY_PASSPHRASE", "correct horse")
    assert verify_signature(key.public_bytes, locked.sign(b"m"), b"m")
    with pytest.raises(SigningKeyError, match="nothing to encrypt"):
        encrypt_key_file(KeyRing(tmp_path), "a", "again")
    KeyRing(tmp_path).create("b")
    path.with_suffix(".pub").write_text(KeyRing(tmp_path).get("b").public_hex)
    with pytest.raises(SigningKeyError, match="public half"):
        KeyRing(tmp_path).get("a").sign(b"m")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs Debian's openssl")
def test_openssl_opens_an_encrypted_key(tmp_path: Path) -> None:
    key = KeyRing(tmp_path).create("a")
    encrypt_key_file(KeyRing(tmp_path), "a", "correct horse")
    command = ["openssl", "pkey", "-in", str(tmp_path / "keys" / "a.key"), "-passin", "pass:correct horse"]
    done = subprocess.run([*command, "-pubout", "-outform", "DER"], capture_output=True, check=True)
    assert done.stdout.endswith(key.public_bytes)
    asn1 = subprocess.run(["openssl", "asn1parse", "-in", command[3]], capture_output=True, check=True, text=True)
    assert ":scrypt" in asn1.stdout and ":aes-256-cbc" in asn1.stdout


def test_a_key_elsewhere_signs_through_its_uri(tmp_path: Path) -> None:
    key = KeyRing(tmp_path / "elsewhere").create("vault")
    ring = KeyRing(tmp_path)
    ring.create("other")
    uri = f"file2:{tmp_path / 'elsewhere' / 'keys' / 'vault.key'}"
    RemoteKey("mira", uri, key.public_bytes).write(tmp_path / "keys" / "mira.uri")
    remote = ring.get("mira")
    assert (remote.key_id, remote.name, ring.list()) == (key.key_id, "mira", ["mira", "other"])
    assert verify_signature(key.public_bytes, remote.sign(b"m"), b"m")
    with pytest.raises(SigningKeyError, match=r"cannot be opened|does not match"):
        RemoteKey("x", uri, ring.get("other").public_bytes).write(tmp_path / "keys" / "x.uri")
    with pytest.raises(SigningKeyError, match="cannot be opened"):
        RemoteKey("x", "file2:/nowhere.pem", key.public_bytes).sign(b"m")
    for uri in ("awskms:alias/x", "gcpkms:projects/x", "hsm:2", "nonsense"):
        with pytest.raises(SigningKeyError, match="Ed25519"):
            RemoteKey("x", uri, key.public_bytes).sign(b"m")
    assert not (tmp_path / "keys" / "x.uri").exists()
