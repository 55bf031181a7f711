"""The key commands as a user runs them."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from attribution.keys import SigningKeyError
from attribution.log.facts import utc
from attribution.trail import Trail
from cluster.commands import keys
from configs.errors import UserError
from pipelines.contribute import add_contributor


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trail:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "home"))
    trail = Trail.open(tmp_path / "home")
    add_contributor(trail, "otto")
    return trail


def call(*arguments: str) -> Result:
    app = typer.Typer()
    keys.register(app)
    result = CliRunner().invoke(app, ["key", *arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_scheme_that_cannot_work_is_told_before_anything_is_asked_for(trail: Trail) -> None:
    with pytest.raises(SigningKeyError, match="Trailmark signs with Ed25519"):
        call("rotate", "otto", "--uri", "awskms:alias/otto")
    with pytest.raises(SigningKeyError, match="--public-key: needed"):
        call("rotate", "otto", "--uri", "hv:otto/1")


def test_a_revocation_names_every_key_it_reaches(trail: Trail) -> None:
    joined = utc(trail.entry(trail.log.size - 1).leaf.time_us)
    old = trail.keys.get("otto").key_id
    call("rotate", "otto")
    new = trail.keys.get("otto").key_id
    output = call("revoke", "otto", "--reason", "stolen", "--from", joined).output
    for key_id in (old, new):
        assert f"otto: key {key_id[:16]} revoked from {joined} on" in output
    assert "`trailmark key rotate 'otto' --lost` gives otto a new key." in output
    call("rotate", "otto", "--lost")
    alone = call("revoke", "otto", "--reason", "stolen", "--key", old[:16]).output
    assert old[:16] in alone and "--lost" not in alone
