"""`trailmark export`, `sign` and `verify adapter` as a user types them."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from attribution.exports.dossier import ExportError
from attribution.trail import Trail
from cluster.cli import app
from pipelines.publish import publish
from tests.attribution.records_example import add_adapter_directory


@pytest.fixture
def home(trail: Trail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trail:
    """A home with the adapter facts@1; the working directory is tmp_path."""
    monkeypatch.setenv("TRAILMARK_HOME", str(trail.home))
    monkeypatch.chdir(tmp_path)
    publish(trail, "facts", add_adapter_directory(trail, tmp_path / "a", "facts"))
    return trail


def trailmark(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_export_all_then_verify(home: Trail) -> None:
    done = trailmark("export", "facts", "--weights")
    assert done.exit_code == 0 and "facts@1: 12 files in facts-1" in done.output
    first = {path: path.read_bytes() for path in Path("facts-1").rglob("*") if path.is_file()}
    assert trailmark("export", "facts", "--weights").exit_code == 0
    assert {path: path.read_bytes() for path in Path("facts-1").rglob("*") if path.is_file()} == first
    verified = trailmark("verify", "adapter", "facts-1/adapter")
    assert verified.exit_code == 0 and "VERIFIED  facts-1/adapter  (adapter)" in verified.output
    by_name = json.loads(trailmark("verify", "adapter", "facts@1", "--json").output)
    assert by_name["verified"] and by_name["facts"]["published_as"] == "facts@1"
    assert trailmark("verify", "facts-1/proof.json").exit_code == 0
    assert trailmark("verify", "--json", "facts-1/proof.json").exit_code == 0
    Path("facts-1/adapter/adapter_config.json").write_text("{}")
    refused = trailmark("verify", "adapter", "facts-1/adapter")
    assert refused.exit_code == 1 and "failed check: files" in refused.stderr
    with pytest.raises(ExportError, match=r"holds other files \(adapter_config"):
        Path("facts-1/adapter/manifest.json").unlink()
        trailmark("export", "facts", "--weights")


def test_one_format_goes_to_the_screen_or_a_file(home: Trail) -> None:
    shown = trailmark("export", "facts", "--format", "cyclonedx")
    assert json.loads(shown.stdout)["bomFormat"] == "CycloneDX" and shown.stderr == ""
    assert trailmark("export", "facts", "-f", "prov", "-o", "p.json").exit_code == 0
    assert "prefix" in json.loads(Path("p.json").read_text())


def test_mistakes_are_named(home: Trail, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="format 'spdx': choose one of cyclonedx"):
        trailmark("export", "facts", "-f", "spdx")
    with pytest.raises(ExportError, match="--weights: goes with --format all, not prov"):
        trailmark("export", "facts", "-f", "prov", "--weights")
    with pytest.raises(ExportError, match="is a folder; give a file for one format"):
        trailmark("export", "facts", "-f", "prov", "-o", str(tmp_path))
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match="is a file; give a folder"):
        trailmark("export", "facts", "-o", str(tmp_path / "taken"))


def test_sign_says_when_there_is_nothing_to_do(home: Trail, tmp_path: Path) -> None:
    assert "has a signature of this home's key already" in trailmark("sign", "facts").output
    digest = add_adapter_directory(home, tmp_path / "b", "plain")
    assert "model signature none" in " ".join(trailmark("verify", "adapter", digest).output.split())
    assert "signed and recorded" in trailmark("sign", digest).output
    assert "3 files signed" in trailmark("verify", "adapter", digest).output
