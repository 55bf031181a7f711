"""Many adapters on one frozen base in one forward: every row of a batch belongs to one of the stacked adapters.

Shape legend: b stacked adapters, k rows of each, t token positions, r LoRA rank, i in_features, o out_features, p
numbers in one adapter (all factors flattened in the model's parameter order).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.gradients import Encoded, evaluating, pad_batch, parameter_name
from configs.errors import UserError


class StackError(UserError):
    """Weights do not fit the model's adapter, or the adapter is of a form that cannot be stacked."""


@dataclass(frozen=True)
class Factor:
    """One LoRA factor: its saved PEFT name, its shape and where it starts in the flat adapter."""

    name: str
    shape: tuple[int, int]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenRows:
    """Examples padded once, to be drawn from by row number: int64 [n, t] ids and labels, [n] lengths and targets."""

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    num_targets: Tensor

    @classmethod
    def of(cls, examples: Sequence[Encoded], *, device: torch.device | str = "cpu") -> "TokenRows":
        """Pad `examples`. Raises StackError when one has no target token."""
        input_ids, labels, mask = pad_batch(examples, device=device)
        num_targets = (labels[:, 1:] != IGNORED_LABEL).sum(dim=1)
        if not bool((num_targets > 0).all()):
            row = int((num_targets == 0).nonzero()[0])
            raise StackError(f"example {row}: it has no target token after its first, so nothing was learned from it")
        return cls(input_ids, labels, mask.sum(dim=1), num_targets)

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (input_ids, labels) of some rows, cut to the longest of them."""
        longest = int(self.lengths[rows].max())
        return self.input_ids[rows, :longest], self.labels[rows, :longest]


class StackedLora:
    """A PEFT LoRA model whose adapter is taken from flat weights, a stack of adapters at a time.

    Semantics: adapter s of `weights` [b, p] serves rows s*k .. (s+1)*k of a batch, base(x) + scaling * B_s (A_s x). The
    model's own adapter is neither used nor changed. Dropout is off. Attention runs as plain matrix products, so that it
    can be differentiated twice and sums in one order.
    """

    def __init__(self, model: nn.Module, *, adapter: str = "default") -> None:
        self.model: Any = model
        self.factors, self._modules = _layout(model, adapter)
        self.num_weights = sum(factor.size for factor in self.factors)
        self._live: dict[str, tuple[Tensor, Tensor]] = {}
        self._attached = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [p] from tensors by PEFT name. Raises StackError for a missing or misshapen one."""
        parts = []
        for factor in self.factors:
            value = tensors.get(factor.name)
            if value is None or tuple(value.shape) != factor.shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}, expected {factor.shape}"
                raise StackError(f"weight {factor.name!r} is {found}; the files are of another adapter")
            parts.append(value.detach().reshape(-1))
        return torch.cat(parts).to(self.device)

    def unflatten(self, weights: Tensor) -> dict[str, Tensor]:
        """Return [p] as tensors by PEFT name."""
        parts = weights.split([factor.size for factor in self.factors])
        return {factor.name: part.view(factor.shape) for factor, part in zip(self.factors, parts, strict=True)}

    def own_weights(self) -> Tensor:
        """Return [p]: the weights that the model carries itself."""
        named = {parameter_name(name): value for name, value in self.model.named_parameters() if ".lora_" in name}
        return self.flatten(named)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the stacked adapter hooked in place of the model's own; calls inside are cheaper. May be nested."""
        if self._attached:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self.model.disable_adapter())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for name, module, scaling in self._modules:
                handle = module.register_forward_hook(self._hook(name, scaling))
                stack.callback(handle.remove)
            self._attached = 1
            stack.callback(self._detach)
            yield

    def row_losses(self, weights: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return [b, k]: the summed negative log-likelihood (nats) of each row's targets.

        weights [b, p], input_ids and labels int64 [b*k, t] right-padded. Differentiable in the weights, twice.
        """
        num_stacked = weights.shape[0]
        kept = labels[:, 1:] != IGNORED_LABEL
        first = int(kept.any(dim=0).to(torch.uint8).argmax())
        kept = kept[:, first:]
        with self.attached():
            self._set(weights)
            # No mask: padding stands to the right, where a causal model never looks from a real token.
            output = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=input_ids.shape[1] - first)
            self._live = {}
        logits, targets = output.logits[:, :-1][kept], labels[:, 1 + first :][kept]
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        rows = kept.nonzero()[:, 0]
        summed = torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, rows, losses)
        return summed.view(num_stacked, -1)

    def _set(self, weights: Tensor) -> None:
        parts = weights.split([factor.size for factor in self.factors], dim=1)
        shaped = [part.view(-1, *factor.shape) for factor, part in zip(self.factors, parts, strict=True)]
        self._live = {name: (shaped[2 * j], shaped[2 * j + 1]) for j, (name, *_) in enumerate(self._modules)}

    def _hook(self, name: str, scaling: float) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self._live[name]  # [b, r, i], [b, o, r]
            x = inputs[0].reshape(a.shape[0], -1, a.shape[2])
            shrunk = torch.bmm(x.to(a.dtype), a.transpose(1, 2))
            base = output.reshape(a.shape[0], -1, b.shape[1])
            added = torch.baddbmm(base.to(a.dtype), shrunk, b.transpose(1, 2), alpha=scaling)
            return added.to(output.dtype).view(output.shape)

        return add

    def _detach(self) -> None:
        self._attached = 0


def _layout(model: nn.Module, adapter: str) -> tuple[tuple[Factor, ...], list[tuple[str, nn.Module, float]]]:
    """Return the factors, A then B of each module, and (name, module, scaling) in the same order."""
    factors: list[Factor] = []
    modules: list[tuple[str, nn.Module, float]] = []
    start = 0
    for name, module in model.named_modules():
        sides: Any = [getattr(module, side, None) for side in ("lora_A", "lora_B")]
        if not isinstance(sides[0], nn.ModuleDict) or adapter not in sides[0]:
            continue
        for side, linears in zip("AB", sides, strict=True):
            linear = linears[adapter]
            if not isinstance(linear, nn.Linear) or linear.bias is not None or _is_dora(module, adapter):
                raise StackError(f"{name}: only plain LoRA on linear layers can be stacked")
            factor = Factor(f"{name}.lora_{side}.weight", tuple(linear.weight.shape), start)  # type: ignore[arg-type]
            factors.append(factor)
            start += factor.size
        modules.append((name, module, float(module.scaling[adapter])))  # type: ignore[index]
    if not factors:
        raise StackError(f"model: no LoRA module carries the adapter {adapter!r}")
    return tuple(factors), modules


def _is_dora(module: Any, adapter: str) -> bool:
    return bool(getattr(module, "use_dora", {}).get(adapter, False))
