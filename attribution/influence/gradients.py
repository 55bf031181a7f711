"""Per-example LoRA gradients, Adam-aware and projected, from one forward and one backward pass of a padded batch.

Shape legend: n examples, t token positions, r LoRA rank, i in_features, o out_features, k projection dimension, v
vocabulary.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.influence.encode import IGNORED_LABEL

ADAM_EPS = 1e-8
"""Added to sqrt(v) as Adam does; the default of torch.optim.AdamW."""

Encoded = tuple[Sequence[int], Sequence[int]]
"""(input ids, labels) of one example, as `encode_example` returns them."""


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear: its PEFT name (without `.lora_A`), its two factors and the two projections."""

    name: str
    lora_a: nn.Linear
    lora_b: nn.Linear
    projection_a: Tensor  # [i, k]
    projection_b: Tensor  # [o, k]

    @property
    def rank(self) -> int:
        return self.lora_a.out_features


@dataclass
class Activations:
    """What one forward pass leaves behind, in module order."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # x: [n, t, i]
    shrunk: dict[str, Tensor] = field(default_factory=dict)  # A x: [n, t, r]
    expanded: dict[str, Tensor] = field(default_factory=dict)  # B A x: [n, t, o]


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
        self.modules = tuple(_lora_modules(model, adapter, projection_dim=projection_dim, seed=seed))
        if not self.modules:
            raise ValueError(
                f"model: no LoRA module carries the adapter {adapter!r}; load one before asking for its gradients"
            )

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
        scale = _preconditioner(exp_avg_sq)
        with self._forward(batch) as (seen, losses):
            return self._backward(seen, losses.sum(), scale, retain_graph=False)

    def token_features(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int],
        *,
        exp_avg_sq: Mapping[str, Tensor] | None = None,
        num_groups: int = 8,
    ) -> Tensor:
        """Return float32 [groups, dim]: features of contiguous groups of target tokens, which sum to the example's.

        The loss of one token reaches all earlier positions, so each group has a backward of its own; they share one
        forward. There are at most `num_groups` groups and at most one per target token.
        """
        scale = _preconditioner(exp_avg_sq)
        with self._forward([(input_ids, labels)]) as (seen, losses):
            groups = losses.tensor_split(max(1, min(num_groups, len(losses))))
            rows = [self._backward(seen, group.sum(), scale, retain_graph=True) for group in groups]
        return torch.cat(rows)

    @contextmanager
    def _forward(self, batch: Sequence[Encoded]) -> Iterator[tuple[Activations, Tensor]]:
        """Yield (activations, float32 loss of each target token in order) of one recorded forward pass."""
        device = next(self.model.parameters()).device
        input_ids, labels, mask = pad_batch(batch, device=device)
        with evaluating(self.model), torch.enable_grad(), self._recording() as seen:
            yield seen, target_losses(self.model, input_ids, labels, mask=mask)

    def _backward(
        self, seen: Activations, loss: Tensor, scale: Mapping[str, Tensor] | None, *, retain_graph: bool
    ) -> Tensor:
        outputs = [tensor for m in self.modules for tensor in (seen.shrunk[m.name], seen.expanded[m.name])]
        deltas = torch.autograd.grad(loss, outputs, retain_graph=retain_graph)
        parts = [
            self._module_features(module, seen, deltas[2 * j], deltas[2 * j + 1], scale)
            for j, module in enumerate(self.modules)
        ]
        return torch.cat(parts, dim=1).cpu()

    def _module_features(
        self,
        module: LoraModule,
        seen: Activations,
        delta_a: Tensor,
        delta_b: Tensor,
        scale: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Return [n, 2*r*k] of one module; delta_a = dL/d(Ax) [n, t, r], delta_b = dL/d(BAx) [n, t, o]."""
        x, shrunk = seen.inputs[module.name].float(), seen.shrunk[module.name].detach().float()
        if scale is None:
            # Projecting the long side first is cheaper, and equal: nothing stands between the sum and the projection.
            a = torch.einsum("ntr,ntk->nrk", delta_a.float(), x @ module.projection_a)
            b = torch.einsum("ntr,ntk->nrk", shrunk, delta_b.float() @ module.projection_b)
        else:
            grad_a = torch.einsum("ntr,nti->nri", delta_a.float(), x) * _scale_of(
                scale, f"{module.name}.lora_A.weight", x
            )
            grad_b = torch.einsum("nto,ntr->nor", delta_b.float(), shrunk) * _scale_of(
                scale, f"{module.name}.lora_B.weight", x
            )
            a = grad_a @ module.projection_a
            b = torch.einsum("nor,ok->nrk", grad_b, module.projection_b)
        return torch.cat([a.flatten(1), b.flatten(1)], dim=1)

    @contextmanager
    def _recording(self) -> Iterator[Activations]:
        seen = Activations()
        handles = []
        for module in self.modules:
            handles.append(module.lora_a.register_forward_hook(_record_shrink(seen, module.name)))
            handles.append(module.lora_b.register_forward_hook(_record_expand(seen, module.name)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def target_log_likelihoods(model: nn.Module, batch: Sequence[Encoded]) -> list[Tensor]:
    """Return per example the float32 log-likelihood (nats) of each target token, in order. No gradient."""
    device = next(model.parameters()).device
    input_ids, labels, mask = pad_batch(batch, device=device)
    with evaluating(model), torch.no_grad():
        losses = target_losses(model, input_ids, labels, mask=mask)
    counts = (labels[:, 1:] != IGNORED_LABEL).sum(dim=1).tolist()
    return [-part.cpu() for part in losses.split(counts)]


def pad_batch(batch: Sequence[Encoded], *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad examples to one length; return int64 (input_ids, labels, attention_mask), each [n, t]."""
    longest = max(len(ids) for ids, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED_LABEL, dtype=torch.long)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, (ids, targets) in enumerate(batch):
        assert len(ids) == len(targets), f"example {row}: {len(ids)} ids but {len(targets)} labels"
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        labels[row, : len(ids)] = torch.as_tensor(targets)
        mask[row, : len(ids)] = 1
    return input_ids.to(device), labels.to(device), mask.to(device)


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


def _lora_modules(model: nn.Module, adapter: str, *, projection_dim: int, seed: int) -> Iterator[LoraModule]:
    for name, module in model.named_modules():
        factors_a: Any = getattr(module, "lora_A", None)
        if not isinstance(factors_a, nn.ModuleDict) or adapter not in factors_a:
            continue
        lora_a, lora_b = factors_a[adapter], module.lora_B[adapter]  # type: ignore[index]
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear), f"{name}: not a linear LoRA module"
        device = lora_a.weight.device
        yield LoraModule(
            name=name,
            lora_a=lora_a,
            lora_b=lora_b,
            projection_a=rademacher(lora_a.in_features, projection_dim, seed=seed, name=f"{name}.lora_A").to(device),
            projection_b=rademacher(lora_b.out_features, projection_dim, seed=seed, name=f"{name}.lora_B").to(device),
        )


def _record_shrink(seen: Activations, name: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A frozen adapter under a frozen base has no graph to hang a gradient on; start one here.
        output = output if output.requires_grad else output.requires_grad_()
        seen.inputs[name], seen.shrunk[name] = inputs[0].detach(), output
        return output

    return hook


def _record_expand(seen: Activations, name: str) -> Any:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen.expanded[name] = output

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back on afterwards for the modules that had it on."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def target_losses(model: Any, input_ids: Tensor, labels: Tensor, *, mask: Tensor) -> Tensor:
    """Return float32 [number of targets]: negative log-likelihood (nats) of each target token, in order.

    input_ids, labels and mask are [n, t] as `pad_batch` returns them. The head runs from the first target on only: over
    a prompt it would cost a fifth of a small model's pass for logits that nobody reads.
    """
    has_target = (labels != IGNORED_LABEL).any(dim=0)
    first = int(has_target.to(torch.uint8).argmax())
    kept_positions = labels.shape[1] - first + 1 if first else labels.shape[1]
    output = model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=kept_positions)
    targets = labels[:, -kept_positions:][:, 1:]
    kept = targets != IGNORED_LABEL
    # Only target positions are made float32: a [n, t, v] copy would be the largest tensor of the pass.
    return nn.functional.cross_entropy(output.logits[:, :-1][kept].float(), targets[kept], reduction="none")


def _preconditioner(exp_avg_sq: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if exp_avg_sq is None:
        return None
    return {
        parameter_name(name): (value.detach().float().sqrt() + ADAM_EPS).rsqrt() for name, value in exp_avg_sq.items()
    }


def _scale_of(scale: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name not in scale:
        raise ValueError(f"exp_avg_sq: no second moment for {name!r}; it holds {sorted(scale)[:2]}...")
    return scale[name].to(like.device)
