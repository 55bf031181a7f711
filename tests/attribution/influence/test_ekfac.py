"""Codecs against plain oracles: per-example gradients in a loop, explicit Fisher matrices, inverses by NumPy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from attribution.influence.codec import GradientCodec
from attribution.influence.ekfac import CodecSettings, fit_codec
from attribution.influence.factors import Encoded, LoraFactors, pad_batch
from attribution.influence.gradients import ADAM_EPS
from tests.attribution.influence.test_gradients import BATCH, load, second_moments

EVERYTHING = CodecSettings("identity", dim=1 << 20, basis_dim=512)
SAMPLE = BATCH * 2


@pytest.fixture(scope="module")
def model(tiny_base: Path, tiny_adapters: dict[str, Path]) -> PeftModel:
    return load(tiny_base, tiny_adapters["rank2-attention"], trainable=True).eval()


@pytest.fixture(scope="module")
def factors(model: PeftModel) -> LoraFactors:
    return LoraFactors(model)


def looped(model: PeftModel, batch: Sequence[Encoded], labels: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Per-example gradients [n, r, l] by factor, one backward per example through the parameters themselves."""
    rows: dict[str, list[Tensor]] = {}
    for index, (ids, given) in enumerate(batch):
        targets = torch.tensor([given])[:, 1:]
        kept = targets != -100
        if labels is not None:
            targets[kept] = labels[index]
        logits = model(input_ids=torch.tensor([ids])).logits[:, :-1]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum").backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                factor = name.replace(".default.weight", "")
                gradient = parameter.grad.mT if ".lora_B" in name else parameter.grad
                rows.setdefault(factor, []).append(gradient.clone())
    model.zero_grad()
    return {factor: torch.stack(parts) for factor, parts in rows.items()}


def drawn_labels(model: PeftModel, batch: Sequence[Encoded], generator: torch.Generator) -> list[Tensor]:
    """Targets drawn from the model, longest example first as the fit draws them: the first with a sum past a point."""
    found: dict[int, Tensor] = {}
    for row in sorted(range(len(batch)), key=lambda row: -len(batch[row][0])):
        input_ids, labels, mask = pad_batch([batch[row]])
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
        sums = logits[labels[:, 1:] != -100].softmax(-1).cumsum(-1)
        found[row] = (sums <= torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]).sum(-1)
    return [found[row] for row in range(len(batch))]


def whole(codec: GradientCodec, gradients: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Gradients [n, r * l] by factor, in the codec's order of factors."""
    return {one.name: gradients[one.name].flatten(1).double().numpy() for one in codec.factors}


def test_factor_pairs_are_the_loops_gradients(model: PeftModel, factors: LoraFactors) -> None:
    pairs, expected = factors.pairs(BATCH), looped(model, BATCH)
    assert set(pairs) == set(expected) == set(factors.shapes)
    for name, pair in pairs.items():
        assert pair.gradient().shape[1:] == factors.shapes[name]
        torch.testing.assert_close(pair.gradient(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preconditioner", ["identity", "adam"])
def test_a_codec_that_keeps_everything_keeps_inner_products(
    model: PeftModel, factors: LoraFactors, preconditioner: str
) -> None:
    v = second_moments(model) if preconditioner == "adam" else None
    settings = CodecSettings(preconditioner, dim=1 << 20, basis_dim=512)  # type: ignore[arg-type]
    codec = fit_codec(factors, SAMPLE, settings, exp_avg_sq=v)
    rows = codec.encode(factors.pairs(BATCH), exp_avg_sq=v).double().numpy()
    expected = np.zeros((len(BATCH), len(BATCH)))
    for name, gradients in looped(model, BATCH).items():
        scaled = gradients.double()
        if v is not None:
            moment = v[f"{name}.weight"].double()
            scaled = scaled / ((moment.mT if ".lora_B" in name else moment).sqrt() + ADAM_EPS).sqrt()
        flat = scaled.flatten(1).numpy()
        expected += flat @ flat.T
    np.testing.assert_allclose(rows @ rows.T, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert codec.energy_kept == pytest.approx(1.0)


def test_ekfac_scores_equal_explicit_inverses(model: PeftModel, factors: LoraFactors) -> None:
    """The Kronecker eigenbasis is built whole, the eigenvalues are read off an explicit Fisher matrix and inverted."""
    settings = CodecSettings("ekfac", dim=1 << 20, basis_dim=512, damping=0.1, seed=3)
    codec = fit_codec(factors, SAMPLE, settings)
    rows = codec.encode(factors.pairs(BATCH)).double().numpy()
    generator = torch.Generator().manual_seed(3)
    fisher_gradients = whole(codec, looped(model, SAMPLE, drawn_labels(model, SAMPLE, generator)))
    gradients = whole(codec, looped(model, BATCH))
    expected = np.zeros((len(BATCH), len(BATCH)))
    bases, eigenvalues = {}, {}
    for one in codec.factors:
        basis = np.kron(one.short_basis.double().numpy(), one.long_basis.double().numpy())
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
        fisher = fisher_gradients[one.name].T @ fisher_gradients[one.name] / len(SAMPLE)
        bases[one.name], eigenvalues[one.name] = basis, np.diag(basis.T @ fisher @ basis)
    means = np.array([values.mean() for values in eigenvalues.values()])
    for one, floor in zip(codec.factors, 0.1 * np.sqrt(means * np.median(means)), strict=True):
        basis = bases[one.name]
        damped = basis @ np.diag(eigenvalues[one.name] + floor) @ basis.T
        expected += gradients[one.name] @ np.linalg.inv(damped) @ gradients[one.name].T
    np.testing.assert_allclose(rows @ rows.T, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_the_eigenvalue_correction_is_nearer_to_the_fisher_matrix_than_kfac(
    model: PeftModel, factors: LoraFactors
) -> None:
    codec = fit_codec(factors, SAMPLE, CodecSettings("ekfac", dim=1 << 20, basis_dim=512))
    generator = torch.Generator().manual_seed(0)
    gradients = whole(codec, looped(model, SAMPLE, drawn_labels(model, SAMPLE, generator)))
    pairs = factors.drawn_pairs(SAMPLE, torch.Generator().manual_seed(0))
    for one in codec.factors:
        fisher = gradients[one.name].T @ gradients[one.name] / len(SAMPLE)
        short, long = pairs[one.name].short.flatten(0, 1).double(), pairs[one.name].long.flatten(0, 1).double()
        basis = np.kron(torch.linalg.eigh(short.T @ short)[1].numpy(), torch.linalg.eigh(long.T @ long)[1].numpy())
        corrected = basis @ np.diag(np.diag(basis.T @ fisher @ basis)) @ basis.T
        kfac = np.kron((short.T @ short).numpy(), (long.T @ long).numpy()) / len(short) / len(SAMPLE)
        assert np.linalg.norm(fisher - corrected) <= np.linalg.norm(fisher - kfac)


def test_padding_does_not_move_the_bases(factors: LoraFactors) -> None:
    """A fit on examples of one length is that of the same examples beside a long one that carries no loss but one."""
    from attribution.influence.ekfac import CodecFit

    settings = CodecSettings("ekfac", basis_dim=512)
    covariances = []
    for batch in ([BATCH[1]], [BATCH[1], (list(range(5, 40)), [-100] * 35)]):
        fit = CodecFit(factors, settings)
        # One generator draws for targets alone, and the long example has none.
        fit.add_bases(batch)
        covariances.append(fit.sums())
    for alone, padded in zip(*covariances, strict=True):
        torch.testing.assert_close(alone, padded, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


def test_a_factor_of_long_gradients_does_not_damp_the_others(factors: LoraFactors) -> None:
    """The longest made a thousand times longer: its own damping grows with its root, that of the others stays."""
    settings = CodecSettings("ekfac", dim=1 << 20, basis_dim=512, damping=1e6)  # a weight is its floor's, nothing else
    floors = {one.name: float(one.weight.mean()) ** -2 for one in fit_codec(factors, SAMPLE, settings).factors}
    longest = max(floors, key=floors.__getitem__)
    scaled = _Scaled(factors, longest, 1000.0)
    for one in fit_codec(scaled, SAMPLE, settings).factors:  # type: ignore[arg-type]
        times = 1000.0 if one.name == longest else 1.0
        assert float(one.weight.mean()) ** -2 == pytest.approx(times * floors[one.name], rel=0.01)


class _Scaled:
    """Factors one of which has its gradients multiplied."""

    def __init__(self, factors: LoraFactors, name: str, factor: float) -> None:
        self._factors, self._name, self._factor = factors, name, factor
        self.shapes, self.batches = factors.shapes, factors.batches

    def pairs(self, batch: Sequence[Encoded]) -> dict:
        return self._longer(self._factors.pairs(batch))

    def drawn_pairs(self, batch: Sequence[Encoded], generator: torch.Generator) -> dict:
        return self._longer(self._factors.drawn_pairs(batch, generator))

    def _longer(self, pairs: dict) -> dict:
        pair = pairs[self._name]
        return {**pairs, self._name: type(pair)(pair.short * self._factor, pair.long)}


def test_what_a_fit_keeps_in_memory_changes_nothing(factors: LoraFactors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity draws no labels, so that a second pass over the sample gives the same pairs as a kept one."""
    kept = fit_codec(factors, SAMPLE, EVERYTHING)
    monkeypatch.setattr("attribution.influence.ekfac.KEPT_BYTES", 1000)
    again = fit_codec(factors, SAMPLE, EVERYTHING)
    assert torch.equal(kept.encode(factors.pairs(BATCH)), again.encode(factors.pairs(BATCH)))


def test_a_cut_row_keeps_the_most_energy(factors: LoraFactors) -> None:
    everything = fit_codec(factors, SAMPLE, EVERYTHING)
    rows = everything.encode(factors.pairs(SAMPLE))
    energy = rows.square().mean(0)
    assert (energy[:-1] - energy[1:]).min() >= -1e-5 * float(energy.max())
    small = fit_codec(factors, SAMPLE, CodecSettings("identity", dim=100, basis_dim=512))
    assert small.dim == 128
    torch.testing.assert_close(small.encode(factors.pairs(BATCH)), everything.encode(factors.pairs(BATCH))[:, :128])
    assert small.energy_kept == pytest.approx(float(energy[:128].sum() / energy.sum()), rel=1e-3)


def test_a_sketched_basis_spans_the_leading_eigenvectors() -> None:
    from attribution.influence.ekfac import _Sketch

    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q
    sizes = 0.7 ** torch.arange(300.0)
    rows = torch.randn(500, 300, generator=generator) * sizes @ directions.T
    sketch = _Sketch(300, 16, like=rows, seed=0)
    for part in rows.split(100):
        sketch.add(part)
    basis = sketch.basis()
    torch.testing.assert_close(basis.T @ basis, torch.eye(16), rtol=0, atol=1e-4)
    best = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :16]
    kept, most = (rows @ basis).square().sum(), (rows @ best).square().sum()
    assert kept > 0.999 * most


def test_few_rows_do_not_break_the_sketch() -> None:
    from attribution.influence.ekfac import _Sketch

    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    sketch = _Sketch(200, 16, like=rows, seed=0)
    sketch.add(rows)
    basis = sketch.basis()
    assert basis.isfinite().all()
    torch.testing.assert_close((rows @ basis).square().sum(), rows.square().sum(), rtol=1e-3, atol=0)


def test_a_codec_survives_its_file(factors: LoraFactors, tmp_path: Path) -> None:
    codec = fit_codec(factors, SAMPLE, CodecSettings("ekfac", dim=256))
    codec.save(tmp_path / "codec.safetensors")
    again = GradientCodec.load(tmp_path / "codec.safetensors")
    assert torch.equal(codec.encode(factors.pairs(BATCH)), again.encode(factors.pairs(BATCH)))
    assert (again.preconditioner, again.energy_kept) == (codec.preconditioner, codec.energy_kept)


def test_mistakes_are_named(
    factors: LoraFactors, tiny_base: Path, tiny_adapters: dict[str, Path], model: PeftModel
) -> None:
    with pytest.raises(ValueError, match="no example to fit"):
        fit_codec(factors, [], EVERYTHING)
    with pytest.raises(ValueError, match="needs the second moments"):
        fit_codec(factors, SAMPLE, CodecSettings("adam"))
    other = LoraFactors(load(tiny_base, tiny_adapters["rank4-mlp"]))
    with pytest.raises(ValueError, match="another adapter"):
        fit_codec(factors, SAMPLE, EVERYTHING).encode(other.pairs(BATCH))
