"""Workflow files: what is read, and an error for each way to get one wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.workflow import Workflow
from configs.workflow_file import load_workflow, parse_workflow, workflow_presets

GOOD: dict[str, Any] = {
    "name": "facts",
    "seed": 3,
    "settings": {"train": {"rank": 4}},
    "steps": {
        "publish": {"kind": "publish", "artefact": "${train.adapter}", "after": ["benchmark"]},
        "train": {"kind": "train", "dataset": "${refine.dataset}", "settings": {"epochs": 2}},
        "benchmark": {"kind": "benchmark", "adapter": "${train.adapter}", "suite": "q.jsonl", "settings": {"seed": 9}},
        "refine": {"kind": "refine"},
    },
}


def parsed(value: dict[str, Any], *overrides: str) -> Workflow:
    return parse_workflow(value, source="w.yaml", folder=Path("/"), overrides=overrides)


def changed(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(GOOD)
    *names, last = path.split(".")
    place = result
    for name in names:
        place = place[name]
    place[last] = value
    return result


def test_order_follows_the_inputs_not_the_file() -> None:
    workflow = parsed(GOOD)
    assert workflow.order() == ["refine", "train", "benchmark", "publish"]
    assert workflow.followers("train") == {"train", "benchmark", "publish"}
    assert workflow.needs("publish") == ("train", "benchmark")


def test_settings_of_a_step_lie_over_the_workflows_and_its_seed() -> None:
    settings = parsed(GOOD).settings
    assert (settings["train"].train.rank, settings["train"].train.epochs, settings["train"].train.seed) == (4, 2, 3)
    assert settings["benchmark"].benchmark.seed == 9


def test_set_changes_the_definition() -> None:
    workflow = parsed(GOOD, "steps.train.settings.rank=2", "steps.refine.datasets=[a, b]", "seed=null")
    assert workflow.settings["train"].train.rank == 2 and workflow.settings["train"].train.seed == 0
    assert yaml.safe_load(workflow.text)["steps"]["refine"]["datasets"] == ["a", "b"]
    assert GOOD["steps"]["refine"] == {"kind": "refine"}, "what was given is left alone"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("setps", {}, "w.yaml: setps: no such key; did you mean 'steps'?"),
        ("steps.train.datset", "x", "w.yaml: steps.train.datset: no such key; did you mean 'dataset'?"),
        ("steps.train.kind", "trian", "steps.train.kind = 'trian': no such kind of step; did you mean 'train'?"),
        (
            "steps.train.kind",
            "settle",
            "steps.train.adapter: missing; give it",
        ),
        ("steps.train.dataset", "${refin.dataset}", "no such step 'refin'; did you mean 'refine'?"),
        ("steps.train.dataset", "${refine.rows}", "step 'refine' makes no 'rows'; known here: dataset"),
        ("steps.train.dataset", "${train.adapter}", "is of kind 'adapter'; this input takes 'refined'"),
        ("steps.train.dataset", "x${refine.dataset}", "write ${STEP.OUTPUT}, and nothing beside it"),
        (
            "steps.train.after",
            ["publish"],
            "steps: publish needs train, which needs publish; remove one of these inputs",
        ),
        ("steps.publish.after", ["bench"], "steps.publish.after: no such step 'bench'; did you mean 'benchmark'?"),
        ("steps.train.settings", {"rnk": 1}, "steps.train.settings.rnk: no such key; did you mean 'rank'?"),
        ("steps.train.settings", {"rank": 0}, "steps.train.settings.rank = 0: input should be greater than"),
        ("settings.train", {"rnk": 1}, "w.yaml: settings: train.rnk: no such setting; did you mean 'train.rank'?"),
        ("steps.benchmark", {"kind": "benchmark", "adapter": "a"}, "steps.benchmark.suite: missing; JSON lines"),
        ("steps.refine", {}, "steps.refine.kind: missing; kinds: refine, train"),
        ("steps", {}, "steps = {}: dictionary should have at least 1 item"),
        ("name", "Facts", "name = 'Facts': use a-z, 0-9"),
    ],
)
def test_mistakes_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(changed(path, value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set 'seed': write KEY=VALUE"),
        ("steps.trian.name=x", "--set steps.trian.name: no such step 'trian'; did you mean 'train'?"),
        ("name.first=x", "--set name.first: name is 'facts', which holds no keys"),
        ("seed=[", "is not valid YAML"),
    ],
)
def test_mistakes_in_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(GOOD, override)
    assert message in str(caught.value)


def test_presets_load_and_a_missing_file_lists_them(tmp_path: Path) -> None:
    assert workflow_presets() == ["adapter", "signed-adapter"]
    for name in workflow_presets():
        workflow, file = load_workflow(name)
        assert workflow.folder == Path.cwd() and file.name == f"{name}.yaml"
    with pytest.raises(UserError, match="no such file, nor a preset; presets: adapter, signed-adapter"):
        load_workflow("adaptr")
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_workflow(bad)
    bad.write_text("name: a\nsteps:\n  r: {kind: refine}\n  r: {kind: refine, datasets: [mira]}\n")
    with pytest.raises(UserError, match="line 4: key 'r' stands in line 3 already"):
        load_workflow(bad)
    merged = "name: a\nsteps:\n  r: &r {kind: refine, datasets: [mira]}\n  s: {<<: *r, datasets: [otto]}\n"
    bad.write_text(merged)
    assert set(load_workflow(bad)[0].steps) == {"r", "s"}, "what a merge brings may be said otherwise"
    bad.write_text("- a")
    with pytest.raises(UserError, match="holds a list; a workflow is a mapping of name, base"):
        load_workflow(bad)
