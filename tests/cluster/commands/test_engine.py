"""`trailmark engine bench`: a run on the tiny base, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from configs import env
from configs.errors import UserError

SMALL = ["--sequences", "3", "--in", "6", "--out", "4", "--threads", "1"]


def test_a_run_prints_its_figures(tiny_base: Path) -> None:
    arguments = ["engine", "bench", "--base", str(tiny_base), *SMALL, "--adapters", "3", "--law", "distinct"]
    done = CliRunner().invoke(app, [*arguments, "--rank", "2,4", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert printed["measured"]["num_output_tokens"] == 12
    assert printed["measured"]["num_distinct_adapters"] == 3
    assert printed["load"]["law"] == "distinct"
    assert set(printed["measured"]["inter_token_ms"]) == {"p50", "p90", "p99", "max"}
    table = CliRunner().invoke(app, ["engine", "bench", "--base", str(tiny_base), *SMALL], catch_exceptions=False)
    assert "the base alone" in table.stdout
    assert "time to first token" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--law", "fair"], "--law 'fair'"),
        (["--rank", "8,x"], "--rank '8,x'"),
        (["--modules", "lm_head"], "'lm_head'"),
        (["--dtype", "int4"], "dtype='int4'"),
        (["--adapters", "2", "--law", "distinct"], "2"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_base: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CliRunner().invoke(
            app, ["engine", "bench", "--base", str(tiny_base), *SMALL, *arguments], catch_exceptions=False
        )


def test_no_prompt_is_spared_by_the_warm_up(tiny_base: Path) -> None:
    """Prompts of more than a KV block, which a prefix cache would find again."""
    arguments = ["engine", "bench", "--base", str(tiny_base), "--sequences", "3", "--in", "40", "--out", "4"]
    done = CliRunner().invoke(app, [*arguments, "--threads", "1", "--json"], catch_exceptions=False)
    stats = json.loads(done.stdout)["measured"]["stats"]
    assert stats["prefix_hit_tokens"] == 0
    assert stats["num_prefill_tokens"] == 2 * 3 * 40


def test_without_a_base_the_remedy_is_named(tmp_path: Path) -> None:
    with (
        env.temporary_variables({"TRAILMARK_HOME": str(tmp_path)}),
        pytest.raises(UserError, match=r"give --base FOLDER, or run `make demo`"),
    ):
        CliRunner().invoke(app, ["engine", "bench"], catch_exceptions=False)
