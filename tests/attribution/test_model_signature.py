"""Model signatures against the original tool, both ways; the key; which signatures count."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attribution.bodies import ModelSignatureBody
from attribution.keys import SigningKey
from attribution.log.verify import Trust
from attribution.model_signature import (
    ModelKey,
    ModelSignatureError,
    ensure_model_key,
    sign_model,
    signed_files,
    verify_model,
)
from attribution.records import Artefact
from attribution.signed_models import SignedModels, sign
from attribution.store import Manifest, Store, StoreError
from attribution.trail import Trail
from pipelines.publish import publish
from serve_apps.adapters import signature_check
from tests.attribution.records_example import add_adapter_directory

WEIGHTS = {
    "adapter_config.json": b'{"r": 8}',
    "deep/adapter_model.safetensors": b"weights",
    "deep.txt": b"",
    "a-b": b"x",
}


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Manifest, ModelKey, bytes]:
    """A stored directory, its manifest, the key, and the signature."""
    for name, data in WEIGHTS.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    store = Store(tmp_path / "store")
    digest = store.put_directory(tmp_path / "files", kind="adapter", meta={})
    manifest, key = store.manifest(digest), ensure_model_key(tmp_path)
    return store.path_of(digest), manifest, key, sign_model("facts", manifest, key)


def original(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the original tool."""
    command = [sys.executable, "-m", "model_signing", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_the_original_tool_accepts_ours_and_refuses_an_altered_file(
    tmp_path: Path, signed: tuple[Path, Manifest, ModelKey, bytes]
) -> None:
    folder, _, key, bundle = signed
    (tmp_path / "model.sig").write_bytes(bundle)
    public = str(tmp_path / "keys" / "model-signing.pub.pem")
    assert Path(public).read_text() == key.public_pem
    arguments = ("verify", "key", str(folder), "--signature", "model.sig", "--public_key", public)
    done = original(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Verification succeeded" in done.stdout
    shutil.copytree(folder, tmp_path / "altered")
    (tmp_path / "altered" / "a-b").write_bytes(b"y")
    done = original(tmp_path, "verify", "key", "altered", *arguments[3:])
    assert done.returncode != 0 and "Hash mismatch for 'a-b'" in done.stdout + done.stderr


def test_ours_accepts_the_original_tools(tmp_path: Path, signed: tuple[Path, Manifest, ModelKey, bytes]) -> None:
    folder, manifest, key, bundle = signed
    private = str(tmp_path / "keys" / "model-signing.pem")
    done = original(tmp_path, "sign", "key", str(folder), "--signature", "their.sig", "--private_key", private)
    assert done.returncode == 0, done.stderr
    theirs = (tmp_path / "their.sig").read_bytes()
    assert verify_model(theirs, manifest, public_pem=key.public_pem) == len(WEIGHTS) + 1
    mine = signed_files(bundle, public_pem=key.public_pem)
    assert list(signed_files(theirs, public_pem=key.public_pem).items()) == list(mine.items()), (
        "order matters: it is hashed"
    )


def test_one_directory_has_one_signature_and_no_other_key_or_file_passes(
    tmp_path: Path, signed: tuple[Path, Manifest, ModelKey, bytes]
) -> None:
    _, manifest, key, bundle = signed
    assert sign_model("facts", manifest, key) == bundle
    other = ensure_model_key(tmp_path / "other")
    with pytest.raises(ModelSignatureError, match="another key"):
        verify_model(bundle, manifest, public_pem=other.public_pem)
    forged = sign_model("facts", manifest, other).replace(b"hint", b"hint")
    with pytest.raises(ModelSignatureError):
        verify_model(forged, manifest, public_pem=key.public_pem)
    with pytest.raises(ModelSignatureError, match=r"a-b is not the file that was signed"):
        without = Manifest(manifest.kind, manifest.meta, tuple(file for file in manifest.files if file.path != "a-b"))
        verify_model(bundle, without, public_pem=key.public_pem)
    for bad in (
        b"",
        b"{}",
        b"[1]",
        bundle[:-1],
        bundle.replace(b"v0.3", b"v0.2"),
        bundle.replace(b'"sig":"M', b'"sig":"N'),
    ):
        with pytest.raises(ModelSignatureError, match="model signature"):
            verify_model(bad, manifest, public_pem=key.public_pem)
    with pytest.raises(ModelSignatureError, match="not a PEM public key"):
        signed_files(bundle, public_pem="nothing")


def test_the_key_is_made_once_private_and_of_the_right_curve(tmp_path: Path) -> None:
    key = ensure_model_key(tmp_path)
    path = tmp_path / "keys" / "model-signing.pem"
    assert path.stat().st_mode & 0o777 == 0o600 and ensure_model_key(tmp_path).public_pem == key.public_pem
    assert sorted(item.name for item in path.parent.iterdir()) == ["model-signing.pem", "model-signing.pub.pem"]
    path.chmod(0o640)
    with pytest.raises(ModelSignatureError, match=f"mode 640 lets others read it; run chmod 600 {path}"):
        ensure_model_key(tmp_path)
    path.unlink()
    SigningKey.generate("model-signing").save(path)
    with pytest.raises(ModelSignatureError, match="holds no P-256 key"):
        ensure_model_key(tmp_path)
    path.write_text("nothing")
    with pytest.raises(ModelSignatureError, match="not an unencrypted PEM"):
        ensure_model_key(tmp_path)


def test_publishing_signs_in_the_same_group_and_once(trail: Trail, tmp_path: Path) -> None:
    digest = add_adapter_directory(trail, tmp_path / "a", "facts")
    entry = publish(trail, "facts", digest)
    signatures = list(trail.entries(kind="model_signature"))
    assert [item.index for item in signatures] == [entry.index - 1]
    made = trail.find(digest)
    assert made is not None and entry.leaf.parents == (made.leaf_hash, signatures[0].leaf_hash)
    body = signatures[0].record.body  # type: ignore[union-attr]
    assert isinstance(body, ModelSignatureBody) and body.digest == digest
    verify_model(trail.store.get_blob(body.signature), trail.store.manifest(digest), public_pem=body.public_key)
    again = publish(trail, "other", digest)
    assert again.leaf.parents == entry.leaf.parents and not sign(trail, digest)
    assert len(list(trail.entries(kind="model_signature"))) == 1


def test_a_replica_asks_as_its_policy_says(trail: Trail, tmp_path: Path) -> None:
    plain = add_adapter_directory(trail, tmp_path / "a", "plain")
    signed_digest = add_adapter_directory(trail, tmp_path / "b", "signed")
    off, present, required = (signature_check(trail, policy) for policy in ("off", "present", "required"))  # type: ignore[arg-type]
    off(plain), present(plain)
    with pytest.raises(ModelSignatureError, match=f"has no model signature; run `trailmark sign {plain}`"):
        required(plain)
    assert sign(trail, signed_digest)
    present(signed_digest), required(signed_digest)
    (body,) = [entry.record.body for entry in trail.entries(kind="model_signature") if entry.record is not None]
    assert isinstance(body, ModelSignatureBody)
    path = trail.store.path_of(body.signature)
    path.write_bytes(path.read_bytes()[:-2] + b"!!")
    off(signed_digest)
    for check in (present, required):
        with pytest.raises(StoreError, match="altered"):
            check(signed_digest)


def test_a_signature_of_other_files_is_refused_and_a_strangers_does_not_count(trail: Trail, tmp_path: Path) -> None:
    first = add_adapter_directory(trail, tmp_path / "a", "first")
    second = add_adapter_directory(trail, tmp_path / "b", "second")
    key = ensure_model_key(trail.home)
    blob = trail.store.put_blob(sign_model("first", trail.store.manifest(first), key))
    body = ModelSignatureBody("second", second, "f", "a", key.public_pem, blob)
    signed = SignedModels(trail, Trust.load(trail.home / "trust.json"))
    trail.record(
        "model_signature", body, outputs=[Artefact("signature", "x", blob)], signer=SigningKey.generate("mallory")
    )
    assert signed.of(second) is None
    trail.record("model_signature", body, outputs=[Artefact("signature", "x", blob)])
    with pytest.raises(ModelSignatureError, match="is not the file that was signed"):
        signed.check(second)
