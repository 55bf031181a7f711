"""Completions made with a registered prompt: what is refused, what the receipt says, what descends from it."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attribution.lineage_queries import LineageQueries
from attribution.log.verify import Trust, verify_bytes
from attribution.prompt_template import TemplateError, check_template, fill_in, variables_of
from attribution.receipt_file import ancestry_file, receipt_file
from attribution.receipts import ReceiptError, append_once, receipt_bundle, receipt_content
from attribution.trail import Trail
from benchmarks.log_verify import small_json
from cluster.cli import app
from pipelines.contribute import add_contributor
from pipelines.prompts import register_prompt
from tests.attribution.story import receipt_row, tell
from tests.serve_apps.published import Published
from tests.serve_apps.world import chat, error, opened


def test_templates() -> None:
    text = "You serve {{port}}, {{ port }} and {{_x1}}."
    assert variables_of(text) == ["port", "_x1"]
    assert fill_in(text, {"port": "{{_x1}}", "_x1": "y"}) == "You serve {{_x1}}, {{_x1}} and y."
    for variables, message in (({"port": "a"}, "missing: _x1"), ({"port": "a", "_x1": "b", "z": "c"}, "unknown: z")):
        with pytest.raises(TemplateError, match=message):
            fill_in(text, variables)
    for bad in (" \n", "x" * 70_000, "{{a b}}", "}} {{", "{{1}}"):
        with pytest.raises(TemplateError, match="template:"):
            check_template(bad)


def test_a_prompt_is_the_system_message_and_has_descendants(published: Published, tmp_path: Path) -> None:
    trail = published.trail
    add_contributor(trail, "mira")
    register_prompt(trail, "greeting", "Old.", contributor="mira")
    entry, _ = register_prompt(trail, "greeting", "You stand at {{port}}.", contributor="mira")

    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            named = {"id": "greeting", "version": "2", "variables": {"port": "Vellmoor"}}
            sent = chat(model="rank8-all", prompt=named)
            reply = (await client.post("/v1/chat/completions", json=sent)).json()
            first = {"id": "greeting", "version": "1"}
            old = await client.post("/v1/chat/completions", json=chat(model="rank8-all", prompt=first))
            plain = await client.post("/v1/chat/completions", json=chat(model="rank8-all"))
            assert world.receipts.flush(20)
            ids = [item["trailmark"]["receipt_id"] for item in (reply, old.json(), plain.json())]
            contents = [receipt_content(trail, receipt_id)["messages"] for receipt_id in ids]
            assert contents[0] == [{"role": "system", "content": "You stand at Vellmoor."}, *sent["messages"]]
            assert contents[1][0]["content"] == "Old." and contents[2] == sent["messages"]
            trust = Trust.load(trail.home / "trust.json")
            file, ancestry = receipt_file(trail, ids[0]), ancestry_file(trail, ids[0])
            verified = verify_bytes(small_json(file), trust=trust, ancestry=small_json(ancestry))
            assert any(check.startswith("prompt: greeting@2 is sha256:") for check in verified.checks)
            assert verified.facts["prompt"] == "greeting@2"
            assert "mira" in {person["name"] for person in verified.facts["contributors"]}
            assert verify_bytes(small_json(receipt_bundle(trail, ids[0])), trust=trust).facts["prompt"] == "greeting@2"
            bare = verify_bytes(small_json(receipt_bundle(trail, ids[2])), trust=trust)
            assert bare.facts["prompt"] is None and bare.facts["contributors"] == []
            served = await client.get(f"/v1/receipts/{ids[0]}/ancestry")
            assert served.json()["type"].endswith("/ancestry/v1")
            assert (await client.get(f"/v1/receipts/{ids[0]}/bundle")).json()["lineage"]
            assert len((await client.get(f"/v1/receipts/{ids[0]}")).content) < 4096

            answered = LineageQueries.of(trail).descendants(f"prompt:{entry.leaf_hash}", kinds=("completions",))
            parents = [trail.entry(item.leaf_hash).leaf.parents for item in answered.items]
            assert len(parents) == 1 and entry.leaf_hash in parents[0]
            for wrong, status, code in (
                ({"id": "greting"}, 404, "prompt_not_found"),
                ({"id": "greeting", "version": "9"}, 404, "prompt_not_found"),
                ({"id": "greeting"}, 400, "invalid_value"),
                ({"id": "greeting", "version": "v2"}, 400, "invalid_value"),
                ({"id": "greeting", "colour": "red"}, 400, "unknown_parameter"),
            ):
                refused = await client.post("/v1/chat/completions", json=chat(prompt=wrong))
                assert (refused.status_code, error(refused)["code"]) == (status, code), refused.text
            both = chat(prompt=named)
            both["messages"] = [{"role": "system", "content": "Be kind."}, *both["messages"]]
            refused = await client.post("/v1/chat/completions", json=both)
            assert error(refused)["param"] == "messages[0].role"

    asyncio.run(body())


def test_a_receipt_of_an_unregistered_prompt_is_refused(trail: Trail) -> None:
    story = tell(trail)
    row = receipt_row(trail, 50, story.base, story.adapter, 1)
    row.receipt["prompt_version"] = "nobody@1"
    with pytest.raises(ReceiptError, match=r"prompt_version: prompt 'nobody@1': not published"):
        append_once(trail, [row], replica="replica-0")


def test_the_command(trail: Trail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_HOME", str(trail.home))
    add_contributor(trail, "mira")
    (tmp_path / "greeting.txt").write_text("Speak to {{ name }} of {{port}}.\n")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    added = run("prompt", "add", str(tmp_path / "greeting.txt"), "--as", "mira")
    assert added.startswith("greeting@1: sha256:")
    named = json.loads("{" + added.splitlines()[1].partition(": ")[2] + "}")
    assert named == {"prompt": {"id": "greeting", "version": "1", "variables": {"name": "...", "port": "..."}}}
    assert run("prompt", "list").startswith("greeting@1 ")
    assert run("prompt", "show", "greeting") == "Speak to {{ name }} of {{port}}.\n"
    with pytest.raises(TemplateError, match="there are: mira"):
        run("prompt", "add", str(tmp_path / "greeting.txt"), "--as", "otto")
