"""Reading a workflow file: what it gets wrong is a `UserError` that says where, what and how to put it right.

Unknown names are told the nearest known one.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import UserError
from configs.schema import (
    BenchmarkSettings,
    RefineSettings,
    Section,
    Settings,
    SettleSettings,
    TrainSettings,
    parse_settings,
)
from configs.workflow import ANY, REFERENCE, STEP_KINDS, Step, Workflow
from configs.yaml_file import load_yaml

WORKFLOWS_DIRECTORY = Path(__file__).parent / "workflows"
NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
NAME_RULE = "a-z, 0-9, '_' and '-', a letter or digit at both ends, at most 64 characters"
Model = TypeVar("Model", bound=BaseModel)
SECTIONS: dict[str, type[Section]] = {
    "refine": RefineSettings,
    "train": TrainSettings,
    "benchmark": BenchmarkSettings,
    "settle": SettleSettings,
}


class _Head(Section):
    """The keys of a workflow file."""

    name: str
    base: str | None = None
    seed: int | None = Field(None, ge=0, description="of training and benchmark, where they do not set their own")
    settings: dict[str, Any] = Field(default_factory=dict)
    roles: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = Field(min_length=1)


def load_workflow(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Workflow, Path]:
    """Return the workflow of a YAML file, or of a preset by its name, with `KEY=VALUE` overrides, and its file.

    Raises:
        UserError: no such file, not YAML, an unknown key, kind, step or output, or steps that need each other.
    """
    file = _resolve(path)
    loaded = load_yaml(file)
    folder = Path.cwd() if file.parent == WORKFLOWS_DIRECTORY else file.parent
    return parse_workflow(loaded, source=str(file), folder=folder.resolve(), overrides=overrides), file.resolve()


def parse_workflow(value: object, *, source: str, folder: Path, overrides: Sequence[str] = ()) -> Workflow:
    """Return the workflow of a loaded mapping; relative suites lie below `folder`, `source` names it in errors."""
    if not isinstance(value, dict):
        raise UserError(
            f"{source}: holds a {type(value).__name__}; a workflow is a mapping of {', '.join(_Head.model_fields)}"
        )
    definition = _overridden(value, overrides)
    head = _validated(_Head, definition, f"{source}: ")
    if not NAME.fullmatch(head.name):
        raise UserError(f"{source}: name = {head.name!r}: use {NAME_RULE}")
    base = Settings() if not head.settings else parse_settings(head.settings, source=f"{source}: settings")
    steps = {name: _step(name, raw, source) for name, raw in head.steps.items()}
    settings = {name: _settings(head, name, step, source) for name, step in steps.items()}
    workflow = Workflow(head.name, head.base or base.base.source, head.roles, steps, settings, folder, definition)
    for name in steps:
        _check_references(workflow, name, source)
    workflow.order()
    return workflow


def workflow_presets() -> list[str]:
    """Return the names `load_workflow` knows without a path."""
    return sorted(file.stem for file in WORKFLOWS_DIRECTORY.glob("*.yaml"))


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `did you mean 'x'?`, or the known names where none is near."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known) or 'none'}"


def _resolve(path: Path | str) -> Path:
    file, preset = Path(path), WORKFLOWS_DIRECTORY / f"{path}.yaml"
    if file.is_file():
        return file
    if file.name == str(path) and preset.is_file():
        return preset
    raise UserError(f"workflow {str(path)!r}: no such file, nor a preset; presets: {', '.join(workflow_presets())}")


def _overridden(value: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the mapping in which each `a.b.c=VALUE` holds; VALUE is YAML."""
    changed = copy.deepcopy(dict(value))
    for text in overrides:
        key, found, given = text.partition("=")
        if not found or not key:
            raise UserError(f"--set {text!r}: write KEY=VALUE, for example steps.train.settings.rank=4")
        place, names = changed, key.split(".")
        for depth, name in enumerate(names[:-1]):
            if names[0] == "steps" and depth == 1 and name not in place:
                raise UserError(f"--set {key}: no such step {name!r}; {nearest(name, list(place))}")
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {key}: {'.'.join(names[: depth + 1])} is {place!r}, which holds no keys")
        try:
            place[names[-1]] = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise UserError(f"--set {key}: {given!r} is not valid YAML") from error
    return changed


def _step(name: str, raw: Mapping[str, Any], source: str) -> Step:
    where = f"{source}: steps.{name}"
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: a step's name has {NAME_RULE}")
    kind = raw.get("kind")
    if kind is None:
        raise UserError(f"{where}.kind: missing; kinds: {', '.join(STEP_KINDS)}")
    if kind not in STEP_KINDS:
        raise UserError(f"{where}.kind = {kind!r}: no such kind of step; {nearest(str(kind), list(STEP_KINDS))}")
    values = {field: value for field, value in raw.items() if field != "kind"}
    return _validated(STEP_KINDS[kind], values, f"{where}.")


def _settings(head: _Head, name: str, step: Step, source: str) -> Settings:
    """The workflow's settings with the step's own on top; the workflow's seed stands between."""
    section = step.section
    if not section:
        return parse_settings(head.settings, source=f"{source}: settings")
    seed = {"seed": head.seed} if head.seed is not None and "seed" in SECTIONS[section].model_fields else {}
    own = getattr(step, "settings", {})
    _validated(SECTIONS[section], own, f"{source}: steps.{name}.settings.")
    merged = {**head.settings, section: {**(head.settings.get(section) or {}), **seed, **own}}
    return parse_settings(merged, source=f"{source}: steps.{name}.settings")


def _check_references(workflow: Workflow, name: str, source: str) -> None:
    step = workflow.steps[name]
    for other in step.after:
        if other not in workflow.steps:
            raise UserError(
                f"{source}: steps.{name}.after: no such step {other!r}; {nearest(other, list(workflow.steps))}"
            )
    for field, values in step.references().items():
        for value in values:
            where = f"{source}: steps.{name}.{field} = {value!r}"
            _check_reference(workflow, value, step.takes[field], where)


def _check_reference(workflow: Workflow, value: str, wanted: str, where: str) -> None:
    match = REFERENCE.fullmatch(value)
    if match is None:
        if "${" in value:
            raise UserError(f"{where}: write ${{STEP.OUTPUT}}, and nothing beside it")
        return
    other, output = match.groups()
    if other not in workflow.steps:
        raise UserError(f"{where}: no such step {other!r}; {nearest(other, list(workflow.steps))}")
    makes = workflow.steps[other].makes
    if output not in makes:
        raise UserError(f"{where}: step {other!r} makes no {output!r}; {nearest(output, list(makes))}")
    if ANY not in (wanted, makes[output]) and makes[output] != wanted:
        raise UserError(f"{where}: is of kind {makes[output]!r}; this input takes {wanted!r}")


def _validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}{_explain(detail, model)}" for detail in error.errors())) from error


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{field}: no such key; {nearest(field, list(model.model_fields))}"
    if detail["type"] == "missing":
        return f"{field}: missing; {model.model_fields[field].description or 'give it'}"
    return f"{field} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
