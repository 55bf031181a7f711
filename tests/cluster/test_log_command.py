"""`trailmark verify` and `trailmark log` as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attribution.trail import Trail
from tests.attribution.story import GOLDEN, Story, tell


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "home"))
    return tell(Trail.open(tmp_path / "home"))


def trailmark(*arguments: str) -> Result:
    import typer

    from cluster.commands import log

    app = typer.Typer()
    log.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_receipt_then_verify(story: Story, tmp_path: Path) -> None:
    out, ancestry, whole = (str(tmp_path / f"{name}.json") for name in ("receipt", "ancestry", "whole"))
    written = trailmark("log", "receipt", story.adapter_receipt, "--out", out)
    assert written.exit_code == 0 and f"2.3 kB; check it with `trailmark verify {out}`" in written.output
    alone = trailmark("verify", out)
    assert alone.exit_code == 0 and "support@1" in alone.output and "Amara" not in alone.output, alone.output
    assert trailmark("log", "ancestry", story.adapter_receipt, "--out", ancestry).exit_code == 0
    assert "(ancestry)" in trailmark("verify", ancestry).output
    assert trailmark("log", "receipt", story.adapter_receipt, "--with-ancestry", "--out", whole).exit_code == 0
    verified = trailmark("verify", out, "--ancestry", ancestry)
    assert verified.exit_code == 0, verified.output
    for shown in (verified, trailmark("verify", whole)):
        assert "Amara" in shown.output and "support@1 names that adapter" in shown.output
    for text in ("VERIFIED", "support@1", "Amara", "rows kept", "tree_size            9", "(contributor Noor)"):
        assert text in verified.output
    as_json = json.loads(trailmark("verify", out, "--json").output)
    assert as_json["verified"] and as_json["facts"]["receipt"] == story.adapter_receipt


def test_a_tampered_receipt_exits_1_and_names_the_check(story: Story, tmp_path: Path) -> None:
    out = tmp_path / "receipt.json"
    trailmark("log", "receipt", story.adapter_receipt, "--with-ancestry", "-o", str(out))
    out.write_text(out.read_text().replace('"prompt_tokens": 12', '"prompt_tokens": 13'))
    refused = trailmark("verify", str(out))
    assert refused.exit_code == 1
    assert "NOT VERIFIED" in refused.stderr and "failed check: inner path" in refused.stderr
    assert json.loads(trailmark("verify", str(out), "--json").output)["check"] == "inner path"


def test_proof_of_a_contribution(story: Story, tmp_path: Path) -> None:
    out = str(tmp_path / "proof.json")
    assert trailmark("log", "proof", "2", "--out", out).exit_code == 0
    verified = trailmark("verify", out)
    assert verified.exit_code == 0 and "(dataset)" in verified.output


def test_show_and_checkpoint(story: Story) -> None:
    listed = trailmark("log", "show")
    assert "9 entries" in listed.output and "support@1" in listed.output
    assert "dataset" in trailmark("log", "show", "--kind", "dataset").output
    assert len(trailmark("log", "show", "-n", "2").output.strip().splitlines()) == 4
    shown = json.loads(trailmark("log", "show", story.adapter.leaf_hash[:10]).output)
    assert shown["statement"]["predicate"]["body"]["rank"] == 8
    assert trailmark("log", "checkpoint").output == story.trail.log.checkpoint


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_verify_without_a_network() -> None:
    """The whole command in a network namespace with no interface; `benchmarks/log_verify.py` holds its time."""
    command = [sys.executable, "-m", "cluster", "verify", str(GOLDEN / "receipt_bundle.json")]
    command += ["--keys", str(GOLDEN / "trust.json")]
    if os.geteuid() == 0:
        command = ["unshare", "-n", *command]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "unshare failed" in finished.stderr:
        pytest.skip("this sandbox may not make network namespaces")
    assert finished.returncode == 0, finished.stderr
    assert "VERIFIED" in finished.stdout
