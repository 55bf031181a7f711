"""Rows summed over checkpoints: against a loop over examples and checkpoints, and through appends and deletions."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from attribution.influence.build import View, add_examples, build_store, create_store
from attribution.influence.ekfac import CodecSettings
from attribution.influence.factors import Encoded, LoraFactors, set_factor_weights
from attribution.influence.gradient_store import GradientStore, GradientStoreError
from attribution.influence.question import asked_of_all
from attribution.influence.topk import top_examples
from tests.attribution.influence.test_gradients import BATCH, load

STEPS = ("10", "20", "30")
SETTINGS = CodecSettings("ekfac", dim=1 << 20, basis_dim=512)
OTHERS = [([token + 7 for token in ids], [-100 if one < 0 else one + 7 for one in labels]) for ids, labels in BATCH]
EXAMPLES: dict[str, Encoded] = {f"e{number}": one for number, one in enumerate([*BATCH, *OTHERS])}
EXPOSURE = np.random.default_rng(0).random((len(EXAMPLES), len(STEPS)))


@pytest.fixture(scope="module")
def factors(tiny_base: Path, tiny_adapters: dict[str, Path]) -> LoraFactors:
    model: PeftModel = load(tiny_base, tiny_adapters["rank2-attention"], trainable=True).eval()
    return LoraFactors(model)


@pytest.fixture(scope="module")
def views(factors: LoraFactors) -> list[View]:
    """Three checkpoints; at the first gradients are far longer, as early in training."""
    generator, found = torch.Generator().manual_seed(0), []
    for number, step in enumerate(STEPS):
        weights = {
            name: value.detach() * (3 - number) + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in factors.parameters().items()
        }
        found.append(View(step, partial(set_factor_weights, factors, weights)))
    return found


@pytest.fixture
def store(factors: LoraFactors, views: list[View], tmp_path: Path) -> GradientStore:
    return build_store(
        tmp_path / "store", factors, EXAMPLES, views, SETTINGS, sample_size=len(EXAMPLES), exposure=EXPOSURE
    )


def contents(store: GradientStore) -> dict[str, np.ndarray]:
    """Weighted rows as a cosine takes them, by example."""
    (view,) = store.views
    return {
        shard.ids[row]: shard.rows(view).values()[row] * shard.weights[row] / shard.lengths(view)[row]
        for shard in store.shards
        for row in shard.live.tolist()
    }


def looped(factors: LoraFactors, store: GradientStore, views: list[View], example: Encoded) -> np.ndarray:
    """Return [checkpoints, d]: an example's row at each, over the length of its plain gradient there."""
    codec, found = store.codec(store.views[0]), []
    for view in views:
        view.enter()
        pairs = factors.pairs([example])
        length = sum(float(pair.gradient().square().sum()) for pair in pairs.values()) ** 0.5
        found.append((codec.encode(pairs)[0] / length).detach().numpy())
    return np.stack(found)


def test_a_row_is_the_exposed_sum_of_unit_gradients(
    factors: LoraFactors, views: list[View], store: GradientStore
) -> None:
    assert store.is_summed and store.steps == STEPS and store.views == ("30",)
    found = contents(store)
    for weights, (name, example) in zip(EXPOSURE, EXAMPLES.items(), strict=True):
        expected = weights @ looped(factors, store, views, example)
        np.testing.assert_allclose(found[name], expected, atol=0.02 * np.abs(expected).max())


def test_asking_a_sum_is_asking_every_checkpoint(factors: LoraFactors, views: list[View], store: GradientStore) -> None:
    """By cosine: the exposed sum of inner products, however long the question."""
    query = looped(factors, store, views, EXAMPLES["e1"])[-1]
    expected = {}
    for weights, (name, example) in zip(EXPOSURE, EXAMPLES.items(), strict=True):
        units = looped(factors, store, views, example)
        expected[name] = float(sum(weight * unit @ query for weight, unit in zip(weights, units, strict=True)))
    for scale in (1.0, 100.0):
        question = asked_of_all(store, scale * query[None, None], "none")
        question = type(question)(question.views, question.rows, "cosine")  # without the residual
        hits = top_examples(store, question, k=len(EXAMPLES))[0]
        size = float(np.linalg.norm(query))
        for hit in hits:
            assert hit.score == pytest.approx(expected[hit.example_id] / size, abs=0.02 * max(expected.values()) / size)


def test_an_appended_example_lies_as_if_built_with_the_rest(
    factors: LoraFactors, views: list[View], store: GradientStore, tmp_path: Path
) -> None:
    codec, names = store.codec(store.views[0]), list(EXAMPLES)
    grown = create_store(tmp_path / "grown", codec, STEPS)
    for part in (names[:3], names[3:]):
        rows = [names.index(name) for name in part]
        chosen = {name: EXAMPLES[name] for name in part}
        add_examples(grown, factors, codec, chosen, views, exposure=EXPOSURE[rows])
    for name, row in contents(store).items():
        np.testing.assert_allclose(contents(grown)[name], row, rtol=1e-3, atol=0.02 * np.abs(row).max())
    assert grown.residual is not None and store.residual is not None
    query = np.random.default_rng(1).standard_normal(codec.dim).astype(np.float32)
    np.testing.assert_allclose(grown.residual.take_from(query), store.residual.take_from(query), rtol=0.1, atol=0.05)


def test_a_deleted_example_leaves_the_sum_of_the_others(store: GradientStore) -> None:
    before = contents(store)
    store.delete(["e0", "e4"], compact=True)
    after = contents(store)
    assert set(after) == set(EXAMPLES) - {"e0", "e4"}
    for name, row in after.items():
        np.testing.assert_array_equal(row, before[name])
    assert GradientStore(store.path).residual is not None


def test_rows_that_adam_preconditions_are_kept_at_each_checkpoint(
    factors: LoraFactors, views: list[View], tmp_path: Path
) -> None:
    moments = {name: torch.full_like(value, 1e-4) for name, value in factors.parameters().items()}
    adam = [View(view.name, view.enter, moments) for view in views]
    made = build_store(
        tmp_path / "adam", factors, EXAMPLES, adam, CodecSettings("adam"), sample_size=4, exposure=EXPOSURE
    )
    assert not made.is_summed and made.views == made.steps == STEPS and made.residual is None
    np.testing.assert_allclose(made.shards[0].weights, EXPOSURE, rtol=1e-6)


def test_a_gradient_that_is_not_finite_is_named(factors: LoraFactors, views: list[View], tmp_path: Path) -> None:
    broken = {name: value.detach() * float("nan") for name, value in factors.parameters().items()}
    bad = [*views[:-1], View("30", partial(set_factor_weights, factors, broken))]
    with pytest.raises(GradientStoreError, match="gradient is not finite in view 30"):
        codec = build_store(tmp_path / "a", factors, EXAMPLES, views, SETTINGS, sample_size=4).codec("30")
        add_examples(create_store(tmp_path / "b", codec, STEPS), factors, codec, EXAMPLES, bad)
