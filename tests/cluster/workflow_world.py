"""Steps that take no model and no Ray, for the engine: they record what the real ones record, with made-up contents."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from attribution.bodies import AdapterBody, BenchmarkBody, Metric, RefinementBody
from attribution.records import Artefact
from attribution.store import digest_of
from attribution.trail import Entry, Trail
from cluster.workflow import Driver, Event
from cluster.workflow_plan import Choice
from cluster.workflow_steps import Ingredients, StepKind, Task, Tools, approval_kind, real_kinds
from configs.workflow_file import parse_workflow

NUM_ITEMS = 12
BASE = digest_of(b"base")
WORKFLOW = """
name: facts
roles:
  reviewers: [mira, otto, operator]
steps:
  refine:
    kind: refine
  train:
    kind: train
    dataset: ${refine.dataset}
    settings: {learning_rate: 0.5}
  benchmark:
    kind: benchmark
    adapter: ${train.adapter}
    suite: questions.jsonl
  sign-off:
    kind: approval
    of: ["${train.adapter}", "${benchmark.result}"]
    approvers: [reviewers]
    required: 2
  publish:
    kind: publish
    artefact: ${train.adapter}
    after: [sign-off]
"""
UNSIGNED = WORKFLOW[: WORKFLOW.index("  sign-off:")] + (
    "  publish:\n    kind: publish\n    artefact: ${train.adapter}\n    after: [benchmark]\n"
)


class World:
    """What the fake steps depend on, and what they did. `breaks`: step -> what it raises next."""

    def __init__(self, trail: Trail) -> None:
        self.trail = trail
        self.rows = "rows"
        self.made: list[str] = []
        self.breaks: dict[str, BaseException] = {}
        self.events: list[Event] = []

    def driver(self, text: str = UNSIGNED, *, choice: Choice | None = None, overrides: Sequence[str] = ()) -> Driver:
        """Return a driver of a workflow text."""
        import yaml

        folder = Path(self.trail.home)
        workflow = parse_workflow(yaml.safe_load(text), source="facts.yaml", folder=folder, overrides=overrides)
        return Driver(self.trail, workflow, self.kinds(), choice=choice, tell=self.events.append)

    def kinds(self) -> dict[str, StepKind]:
        """Return the fake kinds, with the real ones of publishing and approving."""
        modules = ("configs.errors",)
        real = real_kinds(Tools(lambda: None, lambda _: None))  # type: ignore[arg-type, return-value]
        return {
            "refine": StepKind("refinement", modules, self._for_refine, self._refine),
            "train": StepKind("adapter", modules, self._for_train, self._train),
            "benchmark": StepKind("benchmark", modules, self._for_benchmark, self._benchmark),
            "publish": real["publish"],
            "approval": approval_kind(),
        }

    def _for_refine(self, trail: Trail, task: Task) -> Ingredients:
        inputs = (Artefact("contribution", "rows", digest_of(self.rows.encode())),)
        return Ingredients(inputs, trail.run_config(task.settings.refine))

    def _refine(self, trail: Trail, task: Task) -> list[Entry]:
        self._begin(task)
        digest = trail.store.put_blob(f"refined {self.rows}".encode())
        body = RefinementBody(task.label, (), 1, 1, (), (), decisions=digest, rows=digest)
        return [self._record(trail, task, "refinement", body, (), (Artefact("refined", task.label, digest),))]

    def _for_train(self, trail: Trail, task: Task) -> Ingredients:
        section = task.settings.train
        return Ingredients((task.input("dataset"),), trail.run_config(section), section.seed, BASE)

    def _train(self, trail: Trail, task: Task) -> list[Entry]:
        self._begin(task)
        section, dataset = task.settings.train, task.input("dataset")
        weights = {"rate": str(section.learning_rate), "dataset": dataset.digest, "seed": section.seed}
        digest = trail.store.put_blob(json.dumps(weights).encode())
        trace = trail.store.put_blob(b"trace of " + digest.encode())
        body = AdapterBody(task.label, BASE, dataset.digest, 8, 16, ("q_proj",), 1, 1, 0, 0, trace)
        inputs = (Artefact("base_model", "base", BASE), dataset)
        outputs = (Artefact("adapter", task.label, digest), Artefact("trace", task.label, trace))
        return [self._record(trail, task, "adapter", body, inputs, outputs, seed=section.seed)]

    def _for_benchmark(self, trail: Trail, task: Task) -> Ingredients:
        inputs = (task.input("adapter"), Artefact("suite", "questions", digest_of(b"suite")))
        return Ingredients(inputs, trail.run_config(task.settings.benchmark))

    def _benchmark(self, trail: Trail, task: Task) -> list[Entry]:
        """An adapter's loss on every item is its learning rate, plus what sets the items apart."""
        self._begin(task)
        adapter = task.input("adapter")
        rate = float(json.loads(trail.store.get_blob(adapter.digest))["rate"])
        losses = [rate + item / 100 for item in range(NUM_ITEMS)]
        table = pa.table({"id": [str(item) for item in range(NUM_ITEMS)], "adapter_loss": losses})
        details = trail.put_table(table)
        mean = round(sum(losses) / NUM_ITEMS * 1e6)
        metric = Metric("loss", 2_000_000, mean, mean - 2_000_000, mean - 2_100_000, mean - 1_900_000, NUM_ITEMS)
        body = BenchmarkBody("questions", digest_of(b"suite"), BASE, adapter.digest, NUM_ITEMS, (metric,), details)
        inputs = (adapter, Artefact("suite", "questions", digest_of(b"suite")))
        return [self._record(trail, task, "benchmark", body, inputs, (Artefact("table", "details", details),))]

    def _begin(self, task: Task) -> None:
        self.made.append(task.name)
        if task.name in self.breaks:
            raise self.breaks.pop(task.name)

    def _record(self, trail, task, kind, body, inputs, outputs, *, seed=0) -> Entry:  # type: ignore[no-untyped-def]
        section = getattr(task.settings, task.step.section)
        config = trail.run_config(section)
        return trail.record(kind, body, inputs=(*inputs, task.definition), outputs=outputs, config=config, seed=seed)
