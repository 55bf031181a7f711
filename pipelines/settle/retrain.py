"""One process that makes coalitions into models and measures them on a suite's items. Free of Ray.

Shape legend: b coalitions, N rows, q items, p LoRA weights.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from attribution.influence.gradients import Encoded, target_log_likelihoods
from attribution.influence.replay import LoraRun, RunRecipe, RunState, RunStep
from configs.schema import TrainSettings
from pipelines.benchmark.suites import Item
from pipelines.settle.game import Bits, Game, Mode
from pipelines.settle.plan import SettlePlan
from pipelines.settle.subject import Subject
from pipelines.train.data import Example, learning_rate, plan_steps
from pipelines.train.lora import build_model, export_adapter, load_base

if TYPE_CHECKING:
    from attribution.trail import Trail

UtilityName = Literal["likelihood", "log_likelihood", "exact_match"]
UNITS: dict[str, str] = {
    "likelihood": "likelihood of the reference answer, probability per token",
    "log_likelihood": "log-likelihood of the reference answer, nats per token",
    "exact_match": "exact matches of the greedy answer",
}
ITEMS_AT_ONCE = 16


@dataclass(frozen=True)
class Task:
    """Everything a process needs to measure coalitions of one game; plain values, sent once."""

    mode: Mode
    base_path: str
    base_name: str
    base_digest: str
    settings: TrainSettings
    examples: tuple[Example, ...]
    adapter_paths: tuple[str, ...]
    items: tuple[Item, ...]
    encoded_items: tuple[Encoded, ...]
    utility: UtilityName
    max_new_tokens: int


@dataclass(frozen=True)
class Measured:
    """What came of one coalition: the utility of each item, the digest of the weights, and the seconds it took.

    Where likelihood is the utility, its logarithm stands here, as for log_likelihood: see `valued`.
    """

    utilities: tuple[float, ...]
    weights: str
    seconds: float


class Retrainer:
    """Holds a base model and measures coalitions on it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        device = "cuda" if task.settings.use_gpu and torch.cuda.is_available() else "cpu"
        base = load_base(task.base_path, dtype="float32", device=device)
        self._base = base
        self.model: Any = None if task.mode == "combine" else self._build(base)
        self._run: LoraRun | None = None

    def measure(self, chosen: Bits) -> list[Measured]:
        """Measure coalitions given by the rows (or adapters) they bring in, bool [b, N]."""
        if self.task.mode == "combine":
            return [self._combined(row) for row in chosen]
        if self.task.mode == "train":
            return [self._trained(row) for row in chosen]
        return self._replayed(chosen)

    def predicted_gains(self, chosen: Bits) -> NDArray[np.float64]:
        """Return [n, q]: what gradients say that each player's rows (bool [n, N]) did to each item."""
        from attribution.influence.group_gains import group_gains

        masks, of_likelihood = torch.from_numpy(chosen.astype(np.float32)), self.task.utility == "likelihood"
        found = group_gains(self._recorded_run(), masks, self.task.encoded_items, of_likelihood=of_likelihood)
        return np.asarray(found.double().numpy())

    def _recorded_run(self) -> LoraRun:
        if self._run is None:
            self._run = self.lora_run(self.task.examples)
        return self._run

    def _replayed(self, chosen: Bits) -> list[Measured]:
        """Runs of one schedule, each by itself: a cell is then the same bits whichever coalitions came with it.

        Stacked on one forward they would round otherwise, and Adam turns rounding into movement where gradients are
        small: with a rate of 2e-2 a coalition of one row moved by some 0.04 nats.
        """
        run, began = self._recorded_run(), time.perf_counter()
        state = run.run_many(torch.from_numpy(chosen.astype(np.float32)), runs_at_once=1)
        return self._all_measured(run, state, began)

    def _trained(self, chosen: Bits) -> Measured:
        """One run, planned for the rows that are left."""
        began = time.perf_counter()
        kept = [example for example, is_in in zip(self.task.examples, chosen, strict=True) if is_in]
        run = self.lora_run([replace(example, row=row) for row, example in enumerate(kept)])
        state = run.run() if kept else run.initial()
        many = RunState(state.step, state.weights[None], state.exp_avg[None], state.exp_avg_sq[None])
        return self._all_measured(run, many, began)[0]

    def lora_run(self, examples: Sequence[Example]) -> LoraRun:
        """The run that training would make of these rows; of none, a run of no steps on the first row."""
        steps = plan_steps(examples, self.task.settings)
        recipe = RunRecipe(
            steps=tuple(
                RunStep(step.rows, learning_rate(step.number, num_steps=len(steps), settings=self.task.settings))
                for step in steps
            ),
            weight_decay=self.task.settings.weight_decay,
            max_grad_norm=self.task.settings.max_grad_norm,
        )
        return LoraRun(self.model, [example.encoded for example in examples or self.task.examples[:1]], recipe)

    def _all_measured(self, run: LoraRun, state: RunState, began: float) -> list[Measured]:
        utilities = self._utilities(run, state)
        digests = [_digest(weights) for weights in state.weights]
        seconds = (time.perf_counter() - began) / len(digests)
        return [Measured(tuple(row), digest, seconds) for row, digest in zip(utilities, digests, strict=True)]

    def _utilities(self, run: LoraRun, state: RunState) -> list[list[float]]:
        if self.task.utility != "exact_match":
            found: list[list[float]] = (-run.query_losses(state, self.task.encoded_items).double()).tolist()
            return found
        with tempfile.TemporaryDirectory(prefix="trailmark-settle-") as folder:
            paths = []
            for number, weights in enumerate(state.weights):
                paths.append(Path(folder) / str(number))
                export_adapter(self.model, run.lora.unflatten(weights), paths[-1])
            return self._exact_matches(paths)

    def _exact_matches(self, adapters: Sequence[Path]) -> list[list[float]]:
        from pipelines.settle.answers import greedy_answers, matches

        task = self.task
        answers = greedy_answers(
            task.items,
            adapters,
            base_path=task.base_path,
            base_digest=task.base_digest,
            max_new_tokens=task.max_new_tokens,
        )
        return [matches(task.items, texts) for texts in answers]

    def _combined(self, chosen: Bits) -> Measured:
        """The base with the chosen adapters added to it."""
        began = time.perf_counter()
        if self.model is None:
            self.model = self._with_adapters()
        names = [f"player{number}" for number in np.flatnonzero(chosen)]
        with torch.no_grad(), _active(self.model, names):
            losses = [
                -float(part.mean())
                for start in range(0, len(self.task.encoded_items), ITEMS_AT_ONCE)
                for part in target_log_likelihoods(self.model, self.task.encoded_items[start : start + ITEMS_AT_ONCE])
            ]
        weights = hashlib.sha256(
            "+".join(Path(self.task.adapter_paths[number]).name for number in np.flatnonzero(chosen)).encode()
        )
        return Measured(tuple(-loss for loss in losses), f"sha256:{weights.hexdigest()}", time.perf_counter() - began)

    def _with_adapters(self) -> Any:
        from peft import PeftModel

        first, *others = self.task.adapter_paths
        model = PeftModel.from_pretrained(self._base, first, adapter_name="player0")  # type: ignore[arg-type]
        for number, path in enumerate(others, start=1):
            model.load_adapter(path, adapter_name=f"player{number}")
        return model.eval()

    def _build(self, base: Any) -> Any:
        return build_model(base, base_name=self.task.base_name, settings=self.task.settings).eval()


def task_of(trail: "Trail", subject: Subject, game: Game, plan: SettlePlan, *, items: tuple[Item, ...]) -> Task:
    """Return what a process needs to measure coalitions of a game."""
    return Task(
        mode=game.mode,
        base_path=str(subject.adapter.base_path),
        base_name=subject.adapter.base_name,
        base_digest=subject.adapter.base_digest,
        settings=subject.settings,
        examples=game.examples,
        adapter_paths=tuple(str(trail.store.get_directory(digest)) for digest in game.adapters),
        items=items,
        encoded_items=encode_items(items, subject.adapter.base_path),
        utility=plan.utility,  # type: ignore[arg-type]
        max_new_tokens=plan.max_new_tokens,
    )


def measured_as(utility: str) -> str:
    """Return the utility that is measured, and kept, for another: one retrain serves likelihood and its logarithm."""
    return "log_likelihood" if utility == "likelihood" else utility


def valued(measured: Sequence[Measured], utility: str) -> NDArray[np.float64]:
    """Return the utilities [b, q] of what was measured; a likelihood is the geometric mean over an answer's tokens."""
    found = np.array([cell.utilities for cell in measured], dtype=np.float64)
    return np.exp(found) if utility == "likelihood" else found


def encode_items(items: Sequence[Item], base_path: Path) -> tuple[Encoded, ...]:
    """Return each item's question and reference answer as the base's tokens, the loss on the answer alone."""
    from transformers import AutoTokenizer

    from attribution.influence.encode import encode_example

    tokenizer = AutoTokenizer.from_pretrained(base_path, local_files_only=True)
    return tuple(
        encode_example(
            tokenizer,
            [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.reference}],
            max_length=None,
        )
        for item in items
    )


class _active:
    """A block in which these adapters, and no others, are added to the base."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model, self._names = model, list(names)

    def __enter__(self) -> None:
        self._off: Any = None
        if self._names:
            self.model.base_model.set_adapter(self._names)
        else:
            self._off = self.model.disable_adapter()
            self._off.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._off is not None:
            self._off.__exit__(*error)


def _digest(weights: torch.Tensor) -> str:
    return f"sha256:{hashlib.sha256(weights.detach().cpu().contiguous().numpy().tobytes()).hexdigest()}"


def chunks(chosen: NDArray[np.bool_], size: int) -> Iterator[NDArray[np.bool_]]:
    """Yield the coalitions so many at a time."""
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]
