"""What in-run scores are worth when the queries' gradients are refreshed every k steps, and what they cost.

    python -m benchmarks.in_run [--quick] [--check] [--out FILE] [--cache FOLDER]

Worth: in the lab of `benchmarks.attribution` (a tiny Llama, 320 rows, 40 queries, 80 steps) the run is taken again with
the recorder's scorer for each k; the linear datamodelling score of its scores against retrains is printed beside that
of k = 1. Subset lists are hashed before scores exist; retrains are cached in --cache and shared with the other programs
of that lab. Cost: training steps of a Llama as wide as SmolLM2-135M, three layers deep, with and without the scorer at
the k that `trailmark train` would choose for its query set, in CPU seconds of this process. The last line is one JSON
object.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.influence.gradients import Encoded, pad_batch, target_losses
from attribution.influence.in_run import QUERY_BATCH, InRunScorer
from attribution.influence.lds import Lds, Resamples, lds
from attribution.influence.run_facts import METHODS
from benchmarks.attribution.banks import DROPS, Bank, Plan, announce, make_bank, plan_banks
from benchmarks.attribution.lab import Lab, LabSettings
from configs.schema import TrainSettings
from pipelines.train.lora import build_model, trainable
from pipelines.train.queries import refresh_steps
from pipelines.train.trace import ADAM

MAX_OVERHEAD = 0.10
REFRESH_STEPS = (1, 2, 5, 10, 20, 40)
COST_ROWS, COST_QUERIES, COST_TOKENS = 8, 10, 64


@dataclass(frozen=True)
class Figure:
    """One measurement; `floor` is what it must not exceed (None: told for comparison)."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    floor: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether the floor is kept."""
        return self.floor is None or self.value <= self.floor


class ScoredRun:
    """One process that takes AdamW steps on a LoRA model and scores their rows, as a training worker does."""

    def __init__(self, model: nn.Module, queries: Sequence[Encoded], *, groups: Sequence[int], k: int) -> None:
        self._model, self._queries, self._k = model, queries, k
        self._parameters = trainable(model)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=0.0
        )
        self._scorer = InRunScorer(model, groups=groups, adam=ADAM)
        self._batches = [
            tuple(range(i, min(i + QUERY_BATCH, len(queries)))) for i in range(0, len(queries), QUERY_BATCH)
        ]
        self._preconditioned_at = 0

    def step(self, number: int, batch: Sequence[Encoded], *, lr: float, max_norm: float) -> Tensor:
        """Take update `number` (from 1); return the scores [2, n, q] of its rows."""
        refresh = (number - 1) % self._k == 0
        if refresh:
            self._scorer.take_query_gradients(self._model, self._queries, self._batches)
        with self._scorer.observing():
            norm = self.update(batch, lr=lr, max_norm=max_norm)
        if refresh or number >= 2 * self._preconditioned_at:
            second = [
                self._optimizer.state[self._parameters[name]]["exp_avg_sq"] for name in self._scorer.gradients.sizes
            ]
            self._scorer.precondition(torch.cat([moment.flatten() for moment in second]), number)
            self._preconditioned_at = number
        return self._scorer.scores(lr * min(1.0, max_norm / (norm + 1e-6)))

    def update(self, batch: Sequence[Encoded], *, lr: float, max_norm: float) -> float:
        """Take the update alone; return the gradient's norm."""
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.zero_grad()
        input_ids, labels, mask = pad_batch(batch)
        losses = target_losses(self._model, input_ids, labels, mask=mask)
        losses.mean().backward()
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), max_norm))
        self._optimizer.step()
        return norm


def in_run_scores(lab: Lab, k: int) -> NDArray[np.float64]:
    """Return [2, q, n]: the recorded run taken again, every query scored for itself, refreshed every `k` steps."""
    recipe = lab.recipe()
    run = ScoredRun(lab.model().train(), lab.queries, groups=range(len(lab.queries)), k=k)
    total = np.zeros((len(METHODS), len(lab.queries), len(lab.examples)))
    for number, step in enumerate(recipe.steps, start=1):
        batch = [lab.examples[row] for row in step.rows]
        scores = run.step(number, batch, lr=step.lr, max_norm=recipe.max_grad_norm)
        total[:, :, list(step.rows)] += scores.movedim(2, 1).double().numpy()
    return total


def worth(lab: Lab, plans: tuple[Plan, ...], *, cache: Path) -> list[Figure]:
    """Return the LDS of every k, and its paired difference from k = 1, on the banks of one lab."""
    banks = [make_bank(lab, plan, cache=cache) for plan in plans]
    found = {k: in_run_scores(lab, k) for k in REFRESH_STEPS}
    figures = []
    for bank in banks:
        resamples = Resamples.of(num_queries=len(lab.queries), num_subsets=len(bank.plan.kept))
        for m, method in enumerate(METHODS):
            scores = {k: _lds(bank, found[k][m], resamples) for k in REFRESH_STEPS}
            name = f"seed {lab.seed}, {bank.plan.name}, {method}"
            for k, value in scores.items():
                figures.append(_figure(f"{name}: LDS, k = {k}", value))
                if k > 1:
                    figures.append(_figure(f"{name}: less LDS of k = 1, k = {k}", value.minus(scores[1])))
    return figures


def cost(*, num_steps: int) -> list[Figure]:
    """Return how many CPU seconds scoring adds to a step, at the default k, with and without its refreshes."""
    draw = random.Random(0)
    rows = [_example(draw) for _ in range(COST_ROWS)]
    queries = [_example(draw) for _ in range(COST_QUERIES)]
    k = refresh_steps(COST_QUERIES * COST_TOKENS, tokens_per_step=COST_ROWS * COST_TOKENS)
    run = ScoredRun(_wide_model(), queries, groups=[0] * len(queries), k=k)
    run.step(1, rows, lr=1e-4, max_norm=1.0)  # warm
    alone, scored = [], []
    for number in range(2, num_steps + 2):
        alone.append(_cpu_seconds(lambda: run.update(rows, lr=1e-4, max_norm=1.0)))
        scored.append(_cpu_seconds(lambda n=number: run.step(n if n % k else n + 1, rows, lr=1e-4, max_norm=1.0)))
    refreshed = [_cpu_seconds(lambda n=n: run.step(1 + n * k, rows, lr=1e-4, max_norm=1.0)) for n in range(1, 4)]
    plain, held = float(np.median(alone)), float(np.median(scored))
    refresh = float(np.median(refreshed)) - held
    return [
        Figure("training step without scores", plain, "CPU s"),
        Figure(f"default k for {COST_QUERIES} queries at {COST_ROWS} rows a step", k, "steps"),
        Figure("row gradients and products, each step", held / plain - 1, "of a step"),
        Figure("query gradients, each refresh", refresh / plain, "of a step"),
        Figure("overhead at the default k", (held + refresh / k) / plain - 1, "of training", floor=MAX_OVERHEAD),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and 40 subsets instead of three and 100")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--cache", type=Path, default=Path("build/attribution_lds"), help="where retrains are kept")
    parser.add_argument("--cost-only", action="store_true", help="measure the overhead and no LDS")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hardware = f"{platform.machine()}, one thread, torch {torch.__version__}"
    print(f"in-run scores refreshed every k steps against those of k = 1, on {hardware}", flush=True)
    figures, fixed = cost(num_steps=5 if options.quick else 15), []
    for seed in () if options.cost_only else (0,) if options.quick else (0, 1, 2):
        lab = Lab(LabSettings(), seed=seed, folder=options.cache)
        plans = plan_banks(lab, DROPS[:2], num_subsets=40 if options.quick else 100, num_orders=1)
        for line in announce(lab, plans):
            print(line, flush=True)
            fixed.append(line)
        figures += worth(lab, plans, cache=options.cache)
    for figure in figures:
        print(_shown(figure))
    told = {"hardware": hardware, "fixed before scores": fixed, "figures": [asdict(figure) for figure in figures]}
    line = json.dumps(told)
    if options.out:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


def _lds(bank: Bank, scores: NDArray[np.float64], resamples: Resamples) -> Lds:
    return lds(scores, bank.plan.kept, bank.gains, resamples=resamples)


def _figure(name: str, value: Lds) -> Figure:
    return Figure(name, value.value, "", value.low, value.high)


def _shown(figure: Figure) -> str:
    interval = "" if figure.low is None else f" [{figure.low:+.3f}, {figure.high:+.3f}]"
    floor = "" if figure.floor is None else f"  (at most {figure.floor:g})"
    return f"{figure.name:70} {figure.value:9.3f}{interval} {figure.unit}{floor}{'' if figure.is_good else '  MISSED'}"


def _cpu_seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _example(draw: random.Random) -> Encoded:
    ids = [draw.randrange(1000) for _ in range(COST_TOKENS)]
    return ids, [-100] * (COST_TOKENS // 2) + ids[COST_TOKENS // 2 :]


def _wide_model() -> nn.Module:
    """Return a Llama of SmolLM2-135M's widths and a tenth of its depth, random, with its adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return build_model(LlamaForCausalLM(config), base_name="random", settings=TrainSettings()).train()


if __name__ == "__main__":
    sys.exit(main())
