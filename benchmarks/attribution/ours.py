"""Our tiers on a lab, through the product's own code: the gradient store of the explain tier, the audit's sweep."""

import tempfile
from collections.abc import Sequence
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
from attribution.influence.scores import Normalise
from attribution.influence.topk import Asked, top_examples
from attribution.influence.unrolled import unrolled_scores
from benchmarks.attribution.export import unflat
from benchmarks.attribution.lab import Lab
from benchmarks.attribution.methods import Found, Method

EXPLAIN, AUDIT = "explain: store, EK-FAC", "audit: unrolled"
Ask = Literal["last", "each", "last alone"]
FIT_ROWS = 320
"""Rows that factors are fitted on, at each checkpoint."""


def store_method(settings: CodecSettings, *, ask: Ask = "last") -> Method:
    """Return the explain tier at some settings.

    `ask`: "last" is the query's gradient at the last checkpoint against the rows of every checkpoint, as unrolling says
    (one pass per query); "each" is the gradient at each checkpoint against the rows there; "last alone" is the last
    checkpoint's rows only, by cosine, which is how `trailmark` finds the best examples of a receipt.
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
    began = process_time()
    rows = {f"{number:04}": example for number, example in enumerate(lab.examples)}
    store = build_store(folder, factors, rows, views, settings, sample_size=FIT_ROWS, weights=exposure(lab))
    build_cpu_s = process_time() - began
    questions, encode_cpu_s = _questions(lab, store, factors, views, ask=ask)
    began = process_time()
    asked = store.views[-1:] if ask == "last alone" else store.views
    normalise: Normalise = "cosine" if ask == "last alone" else "none"
    hits = top_examples(store, Asked(asked, questions, normalise), k=len(rows))
    score_cpu_s = process_time() - began
    scores = np.zeros((len(lab.queries), len(rows)))
    for query, found in enumerate(hits):
        for hit in found:
            scores[query, int(hit.example_id)] = hit.score
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Found(
        scores,
        "online",
        build_cpu_s=build_cpu_s,
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
    """Return the queries' rows [c, q, d], and the CPU seconds that turning gradients into them took."""
    codec, parts, seconds = store.codec(store.views[-1]), [], 0.0
    for view in views if ask == "each" else views[-1:]:
        view.enter()
        pairs = factors.pairs(lab.queries)
        began = process_time()
        with torch.no_grad():
            parts.append(codec.encode(pairs).numpy())
        seconds += process_time() - began
    return np.stack(parts * (len(views) if ask == "last" else 1)), seconds


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


OURS: dict[str, Method] = {
    EXPLAIN: store_method(CodecSettings(dim=8192, basis_dim=160, damping=0.01)),
    "explain: query at each checkpoint": store_method(CodecSettings(dim=8192, basis_dim=160, damping=0.01), ask="each"),
    "explain: best examples as served": store_method(CodecSettings(), ask="last alone"),
    "explain: 2,048 numbers": store_method(CodecSettings(dim=2048, basis_dim=64, damping=0.01)),
    "explain: identity": store_method(CodecSettings("identity", dim=8192, basis_dim=160)),
    "in-run: SGD": in_run(every=1, adam=False),
    "in-run: Adam": in_run(every=1, adam=True),
    "in-run: Adam, every 8 steps": in_run(every=8, adam=True),
    AUDIT: audit,
}
