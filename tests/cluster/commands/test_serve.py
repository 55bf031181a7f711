"""`trailmark apikey`: a key is shown once, works at once, and is gone after revoke."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.commands import serve
from configs.errors import UserError
from serve_apps.apikeys import ApiKeys, Principal, keys_path


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path))
    app = typer.Typer()
    serve.register(app)
    return app


def test_a_key_is_made_listed_and_revoked(app: typer.Typer, tmp_path: Path) -> None:
    runner = CliRunner()
    made = runner.invoke(app, ["apikey", "create", "shop", "--tenant", "acme", "--operator"])
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    keys = ApiKeys(keys_path(tmp_path))
    assert keys.authenticate(secret) == Principal("acme", is_operator=True)
    listed = runner.invoke(app, ["apikey", "list"])
    assert "shop" in listed.output
    assert "acme" in listed.output
    assert secret not in listed.output
    revoked = runner.invoke(app, ["apikey", "revoke", "shop"])
    assert "revoked shop" in revoked.output
    assert keys.authenticate(secret) is None
    assert "trailmark apikey create" in runner.invoke(app, ["apikey", "list"]).output


def test_an_unknown_key_is_the_users_mistake(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["apikey", "revoke", "nobody"])
    assert isinstance(result.exception, UserError)
    assert "nobody" in str(result.exception)
