"""What the gradient of each LoRA factor is made of, per example, from one forward and one backward pass of a batch.

Shape legend: n examples, t token positions, r LoRA rank, l the factor's long side (in_features of A, out_features of
B), v vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.store import TraceError

Encoded = tuple[Sequence[int], Sequence[int]]
"""(input ids, labels) of one example, as `encode_example` returns them."""
BATCH_BYTES = 1_500_000_000
"""Activations and gradients that a forward and backward may hold: little, for workers share a machine. A token
takes about 8 bytes per input and output of the model's linear layers: 3 MB of a 135M model, measured."""
MAX_BATCH_TOKENS, MAX_BATCH_ROWS = 4096, 64
"""More made nothing faster: 64 rows of a model of 99,000 weights cost the same in one batch as in more of them."""


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear: its PEFT name (without `.lora_A`) and its two factors."""

    name: str
    lora_a: nn.Linear
    lora_b: nn.Linear

    @property
    def rank(self) -> int:
        return self.lora_a.out_features


@dataclass(frozen=True)
class FactorPair:
    """One factor's gradient, short side first: G[n] = sum over t of short[n, t] (outer product) long[n, t], [r, l].

    Of A: short = dL/d(Ax), long = x. Of B: short = Ax, long = dL/d(BAx); G is then B's gradient transposed.
    """

    short: Tensor  # [n, t, r]
    long: Tensor  # [n, t, l]

    def gradient(self) -> Tensor:
        """Return float32 [n, r, l]."""
        return torch.bmm(self.short.float().mT, self.long.float())


@dataclass(frozen=True)
class Padded:
    """A batch as tensors [n, t]; see `pad_batch`."""

    input_ids: Tensor
    labels: Tensor
    mask: Tensor


@dataclass
class Activations:
    """What one forward pass leaves behind, in module order."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # x: [n, t, in_features]
    shrunk: dict[str, Tensor] = field(default_factory=dict)  # A x: [n, t, r]
    expanded: dict[str, Tensor] = field(default_factory=dict)  # B A x: [n, t, out_features]
    head: Tensor | None = None  # logits of the last positions [n, k, v]
    kept: Tensor | None = None  # bool [n, k - 1]: those of them that predict a target


class LoraFactors:
    """Reads the factors' gradients of a PEFT LoRA model; leaves its mode, hooks and `.grad` as they were."""

    def __init__(self, model: nn.Module, *, adapter: str = "default") -> None:
        self.model = model
        self.modules = tuple(_lora_modules(model, adapter))
        if not self.modules:
            raise ValueError(
                f"model: no LoRA module carries the adapter {adapter!r}; load one before asking for its gradients"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Factor name -> (rank, long side), A before B, in module order."""
        return {
            f"{module.name}.lora_{side}": (module.rank, length)
            for module in self.modules
            for side, length in (("A", module.lora_a.in_features), ("B", module.lora_b.out_features))
        }

    def parameters(self) -> dict[str, Tensor]:
        """Return the live weights by PEFT name."""
        return {
            f"{module.name}.lora_{side}.weight": linear.weight
            for module in self.modules
            for side, linear in (("A", module.lora_a), ("B", module.lora_b))
        }

    @cached_property
    def _all_modules(self) -> tuple[nn.Module, ...]:
        """All of the model's, found once: to walk through them at every pass costs a small model a fortieth of it."""
        return tuple(self.model.modules())

    @cached_property
    def batch_tokens(self) -> int:
        """How many padded tokens of this model fit `BATCH_BYTES`."""
        linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        bytes_per_token = 8 * sum(linear.in_features + linear.out_features for linear in linears)
        return min(MAX_BATCH_TOKENS, BATCH_BYTES // bytes_per_token)

    @cached_property
    def batch_rows(self) -> int:
        """How many whole gradients fit `BATCH_BYTES` three times: a checkpoint's, its factors' and their sum."""
        num_weights = sum(rank * length for rank, length in self.shapes.values())
        return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (12 * num_weights)))

    def batches(self, examples: Sequence[Encoded]) -> Iterator[list[int]]:
        """Yield rows in batches of like length, longest first: `batch_rows`, and `batch_tokens` unless one has more."""
        order = sorted(range(len(examples)), key=lambda row: -len(examples[row][0]))
        start = 0
        while start < len(order):
            longest = len(examples[order[start]][0])
            stop = start + max(1, min(self.batch_rows, self.batch_tokens // max(1, longest)))
            yield order[start:stop]
            start = stop

    def padded(self, batch: Sequence[Encoded]) -> Padded:
        """Return a batch as tensors beside the model, for passes at more than one checkpoint."""
        return Padded(*pad_batch(batch, device=next(self.model.parameters()).device))

    def pairs(self, batch: Sequence[Encoded] | Padded) -> dict[str, FactorPair]:
        """Return each factor's pair for the summed loss of each example, by factor name."""
        with self.forward(batch) as (seen, logits, targets):
            return self.backward(seen, _pull(logits, targets))

    def drawn_pairs(self, batch: Sequence[Encoded], generator: torch.Generator) -> dict[str, FactorPair]:
        """Return the pairs for targets drawn from the model's own distribution at the positions of the given ones.

        What the true Fisher is made of.
        """
        with self.forward(batch) as (seen, logits, _):
            return self.backward(seen, _pull(logits, _draw(logits, generator)))

    def group_pairs(self, example: Encoded, *, num_groups: int) -> Iterator[dict[str, FactorPair]]:
        """Yield the pairs of contiguous groups of one example's target tokens; their gradients sum to the example's.

        The loss of one token reaches all earlier positions, so each group has a backward of its own; they share one
        forward. There are at most `num_groups` groups and at most one per target token.
        """
        with self.forward([example]) as (seen, logits, targets):
            pull = _pull(logits, targets)
            groups = torch.arange(len(pull), device=pull.device).tensor_split(max(1, min(num_groups, len(pull))))
            for number, group in enumerate(groups, start=1):
                part = torch.zeros_like(pull).index_copy_(0, group, pull[group])
                yield self.backward(seen, part, retain_graph=number < len(groups))

    @contextmanager
    def forward(self, batch: Sequence[Encoded] | Padded) -> Iterator[tuple[Activations, Tensor, Tensor]]:
        """Yield (activations, logits, targets) of one recorded forward pass, the latter two as of `target_logits`.

        The logits are detached: choosing them needs no backward of its own, a fiftieth of a small model's pass.
        """
        given = batch if isinstance(batch, Padded) else self.padded(batch)
        switch = evaluating(self.model) if any(one.training for one in self._all_modules) else nullcontext()
        with switch, torch.enable_grad(), self._recording() as seen:
            seen.head, seen.kept, targets = _head(self.model, given.input_ids, given.labels, mask=given.mask)
            yield seen, seen.head.detach()[:, :-1][seen.kept].float(), targets

    def backward(self, seen: Activations, pull: Tensor, *, retain_graph: bool = False) -> dict[str, FactorPair]:
        """Return the pairs of a loss whose gradient at `forward`'s logits is `pull`."""
        assert seen.head is not None and seen.kept is not None
        at_head = torch.zeros_like(seen.head)
        at_head[:, :-1][seen.kept] = pull.to(at_head.dtype)
        outputs = [tensor for m in self.modules for tensor in (seen.shrunk[m.name], seen.expanded[m.name])]
        deltas = torch.autograd.grad(seen.head, outputs, at_head, retain_graph=retain_graph)
        pairs = {}
        for index, module in enumerate(self.modules):
            shrunk = seen.shrunk[module.name].detach()
            pairs[f"{module.name}.lora_A"] = FactorPair(deltas[2 * index], seen.inputs[module.name])
            pairs[f"{module.name}.lora_B"] = FactorPair(shrunk, deltas[2 * index + 1])
        return pairs

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


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token per row of logits [m, v], by one uniform number each: `torch.multinomial` takes v of them."""
    sums = logits.detach().softmax(-1).cumsum(-1)
    points = torch.rand(len(logits), 1, generator=generator).to(logits.device) * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _pull(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the summed negative log-likelihood at logits [m, v]: softmax less the targets' ones."""
    probabilities = logits.detach().softmax(-1)
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    return probabilities


def set_factor_weights(factors: LoraFactors, weights: Mapping[str, Tensor]) -> None:
    """Copy LoRA weights by PEFT name into the model. Raises TraceError for a missing or misshapen one."""
    with torch.no_grad():
        for name, parameter in factors.parameters().items():
            value = weights.get(name)
            if value is None or value.shape != parameter.shape:
                raise TraceError(f"checkpoint: weight {name!r} is missing or misshapen; train the adapter again")
            parameter.copy_(value)


def pad_batch(batch: Sequence[Encoded], *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad examples to one length; return int64 (input_ids, labels, attention_mask), each [n, t]."""
    for row, (ids, targets) in enumerate(batch):
        assert len(ids) == len(targets), f"example {row}: {len(ids)} ids but {len(targets)} labels"
    lengths = [len(ids) for ids, _ in batch]
    longest = max(lengths)
    input_ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in batch], dtype=torch.long)
    padded = [[*targets, *[IGNORED_LABEL] * (longest - len(targets))] for _, targets in batch]
    labels = torch.tensor(padded, dtype=torch.long)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return input_ids.to(device), labels.to(device), mask.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back on afterwards for the modules that had it on."""
    was_training = [module for module in model.modules() if module.training]
    if was_training:
        model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def target_losses(model: Any, input_ids: Tensor, labels: Tensor, *, mask: Tensor) -> Tensor:
    """Return float32 [number of targets]: negative log-likelihood (nats) of each target token, in order."""
    logits, targets = target_logits(model, input_ids, labels, mask=mask)
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def target_logits(model: Any, input_ids: Tensor, labels: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (float32 logits [number of targets, v] that predict each target token, the targets), in order.

    input_ids, labels and mask are [n, t] as `pad_batch` returns them.
    """
    logits, kept, targets = _head(model, input_ids, labels, mask=mask)
    # Only target positions are made float32: a [n, t, v] copy would be the largest tensor of the pass.
    return logits[:, :-1][kept].float(), targets


def _head(model: Any, input_ids: Tensor, labels: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits [n, k, v], bool [n, k - 1]: those that predict a target, the targets in order).

    The head runs from the first target on only: over a prompt it would cost a fifth of a small model's pass for logits
    that nobody reads.
    """
    has_target = (labels != IGNORED_LABEL).any(dim=0)
    first = int(has_target.to(torch.uint8).argmax())
    kept_positions = labels.shape[1] - first + 1 if first else labels.shape[1]
    output = model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=kept_positions)
    targets = labels[:, -kept_positions:][:, 1:]
    kept = targets != IGNORED_LABEL
    return output.logits, kept, targets[kept]


def _lora_modules(model: nn.Module, adapter: str) -> Iterator[LoraModule]:
    for name, module in model.named_modules():
        factors_a: Any = getattr(module, "lora_A", None)
        if not isinstance(factors_a, nn.ModuleDict) or adapter not in factors_a:
            continue
        lora_a, lora_b = factors_a[adapter], module.lora_B[adapter]  # type: ignore[index]
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear), f"{name}: not a linear LoRA module"
        yield LoraModule(name=name, lora_a=lora_a, lora_b=lora_b)


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
