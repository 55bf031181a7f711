"""Workflows: steps with named inputs and outputs, one frozen model per kind of step (read by workflow_file.py).

A step's input is a name or digest, or `${STEP.OUTPUT}`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from configs.errors import UserError
from configs.schema import Section, Settings

REFERENCE = re.compile(r"\$\{([^.{}]*)\.([^{}]*)\}")
ANY = "any"


class Step(Section):
    """What every kind of step has. `takes`: field -> kind of artefact; `makes`: output -> kind of artefact."""

    takes: ClassVar[Mapping[str, str]] = {}
    makes: ClassVar[Mapping[str, str]] = {}
    section: ClassVar[str] = ""

    after: tuple[str, ...] = Field((), description="steps that must have ended well before this one")

    def references(self) -> dict[str, tuple[str, ...]]:
        """Return the values of each field that may name another step's output."""
        values = {field: getattr(self, field) for field in self.takes}
        return {field: value if isinstance(value, tuple) else (value,) for field, value in values.items()}


class RefineStep(Step):
    """Contributions become one refined dataset."""

    makes: ClassVar[Mapping[str, str]] = {"dataset": "refined"}
    section: ClassVar[str] = "refine"

    datasets: tuple[str, ...] = Field(("all",), min_length=1, description="contributions by name, digest or leaf hash")
    name: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class TrainStep(Step):
    """A refined dataset becomes an adapter."""

    takes: ClassVar[Mapping[str, str]] = {"dataset": "refined"}
    makes: ClassVar[Mapping[str, str]] = {"adapter": "adapter", "trace": "trace"}
    section: ClassVar[str] = "train"

    dataset: str
    name: str | None = None
    base: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class BenchmarkStep(Step):
    """An adapter is measured against its base on held-out questions."""

    takes: ClassVar[Mapping[str, str]] = {"adapter": "adapter"}
    makes: ClassVar[Mapping[str, str]] = {"result": "table"}
    section: ClassVar[str] = "benchmark"

    adapter: str
    suite: str = Field(description="JSON lines; relative to the workflow file")
    settings: dict[str, Any] = Field(default_factory=dict)


class SettleStep(Step):
    """What the players behind an adapter are worth is measured by training coalitions of them again."""

    takes: ClassVar[Mapping[str, str]] = {"adapter": "adapter"}
    makes: ClassVar[Mapping[str, str]] = {"values": "table"}
    section: ClassVar[str] = "settle"

    adapter: str
    suite: str = Field(description="JSON lines; relative to the workflow file")
    over: Literal["contributors", "datasets", "rules"] = "contributors"
    settings: dict[str, Any] = Field(default_factory=dict)


class PublishStep(Step):
    """An artefact becomes the next version of a name."""

    takes: ClassVar[Mapping[str, str]] = {"artefact": ANY}
    makes: ClassVar[Mapping[str, str]] = {"version": ANY}

    artefact: str
    name: str | None = None


class ApprovalStep(Step):
    """People look at artefacts and sign that they may go on."""

    takes: ClassVar[Mapping[str, str]] = {"of": ANY}
    makes: ClassVar[Mapping[str, str]] = {"approval": "approval"}

    of: tuple[str, ...] = Field(min_length=1)
    approvers: tuple[str, ...] = Field(min_length=1, description="contributors' names, or roles of this workflow")
    required: int | None = Field(None, ge=1, description="how many of them must approve; all by default")


STEP_KINDS: dict[str, type[Step]] = {
    "refine": RefineStep,
    "train": TrainStep,
    "benchmark": BenchmarkStep,
    "approval": ApprovalStep,
    "publish": PublishStep,
    "settle": SettleStep,
}


@dataclass(frozen=True)
class Workflow:
    """A checked workflow. `settings` holds, per step, the settings it runs with; `definition` is what was written."""

    name: str
    base: str
    roles: Mapping[str, tuple[str, ...]]
    steps: Mapping[str, Step]
    settings: Mapping[str, Settings]
    folder: Path
    definition: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The definition as YAML: what runs, without comments and layout."""
        return yaml.safe_dump(dict(self.definition), sort_keys=False, allow_unicode=True, width=120)

    def kind_of(self, name: str) -> str:
        """Return the kind of a step."""
        return str(self.definition["steps"][name]["kind"])

    def needs(self, name: str) -> tuple[str, ...]:
        """Return the steps that must have ended well before `name`, each once."""
        step = self.steps[name]
        values = [value for values in step.references().values() for value in values]
        found = [match[1] for value in values if (match := REFERENCE.fullmatch(value))]
        return tuple(dict.fromkeys([*found, *step.after]))

    def order(self) -> list[str]:
        """Return the steps so that each comes after those it needs, else as the file has them."""
        left, ordered = list(self.steps), list[str]()
        while left:
            ready = next((name for name in left if set(self.needs(name)) <= set(ordered)), None)
            if ready is None:
                raise UserError(f"workflow {self.name!r}: steps: {_cycle(self, left)}; remove one of these inputs")
            left.remove(ready)
            ordered.append(ready)
        return ordered

    def followers(self, name: str) -> set[str]:
        """Return `name` and every step that needs it, directly or not."""
        found = {name}
        for step in self.order():
            if found & set(self.needs(step)):
                found.add(step)
        return found

    def people(self, approvers: Sequence[str]) -> tuple[str, ...]:
        """Return the names that a list of names and roles means, each once."""
        return tuple(dict.fromkeys(name for item in approvers for name in self.roles.get(item, (item,))))


def _cycle(workflow: Workflow, names: Sequence[str]) -> str:
    """A cycle among steps that wait for each other, as `a needs b, which needs a`."""
    path = [names[0]]
    while path[-1] not in path[:-1]:
        path.append(next(need for need in workflow.needs(path[-1]) if need in names))
    loop = path[path.index(path[-1]) :]
    return f"{loop[0]} needs " + ", which needs ".join(loop[1:])
