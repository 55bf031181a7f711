"""Our tiers on a lab, through the product's own code: the gradient store of the explain tier, the audit's sweep."""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from attribution.influence.build import View, build_store
from attribution.influence.ekfac import CodecSettings
from attribution.influence.factors import LoraFactors, set_factor_weights
from attribution.influence.gradient_store import GradientStore
from attribution.influence.gradients import Encoded, adam_scale, scale_of
from attribution.influence.question import asked_of_all, asked_views
from attribution.influence.topk import top_examples
from attribution.influence.unrolled import unrolled_scores
from benchmarks.attribution.export import unflat
from benchmarks.attribution.lab import Lab
from benchmarks.attribution.methods import Found, Method, epoch_cpu_s
from configs.schema import TrainSettings
from pipelines.train.gradients import codec_settings

EXPLAIN, AUDIT = "explain: store, EK-FAC", "audit: unrolled"
Ask = Literal["as served", "at all", "at the last, plain"]
FIT_ROWS = TrainSettings().gradient_fit_examples
"""Rows that factors are fitted on, at each checkpoint: the product's default."""
NUM_BUILDS = 5
"""The median counts, and that of builds over epochs in turn: a machine's speed moves by a tenth within minutes."""


def store_method(settings: CodecSettings, *, ask: Ask = "as served") -> Method:
    """Return the explain tier at some settings.

    `ask`: "as served" is how `trailmark` finds the best examples of a receipt: the query's gradients at the middle and
    the last checkpoint, cleared of the store's residual, against the rows summed over the checkpoints, by cosine. "at
    all" is the same with the gradients at every checkpoint; "at the last, plain" an inner product with the last one.
    """

    def run(lab: Lab) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            return _explain(lab, settings, Path(folder) / "store", ask=ask)

    return run


def _explain(lab: Lab, settings: CodecSettings, folder: Path, *, ask: Ask) -> Found:
    model = lab.model()
    factors = LoraFactors(model)
    views = [
        View(str(state.step), partial(set_factor_weights, factors, unflat(model, state.weights)))
        for state in lab.checkpoints
    ]
    rows = {f"{number:04}": example for number, example in enumerate(lab.examples)}
    seconds, epochs, weights = [], [], exposure(lab)
    for number in range(NUM_BUILDS):
        began = process_time()
        store = build_store(
            folder / str(number), factors, rows, views, settings, sample_size=FIT_ROWS, exposure=weights
        )
        seconds.append(process_time() - began)
        epochs.append(seconds[-1] / epoch_cpu_s(lab))
    questions, encode_cpu_s = _questions(lab, store, factors, views, ask=ask)
    began = process_time()
    question = asked_of_all(store, questions, "none" if ask == "at the last, plain" else "cosine")
    hits = top_examples(store, question, k=len(rows))
    score_cpu_s = process_time() - began
    scores = np.zeros((len(lab.queries), len(rows)))
    for query, found in enumerate(hits):
        for hit in found:
            scores[query, int(hit.example_id)] = hit.score
    num_bytes = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    return Found(
        scores,
        "online",
        build_cpu_s=statistics.median(seconds),
        build_epochs=statistics.median(epochs),
        query_cpu_s=(encode_cpu_s + score_cpu_s) / len(lab.queries),
        bytes_per_example=num_bytes / len(rows),
        settings={
            "preconditioner": settings.preconditioner,
            "dim": settings.dim,
            "damping": settings.damping,
            "checkpoints": len(views),
            "ask": ask,
            "fitted_on": FIT_ROWS,
        },
    )


def _questions(
    lab: Lab, store: GradientStore, factors: LoraFactors, views: list[View], *, ask: Ask
) -> tuple[NDArray[np.float32], float]:
    """Return the queries' rows [a, q, d] where they are asked, and the CPU seconds of turning gradients into them."""
    names = {"as served": asked_views(store.steps), "at the last, plain": store.steps[-1:]}.get(ask, store.steps)
    codec, parts, seconds = store.codec(store.views[-1]), [], 0.0
    for view in (view for view in views if view.name in names):
        view.enter()
        pairs = factors.pairs(lab.queries)
        began = process_time()
        with torch.no_grad():
            parts.append(codec.encode(pairs).numpy())
        seconds += process_time() - began
    return np.stack(parts), seconds


def in_run(*, every: int, adam: bool) -> Method:
    """Return in-run first-order scores, the queries' gradients taken anew every so many steps.

    The recorder takes the rows' gradients out of the training pass itself; here they are computed beside it, which
    gives the same numbers, so no cost is told.
    """

    def run(lab: Lab) -> Found:
        model = lab.model()
        factors, replay = LoraFactors(model), lab.base_run
        state, total = replay.initial(), np.zeros((len(lab.queries), len(lab.examples)))
        asked: dict[str, torch.Tensor] = {}
        for number, step in enumerate(replay.recipe.steps):
            set_factor_weights(factors, unflat(model, state.weights))
            with replay.lora.attached():
                state = replay.advance(state, number)
            if number % every == 0:
                asked = _flat(factors, lab.queries)
            rows = _flat(factors, [lab.examples[row] for row in step.rows])
            moments = adam_scale(unflat(model, state.exp_avg_sq)) if adam else None
            correction = (1 - replay.recipe.beta2 ** (number + 1)) ** 0.5 if adam else 1.0
            for name, queries in asked.items():
                scaled = queries if moments is None else queries * scale_of(moments, name, queries) ** 2
                dots = scaled.flatten(1) @ rows[name].flatten(1).T
                total[:, list(step.rows)] += step.lr * correction * dots.double().numpy()
        return Found(total, "in-run", settings={"every": every, "adam": adam})

    return run


def _flat(factors: LoraFactors, data: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Return each factor's gradients [n, r, l] of some examples."""
    return {name: pair.gradient().detach() for name, pair in factors.pairs(data).items()}


def exposure(lab: Lab) -> NDArray[np.float64]:
    """Return [n, c]: the summed rates of the steps that a row was in, each lent to the nearest checkpoint."""
    steps = np.array([state.step for state in lab.checkpoints])
    found = np.zeros((len(lab.examples), len(steps)))
    for number, step in enumerate(lab.base_run.recipe.steps, start=1):
        found[list(step.rows), np.abs(steps - number).argmin()] += step.lr
    return found


def audit(lab: Lab) -> Found:
    """Exact differentiation through the recorded run; every query by itself."""
    run = lab.base_run
    found = unrolled_scores(run, [[query] for query in lab.queries])
    return Found(found.scores, "audit", query_cpu_s=found.cpu_seconds / len(lab.queries))


WIDE = CodecSettings(dim=8192, basis_dim=160)
"""All directions of the lab's layers, 3 of 4 of their coordinates; damping is the product's default."""
OURS: dict[str, Method] = {
    EXPLAIN: store_method(WIDE),
    "explain: query at all checkpoints": store_method(WIDE, ask="at all"),
    "explain: plain, query at the last": store_method(WIDE, ask="at the last, plain"),
    "explain: the product's defaults": store_method(codec_settings(TrainSettings())),
    "explain: 2,048 numbers": store_method(replace(WIDE, dim=2048, basis_dim=64)),
    "explain: identity": store_method(replace(WIDE, preconditioner="identity")),
    "in-run: SGD": in_run(every=1, adam=False),
    "in-run: Adam": in_run(every=1, adam=True),
    "in-run: Adam, every 8 steps": in_run(every=8, adam=True),
    AUDIT: audit,
}
