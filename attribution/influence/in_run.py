"""First-order scores taken while training: what each row of a batch does to registered queries, from the same pass.

In-Run Data Shapley, first order (Wang et al., https://arxiv.org/abs/2406.11011): an update with gradient g = sum_i g_i
changes a query's loss by about -lr g_q . g, so row i of the batch is credited lr g_q . g_i. Here g_i is the row's part
of the loss that the step minimises (its target tokens' nats over the batch's target tokens), clipped as the step is,
and under Adam g_q is divided by what the step divided by: sqrt(v) + eps with v bias-corrected, held fixed.

A score above zero says that the row lowered the query's loss. Unit: nats per target token of the query.

Shape legend: n rows of a batch, t token positions, i in_features, o out_features, q queries, p adapter parameters.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attribution.influence.encode import num_targets
from attribution.influence.gradients import Encoded, evaluating, pad_batch, parameter_name, target_losses
from attribution.influence.run_facts import METHODS, AdamConstants

QUERY_BATCH = 8
"""Queries per forward and backward."""

Sink = Callable[[str, Tensor], None]


class RowGradients:
    """Takes every row's gradient of every LoRA factor out of a backward pass that runs anyway.

    A factor is a linear y = W x, so row i's gradient is the outer product of what came in and what came back, summed
    over its tokens: dL/dW_i = sum_t delta[i, t] x[i, t]^T. Parameters and their `.grad` are not touched.
    """

    def __init__(self, model: nn.Module, *, adapter: str = "default") -> None:
        self.factors = dict(_factors(model, adapter))
        if not self.factors:
            raise ValueError(f"model: no LoRA module carries the adapter {adapter!r}; build the adapter first")
        self.stopwatch = Stopwatch(next(iter(self.factors.values())).weight.device)

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters of each factor, by PEFT's saved name."""
        return {name: linear.in_features * linear.out_features for name, linear in self.factors.items()}

    @contextmanager
    def recording(self, sink: Sink) -> Iterator[list[Tensor]]:
        """Call `sink(name, float32 [n, o*i])` for each factor as the backward pass reaches it.

        Yields the factors' outputs in the order in which the forward pass made them.
        """
        outputs: list[Tensor] = []
        handles = [
            linear.register_forward_hook(self._forward_hook(name, sink, outputs))
            for name, linear in self.factors.items()
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _forward_hook(self, name: str, sink: Sink, outputs: list[Tensor]) -> Any:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()

            def backward(delta: Tensor) -> None:
                with self.stopwatch:
                    sink(name, torch.einsum("nto,nti->noi", delta.float(), x.float()).flatten(1))

            output.register_hook(backward)
            outputs.append(output)

        return forward


class InRunScorer:
    """Directions of the queries, and the scores of a step's rows along them.

    `queries[j]` belongs to the query of index `groups[j]`; several with one index are one query, whose loss is the mean
    over all their target tokens. Memory: 2 q p floats, and n p for the rows of a step.
    """

    def __init__(self, model: nn.Module, *, groups: Sequence[int], adam: AdamConstants) -> None:
        self.gradients = RowGradients(model)
        self.stopwatch = self.gradients.stopwatch
        self.groups = tuple(groups)
        self.num_queries = max(groups) + 1
        self._adam = adam
        device = self.stopwatch.device
        num_parameters = sum(self.gradients.sizes.values())
        self.directions = torch.zeros(len(METHODS), self.num_queries, num_parameters, device=device)
        self._rows: dict[str, Tensor] = {}

    @property
    def plain(self) -> Tensor:
        """The queries' gradients [q, p], factors in the order of `gradients.sizes`; summed over ranks by the caller."""
        return self.directions[0]

    def take_query_gradients(self, model: Any, queries: Sequence[Encoded], mine: Sequence[Sequence[int]]) -> None:
        """Set `plain` to this rank's part of the queries' gradients at the weights that the model has now.

        `mine` lists the batches (indices into `queries`) that this rank runs, none of them empty; an index below zero
        runs a query without counting it, so that ranks of a partitioned model run equally many batches.
        """
        totals = [0] * self.num_queries
        for group, query in zip(self.groups, queries, strict=True):
            totals[group] += num_targets(query[1])
        self.plain.zero_()
        for batch in mine:
            share = torch.zeros(self.num_queries, len(batch))
            for column, j in enumerate(batch):
                if j >= 0:
                    share[self.groups[j], column] = 1 / totals[self.groups[j]]
            self._add(model, [queries[max(j, 0)] for j in batch], share.to(self._device))

    def _add(self, model: Any, batch: Sequence[Encoded], share: Tensor) -> None:
        views = self._views(self.plain)

        def sink(name: str, rows: Tensor) -> None:
            views[name].addmm_(share, rows)

        with evaluating(model), torch.enable_grad(), self.gradients.recording(sink) as outputs:
            input_ids, labels, mask = pad_batch(batch, device=self._device)
            losses = target_losses(model, input_ids, labels, mask=mask)
            torch.autograd.grad(losses.sum(), outputs)

    def precondition(self, exp_avg_sq: Tensor, step: int) -> None:
        """Divide the directions by what Adam divided update number `step` by; `exp_avg_sq` [p] is after that update."""
        denominator = (exp_avg_sq / (1 - self._adam.beta2**step)).sqrt_().add_(self._adam.eps)
        torch.div(self.plain, denominator, out=self.directions[1])

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Hold the row gradients of the pass that runs in the block, for `scores`."""
        self._rows = {}
        with self.gradients.recording(self._rows.__setitem__):
            yield

    def scores(self, scale: float) -> Tensor:
        """Return float32 [2, n, q]: `scale` times the rows' gradients along the directions; forgets the rows."""
        plain = self._views(self.directions.flatten(0, 1))
        total = sum((rows @ plain[name].T for name, rows in self._rows.items()), torch.zeros((), device=self._device))
        self._rows = {}
        return (total * scale).unflatten(1, (len(METHODS), self.num_queries)).movedim(0, 1)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = self.gradients.sizes
        return dict(zip(sizes, flat.split(list(sizes.values()), dim=1), strict=True))

    @property
    def _device(self) -> torch.device:
        return self.stopwatch.device


class Stopwatch:
    """Adds up the time of its blocks on the device that does the work; a block inside a block counts once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._depth = 0
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if self.device.type == "cpu":
            self._started = time.perf_counter()
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        self._events.append(pair)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self.device.type == "cpu":
            self._seconds += time.perf_counter() - self._started
        else:
            self._events[-1][1].record()

    def take(self) -> float:
        """Return the seconds since the last call; waits for the device."""
        seconds, self._seconds = self._seconds, 0.0
        if self._events:
            torch.cuda.synchronize(self.device)
            seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events = []
        return seconds


def _factors(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if name.endswith((f".lora_A.{adapter}", f".lora_B.{adapter}")):
            assert isinstance(module, nn.Linear), f"{name}: not a linear LoRA factor"
            yield parameter_name(f"{name}.weight", adapter=adapter), module
