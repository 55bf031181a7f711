"""A LoRA gradient as a short row: each factor turned into its eigenbases, preconditioned, cut to what carries scores.

Shape legend: n examples, t token positions, r rank, l long side, a <= r and b <= l basis vectors kept, d numbers in a
row. A factor's gradient G [r, l] is its short side first (see `FactorPair`).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from attribution.influence.factors import FactorPair
from attribution.influence.gradients import adam_scale, scale_of
from kernels.gradients import BLOCK, lora_gradient

Preconditioner = Literal["ekfac", "adam", "identity"]


@dataclass(frozen=True)
class FactorCodec:
    """One factor: orthonormal bases, the weight of each coordinate, and which coordinates are kept."""

    name: str
    short_basis: Tensor  # [r, a]
    long_basis: Tensor  # [l, b]
    weight: Tensor  # [a, b]
    kept: Tensor  # int64 [k], positions in the flattened [a, b]

    def turned(self, pair: FactorPair, scale: Mapping[str, Tensor] | None) -> Tensor:
        """Return float32 [n, a, b]: short_basis^T (G * scale) long_basis."""
        if scale is None:
            return lora_gradient(pair.short.float() @ self.short_basis, pair.long, self.long_basis)
        return self.short_basis.mT @ (pair.gradient() * scale_of(scale, self.name, pair.long)) @ self.long_basis


@dataclass(frozen=True)
class GradientCodec:
    """All factors of one checkpoint. `order` int64 [d]: a row's columns by falling energy; -1 pads the last block.

    <encode(q), encode(i)> approximates g_q^T M g_i, M being the preconditioner: the inverse of the damped EK-FAC Fisher
    matrix, Adam's 1 / (sqrt(v) + eps), or 1. What is left out carried least of the fitted sample's energy.
    """

    preconditioner: Preconditioner
    factors: tuple[FactorCodec, ...]
    order: Tensor
    energy_kept: float

    @property
    def dim(self) -> int:
        """Numbers in a row, a multiple of `BLOCK`."""
        return len(self.order)

    @property
    def is_of_each_view(self) -> bool:
        """Whether rows differ from checkpoint to checkpoint by more than the gradient, so that they do not add up."""
        return self.preconditioner == "adam"

    def encode(self, pairs: Mapping[str, FactorPair], *, exp_avg_sq: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return float32 [n, d] on the device of the pairs.

        `exp_avg_sq` by PEFT parameter name, as stored: needed by "adam", ignored by the others. Raises ValueError when
        the pairs are of other factors than the codec's.
        """
        if list(pairs) != [factor.name for factor in self.factors]:
            raise ValueError("the gradients are of other modules than the codec's; they belong to another adapter")
        scale = adam_scale(exp_avg_sq) if self.preconditioner == "adam" else None
        return self._row([one.turned(pairs[one.name], scale) for one in self.factors])

    def encode_gradients(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the rows [n, d] of gradients [n, r, l] by factor, as `encode` does where no moments are needed."""
        return self._row([one.short_basis.mT @ gradients[one.name] @ one.long_basis for one in self.factors])

    def _row(self, turned_NAB: Sequence[Tensor]) -> Tensor:
        turned = torch.cat([one.flatten(1) for one in turned_NAB], dim=1)
        places, weights = self._columns
        row = turned.index_select(1, places).mul_(weights)
        return row if len(places) == self.dim else nn.functional.pad(row, (0, self.dim - len(places)))

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """Return where each column of a row stands among all factors' coordinates, and its weight."""
        starts = itertools.accumulate((one.weight.numel() for one in self.factors), initial=0)
        places = torch.cat([one.kept + start for one, start in zip(self.factors, starts, strict=False)])
        weights = torch.cat([one.weight.flatten()[one.kept] for one in self.factors])
        order = self.order[self.order >= 0]
        return places[order], weights[order]

    def to(self, device: torch.device | str) -> "GradientCodec":
        """Return the codec with its tensors on `device`."""
        factors = tuple(
            FactorCodec(
                one.name,
                one.short_basis.to(device),
                one.long_basis.to(device),
                one.weight.to(device),
                one.kept.to(device),
            )
            for one in self.factors
        )
        return GradientCodec(self.preconditioner, factors, self.order.to(device), self.energy_kept)

    def save(self, path: Path) -> None:
        """Write what `load` reads; the bytes follow from the values."""
        from safetensors.torch import save_file

        tensors = {"order": self.order}
        for one in self.factors:
            parts = (
                ("short_basis", one.short_basis),
                ("long_basis", one.long_basis),
                ("weight", one.weight),
                ("kept", one.kept),
            )
            tensors |= {f"{one.name}:{part}": value.cpu().contiguous() for part, value in parts}
        meta = {
            "preconditioner": self.preconditioner,
            "energy_kept": self.energy_kept,
            "factors": [one.name for one in self.factors],
        }
        # One entry: the library writes several in an order that changes from run to run.
        save_file(tensors, path, {"codec": json.dumps(meta)})

    @classmethod
    def load(cls, path: Path) -> "GradientCodec":
        """Return the codec that `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["codec"])
            factors = tuple(
                FactorCodec(
                    name,
                    *(file.get_tensor(f"{name}:{part}") for part in ("short_basis", "long_basis", "weight", "kept")),
                )
                for name in meta["factors"]
            )
            order = file.get_tensor("order")
        return cls(meta["preconditioner"], factors, order, meta["energy_kept"])


def cut(
    preconditioner: Preconditioner, factors: Sequence[FactorCodec], energies: Sequence[Tensor], *, dim: int
) -> GradientCodec:
    """Return a codec that keeps the `dim` coordinates of most energy, over all factors; dim is rounded up to a block.

    `energies`: per factor [a, b], the mean square of each weighted coordinate over the fitted sample. `factors` come
    with everything kept.
    """
    flat = torch.cat([energy.flatten() for energy in energies]).double()
    num_blocks = max(1, -(-min(dim, len(flat)) // BLOCK))
    chosen = torch.sort(flat, descending=True, stable=True).indices[: min(num_blocks * BLOCK, len(flat))]
    bounds = [0]
    for energy in energies:
        bounds.append(bounds[-1] + energy.numel())
    kept_factors, column_of, done = [], torch.full((len(flat),), -1), 0
    for factor, start, end in zip(factors, bounds[:-1], bounds[1:], strict=True):
        kept = torch.sort(chosen[(chosen >= start) & (chosen < end)]).values
        column_of[kept] = torch.arange(done, done + len(kept))
        done += len(kept)
        kept_factors.append(
            FactorCodec(factor.name, factor.short_basis, factor.long_basis, factor.weight, kept - start)
        )
    order = torch.full((num_blocks * BLOCK,), -1)
    order[: len(chosen)] = column_of[chosen]
    share = float(flat[chosen].sum() / flat.sum().clamp_min(torch.finfo(torch.float64).tiny))
    return GradientCodec(preconditioner, tuple(kept_factors), order, share)
