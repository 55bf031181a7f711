"""An exported folder is checked by a stranger who has nothing but it and the log's keys."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from attribution.exports.dossier import gather
from attribution.exports.formats import export_folder
from attribution.log.proved import VerifyError
from attribution.log.verify import Trust
from attribution.trail import Trail
from attribution.verify_adapter import verify_adapter, verify_adapter_of, verify_parts
from pipelines.publish import publish
from tests.attribution.records_example import add_adapter_directory


@pytest.fixture
def exported(trail: Trail, tmp_path: Path) -> Path:
    """The folder of an adapter facts@1 with its weights."""
    digest = add_adapter_directory(trail, tmp_path / "a", "facts")
    publish(trail, "facts", digest)
    folder = tmp_path / "out"
    export_folder(trail, gather(trail, "facts"), folder, weights=True)
    return folder


def trust_of(folder: Path) -> Trust:
    return Trust.load(folder / "trust.json")


def test_a_folder_verifies_without_the_home(exported: Path, trail: Trail, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(exported, moved)
    digest = gather(trail, "facts").digest
    from_home = verify_adapter_of(trail.home, "facts", trust=trust_of(moved))
    shutil.rmtree(trail.home)
    verified = verify_adapter(moved / "adapter", trust=trust_of(moved))
    assert verified.kind == "adapter" and verified.facts["adapter"] == digest
    assert verified.facts["published_as"] == "facts@1"
    assert [check.partition(":")[0] for check in verified.checks] == [
        *("files", "checkpoint", "inclusion", "commitments", "signatures", "adapter", "publication", "model signature")
    ]
    assert "3 files signed by the P-256 key" in verified.checks[-1]
    assert from_home.checks == verified.checks and from_home.facts == verified.facts


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda out: alter(out / "adapter" / "adapter_model.safetensors"), "files"),
        (lambda out: alter(out / "adapter" / "manifest.json"), "files"),
        (lambda out: (out / "adapter" / "README.md").write_text("added"), "files"),
        (lambda out: (out / "adapter" / "manifest.json").unlink(), "files"),
        (lambda out: (out / "model.sig").unlink(), "model signature"),
        (lambda out: (out / "model.sig").write_text("{}"), "model signature"),
        (lambda out: (out / "proof.json").unlink(), "proof"),
        (lambda out: (out / "proof.json").write_text("{}"), "file"),
    ],
)
def test_what_was_changed_is_named(exported: Path, change: Callable[[Path], object], check: str) -> None:
    change(exported)
    with pytest.raises(VerifyError) as refused:
        verify_adapter(exported / "adapter", trust=trust_of(exported))
    assert refused.value.check == check, refused.value


def test_no_bit_of_the_signature_may_differ(exported: Path) -> None:
    bundle, proof = (exported / "model.sig").read_bytes(), (exported / "proof.json").read_bytes()
    trust = trust_of(exported)
    for bit in random.Random(5).sample(range(8 * len(bundle)), 40):
        flipped = bytearray(bundle)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerifyError, match="model signature"):
            verify_parts(exported / "adapter", bundle=bytes(flipped), proofs=[proof], trust=trust)


def test_anothers_proof_and_anothers_log_do_not_do(exported: Path, trail: Trail, tmp_path: Path) -> None:
    other = add_adapter_directory(trail, tmp_path / "b", "other")
    export_folder(trail, gather(trail, other), tmp_path / "other")
    with pytest.raises(VerifyError, match="the proof speaks of another adapter"):
        verify_adapter(exported / "adapter", trust=trust_of(exported), proofs=[tmp_path / "other" / "proof.json"])
    stranger = Trail.open(tmp_path / "stranger")
    with pytest.raises(VerifyError, match="no signature by a trusted key"):
        verify_adapter(exported / "adapter", trust=Trust.load(stranger.home / "trust.json"))


def test_an_unsigned_adapter_says_so_and_takes_no_foreign_signature(
    trail: Trail, tmp_path: Path, exported: Path
) -> None:
    plain = add_adapter_directory(trail, tmp_path / "b", "plain")
    out = tmp_path / "plain"
    export_folder(trail, gather(trail, plain), out, weights=True)
    verified = verify_adapter(out / "adapter", trust=trust_of(out))
    assert verified.checks[-1].startswith("model signature: none") and verified.facts["published_as"] is None
    shutil.copy(exported / "model.sig", out)
    with pytest.raises(VerifyError, match="no record that vouches for the key"):
        verify_adapter(out / "adapter", trust=trust_of(out))
    assert json.loads((out / "bom.cdx.json").read_text())["specVersion"] == "1.7"
