"""Build the gradient store of a recorded run: fit a codec over its checkpoints, then encode every example at each."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.influence.codec import GradientCodec
from attribution.influence.ekfac import CodecFit, CodecSettings
from attribution.influence.factors import Encoded, LoraFactors, set_factor_weights
from attribution.influence.gradient_store import GradientStore
from attribution.influence.rows import STORE_FOLDER
from attribution.influence.store import Trace


@dataclass(frozen=True)
class View:
    """A checkpoint that rows are made at: its name (the step), and how to put its weights into the model.

    `exp_avg_sq` is Adam's second moment there by PEFT name.
    """

    name: str
    enter: Callable[[], None]
    exp_avg_sq: Mapping[str, Tensor] | None = None


def sample_rows(num_examples: int, *, size: int, seed: int) -> tuple[int, ...]:
    """Return the rows that factors are fitted on: `size` of them, drawn without replacement, the same for a seed."""
    return tuple(sorted(random.Random(f"fit:{seed}").sample(range(num_examples), min(size, num_examples))))


def build_store(
    path: Path,
    factors: LoraFactors,
    examples: Mapping[str, Encoded],
    views: Sequence[View],
    settings: CodecSettings,
    *,
    sample_size: int,
    weights: NDArray[Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> GradientStore:
    """Make a store of `examples` (id -> tokens) at every view, in this process, and return it.

    `weights` [examples, views]: how much of each example's learning a view stands for; 1 without. The model is left
    with the weights of the last view.
    """
    encoded = list(examples.values())
    codec = fit_views(factors, encoded, views, settings, sample_size=sample_size)
    facts = fit_facts(settings, len(views) * min(sample_size, len(encoded)))
    store = GradientStore.create(path, {view.name: codec for view in views}, about={**facts, **(about or {})})
    with store.adding(list(examples), weights=weights) as addition:
        for view in views:
            view.enter()
            for rows, values in encode(factors, codec, encoded, exp_avg_sq=view.exp_avg_sq):
                addition.put(view.name, rows, values.numpy())
    if settings.preconditioner != "adam":
        store.fit_residual()
    return store


def build_trace_store(
    trace: Trace, model: nn.Module, examples: Mapping[str, Encoded], settings: CodecSettings, *, sample_size: int
) -> GradientStore:
    """Make the store of a recorded trace, at each of its checkpoints, and return it; `model` has the adapter on it.

    A trace from before there were stores gets one in this way, given the tokens of its examples.
    """
    factors = LoraFactors(model)
    views = [
        View(str(step), partial(set_factor_weights, factors, trace.adapter_weights(step)), trace.exp_avg_sq(step))
        for step in trace.checkpoint_steps
    ]
    return build_store(
        trace.path / STORE_FOLDER,
        factors,
        examples,
        views,
        settings,
        sample_size=sample_size,
        weights=trace.exposure().T,
        about={"beta2": repr(trace.beta2)},
    )


def fit_views(
    factors: LoraFactors,
    examples: Sequence[Encoded],
    views: Sequence[View],
    settings: CodecSettings,
    *,
    sample_size: int,
) -> GradientCodec:
    """Return one codec for all views, fitted on another sample of the examples at each.

    Pooled, because a factor's directions that are dead at one checkpoint are not at another: eigenvalues of one
    checkpoint alone, used at the others, give scores that are little better than chance (docs/log.md, 2026-11-25).
    """
    fit = CodecFit(factors, settings)
    for take in (fit.add_bases, fit.add_squares):
        for number, view in enumerate(views):
            view.enter()
            seed = settings.seed * 1009 + number
            sample = [examples[row] for row in sample_rows(len(examples), size=sample_size, seed=seed)]
            take(sample, exp_avg_sq=view.exp_avg_sq)
    return fit.codec()


def fit_facts(settings: CodecSettings, num_fitted: int) -> dict[str, str]:
    """Return what a store says of its fit."""
    damping = f"{settings.damping:g} of each factor's mean eigenvalue"
    return {
        "fitted_examples": str(num_fitted),
        "damping": damping if settings.preconditioner == "ekfac" else "",
        "basis_dim": str(settings.basis_dim),
        "seed": str(settings.seed),
    }


def encode(
    factors: LoraFactors,
    codec: GradientCodec,
    examples: Sequence[Encoded],
    *,
    exp_avg_sq: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (rows of `examples`, their float32 [rows, d] on the CPU), longest examples first, each row once."""
    device = next(factors.model.parameters()).device
    codec = codec.to(device)
    for rows in factors.batches(examples):
        with torch.no_grad():
            yield rows, codec.encode(factors.pairs([examples[row] for row in rows]), exp_avg_sq=exp_avg_sq).cpu()
