"""Our methods and the baselines: each a function of a lab that gives scores [queries, rows] and says what they cost.

Positive scores mean that the row helps the query. Costs are CPU seconds of one thread; `query_cpu_s` leaves out the
query's own forward and backward, which every method needs and which is measured by itself.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import process_time
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution.influence.bm25 import bm25_scores
from attribution.influence.gradients import Encoded
from attribution.influence.replay import RunState
from benchmarks.attribution.lab import Lab

Kind = Literal["baseline", "online", "in-run", "audit"]


@dataclass(frozen=True)
class Found:
    """What a method said: scores [q, n] and what it cost. `bytes_per_example` is what stays on disk for a query.

    `build_epochs`: the build beside training epochs that were timed in turn with it; 0 where nobody asked.
    """

    scores: NDArray[np.float64]
    kind: Kind
    build_cpu_s: float = 0.0
    query_cpu_s: float = 0.0
    bytes_per_example: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = "ours"
    build_epochs: float = 0.0


Method = Callable[[Lab], Found]


def random_scores(lab: Lab) -> Found:
    """Chance."""
    shape = (len(lab.queries), len(lab.examples))
    return Found(np.random.default_rng(lab.seed).standard_normal(shape), "baseline")


def bm25(lab: Lab) -> Found:
    """Word overlap, as a search engine ranks."""
    rows = [_words(row.text) for row in lab.world.rows]
    began = process_time()
    scores = [bm25_scores(rows, _words(f"{query.prompt} {query.answer}")) for query in lab.world.queries]
    return Found(np.asarray(scores), "baseline", query_cpu_s=(process_time() - began) / len(lab.queries))


def activation_similarity(lab: Lab) -> Found:
    """Cosine of mean last hidden states under the trained adapter: an embedding search."""
    from benchmarks.attribution.export import unflat
    from pipelines.train.lora import set_weights

    model = lab.model()
    set_weights(model, unflat(model, lab.checkpoints[-1].weights))
    with torch.no_grad():
        found = [
            model(input_ids=torch.tensor([list(ids) for ids, _ in data]), output_hidden_states=True)
            .hidden_states[-1]
            .mean(dim=1)
            for data in (lab.queries, lab.examples)
        ]
    queries, rows = (torch.nn.functional.normalize(one - found[1].mean(dim=0), dim=1) for one in found)
    return Found((queries @ rows.T).double().numpy(), "baseline")


def grad_dot(lab: Lab) -> Found:
    """Inner products of plain gradients at the last checkpoint."""
    queries, rows = lab_gradients(lab, lab.checkpoints[-1])
    return Found((queries @ rows.T).double().numpy(), "baseline")


def grad_cos(lab: Lab) -> Found:
    """Cosines of plain gradients at the last checkpoint."""
    queries, rows = (torch.nn.functional.normalize(one, dim=1) for one in lab_gradients(lab, lab.checkpoints[-1]))
    return Found((queries @ rows.T).double().numpy(), "baseline")


def tracin(lab: Lab) -> Found:
    """TracInCP: inner products summed over checkpoints by the rates that each stands for."""
    total = np.zeros((len(lab.queries), len(lab.examples)))
    for weight, state in zip(checkpoint_rates(lab), lab.checkpoints, strict=True):
        queries, rows = lab_gradients(lab, state)
        total += weight * (queries @ rows.T).double().numpy()
    return Found(total, "baseline", settings={"checkpoints": len(lab.checkpoints)})


BASELINES: dict[str, Method] = {
    "random": random_scores,
    "BM25": bm25,
    "activation similarity": activation_similarity,
    "GradDot": grad_dot,
    "GradCos": grad_cos,
    "TracInCP": tracin,
}


def lab_gradients(lab: Lab, state: RunState) -> tuple[Tensor, Tensor]:
    """Return plain gradients of the summed nats of queries [q, p] and rows [n, p] at a state."""
    return gradients(lab, state, lab.queries), gradients(lab, state, lab.examples)


def gradients(lab: Lab, state: RunState, data: Sequence[Encoded]) -> Tensor:
    """Return [len(data), p], one backward each: the plain version."""
    lora = lab.base_run.lora
    found = []
    with lora.attached():
        for ids, labels in data:
            leaf = state.weights[None].detach().clone().requires_grad_()
            loss = lora.row_losses(leaf, torch.tensor([list(ids)]), torch.tensor([list(labels)]))
            found.append(torch.autograd.grad(loss.sum(), leaf)[0][0])
    return torch.stack(found)


def checkpoint_rates(lab: Lab) -> list[float]:
    """Return per checkpoint the summed rates of the steps that it is nearest to."""
    rates = np.array([step.lr for step in lab.base_run.recipe.steps])
    steps = np.array([state.step for state in lab.checkpoints])
    nearest = np.abs(np.arange(1, len(rates) + 1)[:, None] - steps).argmin(axis=1)
    return [float(rates[nearest == number].sum()) for number in range(len(steps))]


def epoch_cpu_s(lab: Lab) -> float:
    """Return the CPU seconds of one epoch of the recorded run, run alone."""
    run, began = lab.base_run, process_time()
    run.run()
    return (process_time() - began) / lab.train.epochs


def own_pass_cpu_s(lab: Lab) -> float:
    """Return the CPU seconds of one query's own forward and backward."""
    began = process_time()
    gradients(lab, lab.checkpoints[-1], lab.queries)
    return (process_time() - began) / len(lab.queries)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)
