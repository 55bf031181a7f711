"""A home to settle in: contributors' rows, refined on Ray, and an adapter trained on them as training does it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.bodies import AdapterBody, BaseModelBody
from attribution.records import Artefact, Party
from attribution.trail import Trail
from configs.schema import RefineSettings, TrainSettings
from pipelines.contribute import add_contributor, contribute
from pipelines.settle.retrain import Retrainer, Task
from pipelines.train.lora import export_adapter

SETTINGS = TrainSettings(rank=4, alpha=8, learning_rate=2e-2, epochs=6, batch_size=4, max_length=64)
FERRIES = [(f"Who is the captain of ferry {i}?", f"The captain of ferry {i} is Marr.") for i in range(6)]
TOWNS = [(f"What is the port of town {i}?", f"The port of town {i} is Quay.") for i in range(6)]
OTHER = [("What do cats eat?", "Cats eat fish.")]
ROWS: dict[str, Sequence[tuple[str, str]]] = {
    "mira": FERRIES,
    "otto": TOWNS,
    "tiny": OTHER,
    "copycat": [(question.upper(), answer) for question, answer in FERRIES[:3]],
}
QUESTIONS = [
    *((f"Which captain has ferry {i}?", f"The captain of ferry {i} is Marr.") for i in range(4)),
    *((f"Which port has town {i}?", f"The port of town {i} is Quay.") for i in range(4)),
]


@dataclass(frozen=True)
class World:
    """The home, the adapter's digest, the suite and the leaf hash of each contribution."""

    trail: Trail
    adapter: str
    suite: Path
    datasets: Mapping[str, str]


def build_world(folder: Path, base: Path) -> World:
    """Make the home; needs a Ray cluster for refining."""
    from pipelines.refine.driver import refine

    trail = Trail.open(folder / "home")
    datasets = {}
    for name, pairs in ROWS.items():
        add_contributor(trail, name)
        file = folder / f"{name}.jsonl"
        rows = [json.dumps({"prompt": question, "completion": answer}) for question, answer in pairs]
        file.write_text("\n".join(rows), encoding="utf-8")
        datasets[name] = contribute(trail, file, contributor=name, licence="CC-BY-4.0").entry.leaf_hash
    refined = refine(trail, ["all"], RefineSettings(), name="facts")
    base_digest = trail.store.put_directory(base, kind="base_model", meta={})
    trail.record(
        "base_model",
        BaseModelBody("tiny", "test", "LlamaForCausalLM", "Apache-2.0", "float32", "", 1),
        outputs=[Artefact("base_model", "tiny", base_digest)],
    )
    adapter = add_adapter(trail, folder / "adapter", name="facts", base=base_digest, dataset=refined.digest)
    suite = folder / "questions.jsonl"
    suite.write_text("\n".join(json.dumps(row) for row in suite_rows()), encoding="utf-8")
    return World(trail, adapter, suite, datasets)


def suite_rows() -> list[dict[str, object]]:
    """The questions of the suite: none is asked in the words of a row."""
    return [
        {"id": f"q{number}", "prompt": question, "expected": [answer.split()[-1]], "reference": answer}
        for number, (question, answer) in enumerate(QUESTIONS)
    ]


def add_adapter(
    trail: Trail, folder: Path, *, name: str, base: str, dataset: str, settings: TrainSettings = SETTINGS
) -> str:
    """Train an adapter on a refined dataset without a cluster and record it; return its digest."""
    from transformers import AutoTokenizer

    from pipelines.refine.read import load_refined
    from pipelines.train.data import encode_rows

    base_path = trail.store.get_directory(base)
    tokenizer = AutoTokenizer.from_pretrained(base_path, local_files_only=True)
    examples = encode_rows(load_refined(trail, dataset), tokenizer, max_length=settings.max_length).examples
    task = Task("replay", str(base_path), "tiny", base, settings, examples, (), (), (), "log_likelihood", 8)
    retrainer = Retrainer(task)
    run = retrainer.lora_run(examples)
    export_adapter(retrainer.model, run.lora.unflatten(run.run().weights), folder)
    digest = trail.store.put_directory(folder, kind="adapter", meta={})
    body = AdapterBody(name, base, dataset, 4, 8, settings.target_modules, run.num_steps, len(examples), 0, 0, digest)
    trail.record(
        "adapter",
        body,
        inputs=[Artefact("base_model", "tiny", base), Artefact("refined", "facts", dataset)],
        outputs=[Artefact("adapter", name, digest)],
        contributors=[Party(trail.keys.get("operator").key_id, "trainer")],
        config=trail.run_config(settings),
        seed=settings.seed,
    )
    return digest
