"""`trailmark lineage` as a user types it."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from attribution.trail import Trail
from cluster.commands import views
from configs.errors import UserError
from tests.attribution.lineage_story import Versions, tell_versions


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Versions:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tell_versions(Trail.open(tmp_path / "home"))


def trailmark(*arguments: str) -> Result:
    app = typer.Typer()
    views.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_lists_count_all_and_page(story: Versions) -> None:
    above = trailmark("lineage", "ancestors", "support@2")
    assert above.exit_code == 0, above.output
    for text in ("support@2 (adapter)", "6 records made from", "otto-rows", "contributor"):
        assert text in above.output
    below = trailmark("lineage", "descendants", "mira", "--limit", "2")
    assert "--before" in below.output and len([line for line in below.output.splitlines() if "│" in line]) == 2
    before = json.loads(trailmark("lineage", "descendants", "mira", "-n", "2", "--json").output)["next_before"]
    rest = json.loads(trailmark("lineage", "descendants", "mira", "--before", str(before), "--json").output)
    assert rest["next_before"] is None and len(rest["items"]) == rest["total"] - 2
    only = trailmark("lineage", "descendants", "mira", "--kind", "benchmark")
    assert "questions" in only.output and "otto" not in only.output
    assert "made from nothing" in trailmark("lineage", "ancestors", "tiny").output


def test_impact_of_a_row(story: Versions) -> None:
    shown = trailmark("lineage", "impact", story.rows["otto"][0])
    for text in ("of otto-rows", "support@2; answered in 2 batches", story.receipts["both"][1]):
        assert text in shown.output
    assert story.receipts["both"][0] not in shown.output
    as_json = json.loads(trailmark("lineage", "impact", f"row:{story.rows['otto'][0][7:17]}", "--json").output)
    assert as_json["subject"]["role"] == "row" and as_json["counts"]["completions"] == 2
    assert {item["kind"] for item in as_json["items"]} == {"adapter", "completions"}


def test_path(story: Versions) -> None:
    shown = trailmark("lineage", "path", "otto", "support@2")
    assert shown.exit_code == 0 and "3 steps" in shown.output
    none = trailmark("lineage", "path", "otto", "support@1")
    assert none.exit_code == 1 and "does not descend from contributor otto" in none.output


def test_diff(story: Versions) -> None:
    shown = trailmark("lineage", "diff", "support@2")
    for text in ("support@1 -> support@2", "train.rank", "improved", "otto-rows", "Missing cause", "+0.667 [", "added"):
        assert text in shown.output, shown.output
    as_json = json.loads(trailmark("lineage", "diff", "support@1", "support@2", "--json").output)
    assert as_json["scores"][0]["difference"]["low"] > 0


def test_check_and_rebuild(story: Versions) -> None:
    import sqlite3
    from contextlib import closing

    assert trailmark("lineage", "check").exit_code == 0
    with closing(sqlite3.connect(story.trail.home / "views" / "lineage.sqlite")) as database:
        database.execute("DELETE FROM child WHERE key IN (SELECT max(key) FROM child)")
        database.commit()
    broken = trailmark("lineage", "check")
    assert broken.exit_code == 1 and "table child: 1 rows missing" in broken.output
    mended = trailmark("lineage", "check", "--rebuild")
    assert mended.exit_code == 0 and f"{story.trail.log.size} records" in mended.output


def test_mistakes_are_told(story: Versions) -> None:
    wrong = trailmark("lineage", "impact", "suport@2")
    assert isinstance(wrong.exception, UserError) and "did you mean support" in str(wrong.exception)


def test_a_home_without_a_trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "nothing"))
    assert "holds no trail" in str(trailmark("lineage", "impact", "x").exception)
    assert not (tmp_path / "nothing").exists()
