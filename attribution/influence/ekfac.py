"""EK-FAC of LoRA factors, and the codecs that are fitted with it or without: bases, eigenvalues, damping per factor.

A LoRA factor is an ordinary linear: A maps x to Ax, B maps Ax to BAx. K-FAC approximates its Fisher matrix by the
Kronecker product of two covariances over token positions, of what goes in and of the loss's gradient at what comes out;
EK-FAC keeps their eigenbases and takes the eigenvalues from per-example gradients instead: lambda[a, b] =
E[(U_s^T G U_l)[a, b]^2]. Labels are drawn from the model (the true Fisher, not the empirical one). George et al. 2018,
https://arxiv.org/abs/1806.03884; Grosse et al. 2023, https://arxiv.org/abs/2308.03296.

Shape legend: n examples, t token positions, r rank, l long side, a and b basis vectors.
"""

import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attribution.influence.codec import FactorCodec, GradientCodec, Preconditioner, cut
from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.factors import Encoded, FactorPair, LoraFactors
from attribution.influence.gradients import adam_scale, scale_of

KEPT_BYTES = 250_000_000
"""Pairs that a fit keeps instead of running the model again: all of a small model's, none of 64 rows of a 135M one."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CodecSettings:
    """How a codec is fitted. `dim`: numbers in a row; `basis_dim`: most vectors of a long side's basis.

    `damping` is relative to the mean eigenvalues: what each factor is damped by stands at `damping_floors`.
    """

    preconditioner: Preconditioner = "ekfac"
    dim: int = 2048
    basis_dim: int = 64
    damping: float = 0.1
    seed: int = 0


def fit_codec(
    factors: LoraFactors,
    sample: Sequence[Encoded],
    settings: CodecSettings,
    *,
    exp_avg_sq: Mapping[str, Tensor] | None = None,
) -> GradientCodec:
    """Return the codec of the model's present weights, fitted on `sample` (see `CodecFit`)."""
    fit = CodecFit(factors, settings)
    fit.add_bases(sample, exp_avg_sq=exp_avg_sq)
    fit.add_squares(sample, exp_avg_sq=exp_avg_sq)
    return fit.codec()


def damping_floors(means: Sequence[float], damping: float) -> list[float]:
    """Return what is added to each factor's eigenvalues, given the mean eigenvalue of each.

    Semantics: floor[f] = damping * sqrt(means[f] * median(means)). A run that ends early damps a direction by what its
    steps divided the gradient by, over the summed rates. Under Adam that is the root of the gradient's second moment,
    so a factor of small gradients is damped more, for its size, than by a share of its own mean; the median keeps one
    factor of long gradients from damping all others. Measured in docs/log.md, 2026-11-25.
    """
    middle = statistics.median(means)
    return [max(damping * (mean * middle) ** 0.5, _TINY) for mean in means]


class CodecFit:
    """Fits one codec, at one checkpoint or pooled over several: first `add_bases` at each, then `add_squares` at each.

    Bases, eigenvalues and energies rest on the same sample: on two halves of one twice as large they foretell retrains
    no better (docs/log.md, 2026-11-25). What its backward passes gave is kept from one to the other as far as
    `KEPT_BYTES` go. Raises ValueError for an empty sample, or when "adam" gets no second moments. With second moments
    "ekfac" rows are scaled so that the sample's self-influence is what Adam's preconditioner makes of it: scores are
    then nats, as under "adam".
    """

    def __init__(self, factors: LoraFactors, settings: CodecSettings) -> None:
        self.factors, self.settings = factors, settings
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._short: dict[str, Tensor] = {}
        self._long: dict[str, _Sketch] = {}
        self._sums: dict[str, _Sums] = {}
        self._kept: deque[list[dict[str, FactorPair]] | None] = deque()
        self._room = KEPT_BYTES

    def add_bases(self, sample: Sequence[Encoded], *, exp_avg_sq: Mapping[str, Tensor] | None = None) -> None:
        """Take in what the bases rest on, at the model's present weights.

        "ekfac": covariances over token positions, whose eigenvectors K-FAC takes. Else the per-example gradients' own
        second moments E[G G^T] and E[G^T G] (a truncated higher-order SVD): there is no Fisher matrix to follow.
        """
        scale = self._scale(sample, exp_avg_sq)
        kept: list[dict[str, FactorPair]] = []
        for batch in self._batches(sample):
            is_reached, pairs = _is_reached(batch), self._pairs(batch)
            for name, pair in pairs.items():
                short, long = self._basis_rows(name, pair, scale, is_reached=is_reached.to(pair.short.device))
                self._short[name] = self._short.get(name, 0) + short.mT @ short  # type: ignore[assignment]
                if name not in self._long:
                    dim, seed = self.settings.basis_dim, self.settings.seed
                    self._long[name] = _Sketch(long.shape[1], dim, like=long, seed=seed)
                self._long[name].add(long)
            self._room -= sum(pair.short.nbytes + pair.long.nbytes for pair in pairs.values())
            kept = [*kept, pairs] if self._room >= 0 else []
        self._kept.append(kept if self._room >= 0 else None)

    def add_squares(self, sample: Sequence[Encoded], *, exp_avg_sq: Mapping[str, Tensor] | None = None) -> None:
        """Take in eigenvalues and energies of the samples that gave the bases, in the same order; the first call
        settles the bases."""
        scale, adam = self._scale(sample, exp_avg_sq), adam_scale(exp_avg_sq)
        if not self._sums:
            self.settle_bases()
        kept = self._kept.popleft()
        for pairs in kept or (self._pairs(batch) for batch in self._batches(sample)):
            for name, sums in self._sums.items():
                gradient = pairs[name].gradient()
                sums.add(_scaled(gradient, scale, name), _scaled(gradient, adam, name))

    def settle_bases(self) -> list[Tensor]:
        """Make the bases out of what was taken in, and return them, for workers to share one worker's."""
        for name, short in self._short.items():
            self._sums[name] = _Sums(_eigenvectors(short).contiguous(), self._long[name].basis())
        return [basis for sums in self._sums.values() for basis in (sums.short_basis, sums.long_basis)]

    def sums(self) -> list[Tensor]:
        """Return the sums taken in so far, those of the bases until these are settled; workers add theirs in place."""
        if self._sums:
            return [tensor for sums in self._sums.values() for tensor in sums.tensors()]
        return [tensor for name, short in self._short.items() for tensor in (short, self._long[name].sum)]

    def codec(self) -> GradientCodec:
        """Return what was fitted; its tensors are on the CPU."""
        fitted, energies = [], []
        floors = damping_floors([self._mean_eigenvalue(name) for name in self._sums], self.settings.damping)
        for (name, sums), floor in zip(self._sums.items(), floors, strict=True):
            weight = torch.ones_like(sums.squares)
            if self.settings.preconditioner == "ekfac":
                weight = (sums.squares / sums.num + floor).rsqrt()
            everything = torch.arange(weight.numel(), device=weight.device)
            fitted.append(FactorCodec(name, sums.short_basis, sums.long_basis, weight, everything))
            energies.append(sums.squares * weight**2)
        fitted = self._in_nats(fitted, energies)
        return cut(self.settings.preconditioner, fitted, energies, dim=self.settings.dim).to("cpu")

    def _mean_eigenvalue(self, name: str) -> float:
        rank, length = self.factors.shapes[name]
        return float(self._sums[name].size / self._sums[name].num) / (rank * length)

    def _in_nats(self, fitted: list[FactorCodec], energies: Sequence[Tensor]) -> list[FactorCodec]:
        wanted = sum(float(sums.adam_size) for sums in self._sums.values())
        if self.settings.preconditioner != "ekfac" or not self._has_moments:
            return fitted
        gain = (wanted / max(sum(float(energy.sum()) for energy in energies), _TINY)) ** 0.5
        return [replace(one, weight=one.weight * gain) for one in fitted]

    def _batches(self, sample: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
        for rows in self.factors.batches(sample):
            yield [sample[row] for row in rows]

    def _pairs(self, batch: Sequence[Encoded]) -> dict[str, FactorPair]:
        """Return the pairs of the targets that the preconditioner rests on."""
        if self.settings.preconditioner == "ekfac":
            return self.factors.drawn_pairs(batch, self._generator)
        return self.factors.pairs(batch)

    def _basis_rows(
        self, name: str, pair: FactorPair, scale: Mapping[str, Tensor] | None, *, is_reached: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the rows whose second moments give the bases: [rows, r] and [rows, l]."""
        if self.settings.preconditioner == "ekfac":
            return pair.short[is_reached].float(), pair.long[is_reached].float()
        gradient = _scaled(pair.gradient(), scale, name)
        return gradient.mT.flatten(0, 1), gradient.flatten(0, 1)

    def _scale(self, sample: Sequence[Encoded], exp_avg_sq: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        if not sample:
            raise ValueError("sample: no example to fit the factors on; pass at least one, better 64")
        self._has_moments = exp_avg_sq is not None
        if self.settings.preconditioner != "adam":
            return None
        if exp_avg_sq is None:
            raise ValueError("exp_avg_sq: the 'adam' preconditioner needs the second moments of the checkpoint")
        return adam_scale(exp_avg_sq)


class _Sums:
    """Sums over examples of one factor's turned gradients, squared."""

    def __init__(self, short_basis: Tensor, long_basis: Tensor) -> None:
        self.short_basis, self.long_basis = short_basis, long_basis
        self.squares = short_basis.new_zeros(short_basis.shape[1], long_basis.shape[1])
        self.size, self.adam_size, self.num = (short_basis.new_zeros(()) for _ in range(3))

    def add(self, gradient: Tensor, adam: Tensor) -> None:
        """Take in gradients [n, r, l], and the same under Adam's scale."""
        self.squares += (self.short_basis.mT @ gradient @ self.long_basis).square().sum(0)
        self.size += gradient.square().sum()
        self.adam_size += adam.square().sum()
        self.num += len(gradient)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.squares, self.size, self.adam_size, self.num


def _scaled(gradient: Tensor, scale: Mapping[str, Tensor] | None, name: str) -> Tensor:
    return gradient if scale is None else gradient * scale_of(scale, name, gradient)


def _is_reached(batch: Sequence[Encoded]) -> Tensor:
    """Return bool [n, t]: the positions that a loss reaches, those before an example's last target; padding is none.

    Asked of the labels, not of the gradients: one that is zero in exact arithmetic may be 1e-8 in another batch.
    """
    longest = max(len(ids) for ids, _ in batch)
    ends = [
        max((place for place, label in enumerate(labels) if label != IGNORED_LABEL), default=0) for _, labels in batch
    ]
    return torch.arange(longest) < torch.tensor(ends)[:, None]


class _Sketch:
    """The leading eigenvectors of sum of x x^T over rows x [l], from one pass.

    Whole while l is at most twice the vectors wanted; beyond that Nystroem's sketch of twice as many random directions:
    the matrix of a 1536-wide layer would take a second to take apart, 90 times per checkpoint of a small model.
    Tropp et al. 2017, https://arxiv.org/abs/1706.05736.
    """

    def __init__(self, length: int, num_vectors: int, *, like: Tensor, seed: int) -> None:
        self.num_vectors = min(num_vectors, length)
        self._test: Tensor | None = None
        width = length
        if length > 2 * num_vectors:
            width = 2 * num_vectors
            generator = torch.Generator().manual_seed(seed)
            self._test = torch.linalg.qr(torch.randn(length, width, generator=generator)).Q.to(like.device)
        self.sum = torch.zeros(length, width, device=like.device)

    def add(self, rows: Tensor) -> None:
        """Take in rows [m, l]."""
        self.sum += rows.mT @ (rows if self._test is None else rows @ self._test)

    def basis(self) -> Tensor:
        """Return [l, b], orthonormal columns by falling eigenvalue."""
        if self._test is None:
            return _eigenvectors(self.sum)[:, : self.num_vectors].contiguous()
        # A shift keeps the core's Cholesky factor defined where rows were fewer than directions; it is undone by none,
        # because eigenvectors do not change under it.
        shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(self.sum) * self.sum.shape[0] ** 0.5
        shifted = self.sum + shift * self._test
        core = self._test.mT @ shifted
        factor = torch.linalg.cholesky((core + core.mT) / 2)
        root = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
        return torch.linalg.svd(root, full_matrices=False).U[:, : self.num_vectors].contiguous()


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, by falling eigenvalue."""
    return torch.linalg.eigh((matrix + matrix.mT) / 2).eigenvectors.flip(1)
