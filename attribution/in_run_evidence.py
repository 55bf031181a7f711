"""What scores taken while training say of datasets: how much their updates lowered the loss of registered queries."""

from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attribution.answers import Finding, Resampling
from attribution.evidence import NO_EFFECT, Contribution, MeasuredAdapter, dataset_of_examples, resampled_mean
from attribution.receipt_evidence import trained_on

if TYPE_CHECKING:
    from attribution.trail import Trail


def in_run_findings(
    trail: "Trail", adapter: MeasuredAdapter, items: list[Contribution], resampling: Resampling
) -> list[Finding]:
    """Return, for each query set that was registered before an adapter was trained, each contribution's summed score.

    With an interval over the queries where they were scored one by one. First order: it ranks, and promises no more.
    """
    found = trained_on(trail, adapter.digest)
    trace: Any = found[1] if found else None
    registered = getattr(trace, "in_run", None)  # None: nothing was registered, or the trace has no recorder
    if registered is None:
        return []
    owner = dataset_of_examples(trail, adapter)
    of_row = [owner.get(example.example_id, "") for example in trace.examples]
    queries: dict[str, list[str]] = defaultdict(list)
    for column in registered.queries:
        queries[column.query_set].append(column.query)
    findings = []
    for query_set, names in queries.items():
        scores = np.stack([trace.in_run_scores(query_set, query=name) for name in names])
        for item in items:
            rows = np.array([leaf == item.leaf_hash for leaf in of_row])
            findings.append(_finding(item, adapter, query_set, scores[:, rows].sum(axis=1), resampling))
    return findings


def _finding(
    item: Contribution, adapter: MeasuredAdapter, query_set: str, sums: NDArray[Any], resampling: Resampling
) -> Finding:
    """`sums` [queries]: nats per target token by which the contribution's updates lowered the loss of each."""
    values = sums.astype(np.float64)
    spread = resampled_mean(values, **asdict(resampling)) if len(sums) > 1 else None
    verdict = "ranked, without an interval"
    if spread is not None:
        verdict = NO_EFFECT if not spread.is_distinct else ("helped" if spread.value > 0 else "hindered")
    return Finding(
        item.name,
        f"loss its updates took off {query_set} ({len(sums)} queries) while {adapter.label} was trained, first order",
        float(sums.mean()),
        spread.low if spread else None,
        spread.high if spread else None,
        "nats per token",
        verdict,
        (item.leaf_hash, adapter.leaf_hash),
        resampling.confidence if spread else None,
        tier="explain",
        kind="dataset",
    )
