"""Batched per-example gradients against a loop of single-example autograd and explicit projections."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from attribution.influence.gradients import (
    ADAM_EPS,
    Encoded,
    GradientFeatures,
    parameter_name,
    rademacher,
    target_log_likelihoods,
)

BATCH: list[Encoded] = [
    ([5, 6, 7, 8, 9, 10], [-100, -100, 7, 8, 9, 10]),
    ([11, 12, 13], [-100, 12, 13]),
    ([20, 21, 22, 23, 24], [-100, -100, -100, -100, 24]),
    ([30, 31, 32, 33], [-100, 31, -100, 33]),
]


def load(base: Path, adapter: Path, dtype: torch.dtype = torch.float32, *, trainable: bool = False) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def second_moments(model: PeftModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        parameter_name(name): torch.rand(value.shape, generator=generator) * 1e-4
        for name, value in model.named_parameters()
        if "lora_" in name
    }


def oracle(model: PeftModel, batch: Sequence[Encoded], *, k: int, seed: int, v: Mapping[str, Tensor] | None) -> Tensor:
    """One backward per example, then each factor's gradient preconditioned and projected by hand."""
    model.eval()
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    factors = [(name, module) for name, module in linears if ".lora_A." in name or ".lora_B." in name]
    rows = []
    for input_ids, labels in batch:
        logits = model(input_ids=torch.tensor([input_ids])).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        gradients = torch.autograd.grad(loss, [module.weight for _, module in factors])
        parts = []
        for (name, _), gradient in zip(factors, gradients, strict=True):
            plain = name.removesuffix(".default")
            if v is not None:
                gradient = gradient / (v[f"{plain}.weight"].sqrt() + ADAM_EPS).sqrt()
            long_side_last = gradient.float() if ".lora_A" in plain else gradient.float().T
            parts.append((long_side_last @ rademacher(long_side_last.shape[1], k, seed=seed, name=plain)).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", ["rank2-attention", "rank4-mlp", "rank8-all"])
def test_features_equal_the_loop(
    tiny_base: Path, tiny_adapters: dict[str, Path], name: str, preconditioned: bool
) -> None:
    model = load(tiny_base, tiny_adapters[name], trainable=True)
    v = second_moments(model) if preconditioned else None
    features = GradientFeatures(model, projection_dim=5, seed=3)
    found = features.features(BATCH, exp_avg_sq=v)
    expected = oracle(model, BATCH, k=5, seed=3, v=v)
    assert found.shape == (len(BATCH), features.dim) == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_frozen_adapter_gives_the_same_features(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    found = [
        GradientFeatures(load(tiny_base, tiny_adapters["rank8-all"], trainable=trainable), projection_dim=4, seed=0)
        for trainable in (False, True)
    ]
    frozen, trainable = (features.features(BATCH) for features in found)
    assert torch.equal(frozen, trainable)


def test_a_bf16_base_is_close(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model = load(tiny_base, tiny_adapters["rank8-all"], torch.bfloat16, trainable=True)
    exact = GradientFeatures(load(tiny_base, tiny_adapters["rank8-all"]), projection_dim=4, seed=0).features(BATCH)
    found = GradientFeatures(model, projection_dim=4, seed=0).features(BATCH)
    assert found.dtype == torch.float32
    cosine = nn.functional.cosine_similarity(found, exact)
    assert cosine.min() > 0.98


def test_token_groups_sum_to_the_example(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model = load(tiny_base, tiny_adapters["rank8-all"])
    v = second_moments(model)
    features = GradientFeatures(model, projection_dim=4, seed=0)
    groups = features.token_features(*BATCH[0], exp_avg_sq=v, num_groups=3)
    whole = features.features(BATCH[:1], exp_avg_sq=v)[0]
    assert groups.shape == (3, features.dim)
    torch.testing.assert_close(groups.sum(0), whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    first = features.features([(BATCH[0][0], [-100, -100, 7, 8, -100, -100])], exp_avg_sq=v)[0]
    torch.testing.assert_close(groups[0], first, rtol=1e-4, atol=1e-4 * first.abs().max().item())


def test_no_more_groups_than_target_tokens(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    features = GradientFeatures(load(tiny_base, tiny_adapters["rank2-attention"]), projection_dim=4, seed=0)
    assert len(features.token_features(*BATCH[2], num_groups=8)) == 1


def test_the_batch_an_example_is_in_does_not_matter(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    features = GradientFeatures(load(tiny_base, tiny_adapters["rank8-all"]), projection_dim=4, seed=0)
    together = features.features(BATCH)
    alone = torch.cat([features.features([example]) for example in BATCH])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    assert features.features([]).shape == (0, features.dim)


def test_the_model_is_left_as_it_was(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model = load(tiny_base, tiny_adapters["rank2-attention"], trainable=True).train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    GradientFeatures(model, projection_dim=4, seed=0).features(BATCH)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dot_product_of_features_estimates_the_preconditioned_one(
    tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    model = load(tiny_base, tiny_adapters["rank8-all"])
    v = second_moments(model)
    wide = GradientFeatures(model, projection_dim=256, seed=1).features(BATCH, exp_avg_sq=v)
    other = GradientFeatures(model, projection_dim=256, seed=2).features(BATCH, exp_avg_sq=v)
    scale = (wide @ wide.T).diagonal()
    assert ((wide @ wide.T - other @ other.T).abs() / (scale[:, None] * scale).sqrt()).max() < 0.1


def test_the_projection_never_changes() -> None:
    """Golden: stored gradients are useless if a later version draws other signs."""
    signs = (rademacher(2, 4, seed=0, name="layer.lora_A") * 2).int().tolist()
    assert signs == [[1, -1, -1, -1], [-1, 1, 1, -1]]
    assert rademacher(300, 16, seed=0, name="x").abs().unique().tolist() == [0.25]


def test_log_likelihoods_are_those_of_the_targets(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model = load(tiny_base, tiny_adapters["rank2-attention"])
    found = target_log_likelihoods(model, BATCH)
    assert [len(row) for row in found] == [4, 2, 1, 2]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([BATCH[3][0]])).logits[0].float().log_softmax(-1)
    torch.testing.assert_close(found[3], torch.stack([logits[0, 31], logits[2, 33]]), rtol=1e-4, atol=1e-4)


def test_a_missing_moment_is_named(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model = load(tiny_base, tiny_adapters["rank2-attention"])
    v = second_moments(model)
    missing = v.popitem()[0]
    with pytest.raises(ValueError, match=missing.replace(".", r"\.")):
        GradientFeatures(model, projection_dim=4, seed=0).features(BATCH, exp_avg_sq=v)


def test_a_model_without_an_adapter_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA module"):
        GradientFeatures(AutoModelForCausalLM.from_pretrained(tiny_base), projection_dim=4, seed=0)
