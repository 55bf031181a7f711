"""Per-example LoRA gradients, Adam-aware and projected, from one forward and one backward pass of a padded batch.

Shape legend: n examples, t token positions, r LoRA rank, i in_features, o out_features, k projection dimension, v
vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.factors import (
    Encoded,
    FactorPair,
    LoraFactors,
    LoraModule,
    evaluating,
    pad_batch,
    target_losses,
)

ADAM_EPS = 1e-8
"""Added to sqrt(v) as Adam does; the default of torch.optim.AdamW."""


class GradientFeatures:
    """Projected per-example gradients of a PEFT LoRA model.

    Semantics: example loss L = sum over target tokens of the negative log-likelihood. Per module, with C = (sqrt(v) +
    eps)^-1/2 elementwise (C = 1 without `exp_avg_sq`) and P a Rademacher matrix scaled 1/sqrt(k):
        feature_A = (dL/dA * C_A) @ P_A   [r, k]        feature_B = ((dL/dB * C_B)^T @ P_B)   [r, k]
    so that <feature_q, feature_i> estimates g_q . g_i / (sqrt(v) + eps), the inner product under Adam's preconditioner.
    Parameters' `.grad` is never touched, the model's mode and hooks are put back. dtype float32 whatever the model's.
    """

    def __init__(self, model: nn.Module, *, projection_dim: int, seed: int, adapter: str = "default") -> None:
        self.model = model
        self.projection_dim = projection_dim
        self.seed = seed
        self.factors = LoraFactors(model, adapter=adapter)
        device = self.modules[0].lora_a.weight.device
        self._projections = {
            name: rademacher(length, projection_dim, seed=seed, name=name).to(device)
            for name, (_, length) in self.factors.shapes.items()
        }

    @property
    def modules(self) -> tuple[LoraModule, ...]:
        return self.factors.modules

    @property
    def module_dims(self) -> dict[str, int]:
        """Feature count per module, in the order of concatenation (first A's r*k, then B's r*k)."""
        return {module.name: 2 * module.rank * self.projection_dim for module in self.modules}

    @property
    def dim(self) -> int:
        return sum(self.module_dims.values())

    def features(self, batch: Sequence[Encoded], *, exp_avg_sq: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return float32 [n, dim] on the CPU. `exp_avg_sq` is Adam's second moment by PEFT parameter name."""
        if not batch:
            return torch.zeros(0, self.dim)
        return self._projected(self.factors.pairs(batch), adam_scale(exp_avg_sq))

    def token_features(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int],
        *,
        exp_avg_sq: Mapping[str, Tensor] | None = None,
        num_groups: int = 8,
    ) -> Tensor:
        """Return float32 [groups, dim]: the features of groups of target tokens (see `LoraFactors.group_pairs`)."""
        scale = adam_scale(exp_avg_sq)
        groups = self.factors.group_pairs((input_ids, labels), num_groups=num_groups)
        return torch.cat([self._projected(pairs, scale) for pairs in groups])

    def _projected(self, pairs: Mapping[str, FactorPair], scale: Mapping[str, Tensor] | None) -> Tensor:
        parts = [_project(pair, self._projections[name], scale, name) for name, pair in pairs.items()]
        return torch.cat([part.flatten(1) for part in parts], dim=1).cpu()


def _project(pair: FactorPair, projection: Tensor, scale: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """Return [n, r, k] of one factor."""
    if scale is None:
        # Projecting the long side first is cheaper, and equal: nothing stands between the sum and the projection.
        return torch.einsum("ntr,ntk->nrk", pair.short.float(), pair.long.float() @ projection)
    return (pair.gradient() * scale_of(scale, name, pair.long)) @ projection


def target_log_likelihoods(model: nn.Module, batch: Sequence[Encoded]) -> list[Tensor]:
    """Return per example the float32 log-likelihood (nats) of each target token, in order. No gradient."""
    device = next(model.parameters()).device
    input_ids, labels, mask = pad_batch(batch, device=device)
    with evaluating(model), torch.no_grad():
        losses = target_losses(model, input_ids, labels, mask=mask)
    counts = (labels[:, 1:] != IGNORED_LABEL).sum(dim=1).tolist()
    return [-part.cpu() for part in losses.split(counts)]


def rademacher(rows: int, columns: int, *, seed: int, name: str) -> Tensor:
    """Return float32 [rows, columns] of +-1/sqrt(columns): a pure function of (seed, name), on any machine.

    The signs are the bits of SHAKE-256 over "seed:name".
    """
    count = rows * columns
    stream = hashlib.shake_256(f"{seed}:{name}".encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[:count]
    signs = bits.astype(np.float32).reshape(rows, columns) * 2 - 1
    return torch.from_numpy(signs / np.float32(np.sqrt(columns)))


def parameter_name(name: str, *, adapter: str = "default") -> str:
    """Return a live parameter's name as PEFT saves it (`...lora_A.default.weight` -> `...lora_A.weight`)."""
    return name.replace(f".{adapter}.weight", ".weight")


def adam_scale(exp_avg_sq: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return (sqrt(v) + eps)^-1/2 by factor name, short side first [r, l]; None stays None."""
    if exp_avg_sq is None:
        return None
    scale = {}
    for name, value in exp_avg_sq.items():
        factor = parameter_name(name).removesuffix(".weight")
        inverse = (value.detach().float().sqrt() + ADAM_EPS).rsqrt()
        scale[factor] = inverse.mT if factor.endswith(".lora_B") else inverse
    return scale


def scale_of(scale: Mapping[str, Tensor], factor: str, like: Tensor) -> Tensor:
    """Return a factor's scale on the device of `like`. Raises ValueError for one that is missing."""
    if factor not in scale:
        raise ValueError(f"exp_avg_sq: no second moment for '{factor}.weight'; it holds {sorted(scale)[:2]}...")
    return scale[factor].to(like.device)
