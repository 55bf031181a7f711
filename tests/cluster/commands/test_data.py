"""The data commands as a user runs them: what they print, what they write, how they refuse."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from attribution.key_changes import rotate
from attribution.trail import Trail
from cluster.commands import data
from configs.errors import UserError
from pipelines.refine.read import load_decisions

ROWS = [
    '{"prompt": "What is the capital of Peru?", "completion": "The capital of Peru is Lima."}',
    "not json",
    '{"prompt": "Hi", "completion": "Hello, how are you?"}',
]
COPY = '{"prompt": "what IS the capital of Peru?", "completion": "THE capital  of Peru is lima."}'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path / "home"


def call(*arguments: str) -> Result:
    app = typer.Typer()
    data.register(app)
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def hand_in(folder: Path, name: str, lines: list[str], *options: str) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(lines))
    call("contributor", "add", name)
    return call("contribute", str(file), "--as", name, "--licence", "CC-BY-4.0", *options).output


def test_contribute_reports_every_row_left_out(home: Path, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    output = hand_in(tmp_path, "ana", ROWS + ["{}"] * 25, "--rejects", str(rejects))
    assert "2 rows recorded for ana" in output
    assert "26 of 28 rows left out" in output
    assert "line 2: bad JSON" in output
    assert output.count("  line ") == 20
    written = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [item["line"] for item in written] == [2, *range(4, 29)]


def test_rows_under_a_rotated_key_are_counted_with_the_persons_others(home: Path, tmp_path: Path) -> None:
    hand_in(tmp_path, "ana", ROWS[:1])
    trail = Trail.open(home)
    rotate(trail, "ana")
    (tmp_path / "more.jsonl").write_text("\n".join([ROWS[2], COPY]))
    call("contribute", str(tmp_path / "more.jsonl"), "--as", "ana", "--licence", "CC-BY-4.0")
    line = next(line for line in call("contributor", "list").output.splitlines() if "ana" in line)
    assert [part.strip() for part in line.split("│")] == ["ana", trail.keys.get("ana").key_id[:12], "2", "3"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_refine_list_show_and_why(home: Path, tmp_path: Path) -> None:
    hand_in(tmp_path, "ana", ROWS)
    hand_in(tmp_path, "bo", [COPY])
    output = call("refine", "--name", "facts").output
    assert "same content as an example registered earlier" in output
    digest = next(word for word in output.split() if word.startswith("sha256:"))
    assert [line.split() for line in output.splitlines() if line.startswith(("ana ", "bo "))] == [
        ["ana", "│", "2", "│", "2", "│", "0"],
        ["bo", "│", "1", "│", "0", "│", "1"],
    ]
    assert call("dataset", "list").output.count("contributed") == 2
    assert digest in call("dataset", "show", "facts").output.replace("\n", "")
    assert "The capital of Peru is Lima." in call("dataset", "show", "ana").output
    fallen = next(d for d in load_decisions(Trail.open(home), digest).to_pylist() if not d["keep"])
    told = call("dataset", "why", fallen["example_id"]).output
    assert "bo line 1" in told and "exact_duplicates" in told and fallen["see_also"][7:19] in told
    assert [line.split("│")[3].strip() for line in call("contributor", "list").output.splitlines()[3:]] == ["2", "1"]


def test_unknown_names_are_told_before_ray_starts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(tmp_path, "ana", ROWS)

    def refuse(*_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr("cluster.session.ray_session", refuse)
    with pytest.raises(UserError, match="'anna': no contribution"):
        call("refine", "--name", "x", "--dataset", "anna")
    with pytest.raises(UserError, match="'facts': no such name"):
        call("dataset", "show", "facts")
