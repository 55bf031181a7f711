"""Build the gradient store of a recorded run: fit a codec over its checkpoints, then encode every example at all."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.influence.codec import GradientCodec
from attribution.influence.ekfac import CodecFit, CodecSettings
from attribution.influence.factors import Encoded, LoraFactors, evaluating, set_factor_weights
from attribution.influence.gradient_store import GradientStore
from attribution.influence.rows import STORE_FOLDER
from attribution.influence.scores import TINY
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
    exposure: NDArray[Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> GradientStore:
    """Make a store of `examples` (id -> tokens) out of all views, in this process, and return it.

    `exposure` [examples, views]: how much of each example's learning a view stands for; 1 without. The model is left
    with the weights of the last view.
    """
    codec = fit_views(factors, list(examples.values()), views, settings, sample_size=sample_size)
    facts = fit_facts(settings, len(views) * min(sample_size, len(examples)))
    store = create_store(path, codec, [view.name for view in views], about={**facts, **(about or {})})
    add_examples(store, factors, codec, examples, views, exposure=exposure)
    return store


def create_store(
    path: Path, codec: GradientCodec, views: Sequence[str], *, about: Mapping[str, str] | None = None
) -> GradientStore:
    """Make an empty store of rows summed over the views; of rows at each where Adam preconditions every view anew."""
    if codec.is_of_each_view:
        return GradientStore.create(path, dict.fromkeys(views, codec), about=about)
    return GradientStore.create(path, {views[-1]: codec}, about=about, sums=views, has_residual=True)


def add_examples(
    store: GradientStore,
    factors: LoraFactors,
    codec: GradientCodec,
    examples: Mapping[str, Encoded],
    views: Sequence[View],
    *,
    exposure: NDArray[Any] | None = None,
) -> None:
    """Add examples to a store of these views, whose codec is `codec`; `exposure` as of `build_store`."""
    encoded = list(examples.values())
    exposure = np.ones((len(encoded), len(views))) if exposure is None else exposure
    with store.adding(list(examples), weights=row_weights(codec, exposure)) as addition:
        for name, part in row_passes(views, codec):
            for rows, values, lengths in encode(factors, codec, encoded, part, exposure=exposure):
                addition.put(name, rows, values, lengths=lengths)


def row_weights(codec: GradientCodec, exposure: NDArray[Any]) -> NDArray[Any]:
    """Return the exposure that each view of a codec's store stands for, of that of checkpoints [examples, views]."""
    return exposure if codec.is_of_each_view else exposure.sum(axis=1, keepdims=True)


def row_passes(views: Sequence[View], codec: GradientCodec) -> list[tuple[str, Sequence[View]]]:
    """Return each view of a codec's store with the checkpoints that its rows are made at."""
    return [(view.name, [view]) for view in views] if codec.is_of_each_view else [(views[-1].name, views)]


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
        exposure=trace.exposure().T,
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
    with evaluating(factors.model):  # once: a switch walks through all modules
        for take in (fit.add_bases, fit.add_squares):
            for number, view in enumerate(views):
                view.enter()
                seed = settings.seed * 1009 + number
                sample = [examples[row] for row in sample_rows(len(examples), size=sample_size, seed=seed)]
                take(sample, exp_avg_sq=view.exp_avg_sq)
    return fit.codec()


def fit_facts(settings: CodecSettings, num_fitted: int) -> dict[str, str]:
    """Return what a store says of its fit."""
    damping = f"{settings.damping:g} of the root of each factor's mean eigenvalue times their median"
    return {
        "fitted_examples": str(num_fitted),
        "damping": damping if settings.preconditioner == "ekfac" else "",
        "basis_dim": str(settings.basis_dim),
        "seed": str(settings.seed),
    }


EncodedRows = tuple[list[int], NDArray[np.float32], NDArray[np.float32] | None]
"""(rows of some examples, their float32 [rows, d], what a cosine divides each by, None for its own length)."""


def encode(
    factors: LoraFactors,
    codec: GradientCodec,
    examples: Sequence[Encoded],
    views: Sequence[View],
    *,
    exposure: NDArray[Any],
) -> Iterator[EncodedRows]:
    """Yield rows out of some views, longest examples first, each example once.

    Semantics: row[i] = size[i] sum over views of w[i, c] h[i, c] / |g[i, c]| / sum over views of w[i, c], g being the
    plain gradients, h their rows, w the exposure [examples, views], size[i] the mean of |g[i, c]| by w: an example is
    worth its exposure, however long its gradient is at any view. Scores are linear in rows, so a question is asked of
    one row instead of one for each view. Rows that Adam preconditions are h itself, of one view.
    """
    device = next(factors.model.parameters()).device
    codec, seen = codec.to(device), torch.from_numpy(np.asarray(exposure, np.float32)).to(device)
    with evaluating(factors.model):
        for rows in factors.batches(examples):
            values, lengths = _encoded(factors, codec, [examples[row] for row in rows], views, seen[rows])
            yield rows, values.cpu().numpy(), None if lengths is None else lengths.cpu().numpy()


@torch.no_grad()
def _encoded(
    factors: LoraFactors, codec: GradientCodec, batch: Sequence[Encoded], views: Sequence[View], exposure_NC: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of a batch [n, d], and what a cosine divides each by [n]."""
    if codec.is_of_each_view:
        (view,) = views
        view.enter()
        return codec.encode(factors.pairs(batch), exp_avg_sq=view.exp_avg_sq), None
    gradients, lengths = _summed(factors, views, batch, exposure_NC)
    return codec.encode_gradients(gradients), lengths


def _summed(
    factors: LoraFactors, views: Sequence[View], batch: Sequence[Encoded], exposure_NC: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the sums of a batch's gradients [n, r, l] by factor that `encode` speaks of, and their sizes [n]."""
    padded, lengths = factors.padded(batch), exposure_NC.new_zeros(len(batch))
    total = {name: exposure_NC.new_zeros(len(batch), *shape) for name, shape in factors.shapes.items()}
    shares_NC = exposure_NC / exposure_NC.sum(dim=1, keepdim=True).clamp_min(TINY)
    for view, share in zip(views, shares_NC.unbind(dim=1), strict=True):
        view.enter()
        gradients = {name: pair.gradient() for name, pair in factors.pairs(padded).items()}
        sizes = [torch.linalg.vector_norm(gradient, dim=(1, 2)) for gradient in gradients.values()]
        size = torch.linalg.vector_norm(torch.stack(sizes), dim=0)
        lengths += share * size
        weight = (share / size.clamp_min(TINY))[:, None, None]
        for name, gradient in gradients.items():
            total[name].addcmul_(gradient, weight)
    for part in total.values():
        part *= lengths[:, None, None]
    return total, lengths
