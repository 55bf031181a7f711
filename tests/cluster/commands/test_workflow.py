"""What the workflow commands print: progress, patches, effects, failures, and what to do next."""

from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attribution.trail import Trail
from cluster.cli import app
from cluster.commands.workflow_tables import Teller, plan_table, run_view, story_view, workflows_table
from cluster.workflow import Author
from pipelines.contribute import add_contributor
from tests.cluster.workflow_world import UNSIGNED, WORKFLOW, World


@pytest.fixture
def world(trail: Trail) -> World:
    for name in ("mira", "otto"):
        add_contributor(trail, name)
    return World(trail)


def printed(*parts: object) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(*parts, sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


def told(world: World, text: str = UNSIGNED, author: Author | None = None) -> str:
    """Run a workflow and return all that its teller printed."""
    driver = world.driver(text)
    console = Console(file=StringIO(), width=160)
    teller = Teller(console, world.trail, driver._workflow)
    world.events.clear()
    finished = driver.run(author)
    for event in world.events:
        teller(event)
    teller.close(finished)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_patch_and_effect_are_shown_with_author_and_interval(world: World) -> None:
    assert "facts-1, attempt 1: done" in told(world)
    assert "facts: nothing to do" in told(world)
    output = told(world, UNSIGNED.replace("0.5", "0.1"), Author("mira", "try [bold] less"))
    assert "patched by mira" in output and "+      learning_rate: 0.1" in output
    assert "train (train): config: learning_rate 0.5 -> 0.1" in output
    assert "effect of mira: try [bold] less: improved" in output
    assert "-0.400 .. -0.400" in output and "95% interval" in output
    world.rows = "more"
    told(world, UNSIGNED, Author("otto", "back"))
    story = printed(*story_view(world.trail, "facts", with_diffs=True))
    assert "patched by otto: back" in story and "-      learning_rate: 0.1" in story
    assert "not by the patch alone: what goes into refine changed too" in story
    assert [word in printed(workflows_table(world.trail)) for word in ("facts-3", "done")] == [True, True]
    assert "learning_rate: 0.5" in printed(*run_view(world.trail, "facts-3"))


def test_failure_and_waiting_say_what_to_do(world: World) -> None:
    world.breaks["train"] = RuntimeError("no [memory]")
    output = told(world, WORKFLOW)
    assert "train failed: RuntimeError: no [memory]" in output
    assert "Go on afterwards with: trailmark run --resume facts" in output
    output = told(world, WORKFLOW)
    assert "attempt 2: the one before was failed" in output
    assert "trailmark approve facts-1 sign-off --as NAME [--reject] [--note WHY]" in output
    assert "facts: still waiting; nothing was done" in told(world, WORKFLOW)
    driver = world.driver(WORKFLOW)
    assert "2 of mira, otto, operator must approve" in printed(plan_table(driver._workflow, driver.plan()))


def test_approve_shows_what_it_signs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_HOME", str(world.trail.home))
    monkeypatch.setenv("COLUMNS", "200")
    told(world, WORKFLOW)
    call = ["approve", "facts", "sign-off", "--as", "otto"]
    refused = CliRunner().invoke(app, [*call, "--reject", "--note", "loss is high"], catch_exceptions=False)
    assert refused.exit_code == 0 and "refused by otto" in refused.output and "loss 2.000 -> 0.555" in refused.output
    story = CliRunner().invoke(app, ["workflow", "log", "facts"], catch_exceptions=False).output
    assert "sign-off refused by otto: loss is high" in story
