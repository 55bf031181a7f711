"""What `trailmark trace` shows: what a run wrote down, what that allows, and whom its registered queries owe."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from attribution.bodies import AdapterBody
from attribution.erasure import remaining
from attribution.influence.rows import rows_of
from attribution.influence.store import Trace, TraceError
from pipelines.benchmark.run import resolve_adapter

if TYPE_CHECKING:
    from attribution.trail import Trail

MAX_TEXT_CHARS = 60


def trace_view(trail: "Trail", adapter: str, *, top: int) -> Iterator[Table]:
    """Yield a table of the trace's parts, then one for each registered query set with the `top` rows at either end.

    Raises:
        UserError: no such adapter, or its trace is not in the store.
    """
    entry = trail.find(resolve_adapter(trail, adapter).digest)
    assert entry is not None and entry.record is not None and isinstance(entry.record.body, AdapterBody)
    digest = remaining(trail, entry.record.body.trace)
    if not trail.store.has(digest):
        raise TraceError(f"trace {digest}: it is no longer in the store; train the adapter again to get one")
    trace = Trace(trail.store.get_directory(digest, verify=False))
    yield _parts(trace, digest, title=f"Trace of {adapter}")
    names = dict.fromkeys(query.query_set for query in trace.in_run.queries) if trace.in_run else {}
    for name in names:
        yield _scores(trail, trace, name, top=top)


def _parts(trace: Trace, digest: str, *, title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_row("digest", digest)
    table.add_row("steps, examples", f"{len(trace.steps)}, {len(trace.examples)}")
    kilobytes = rows_of(trace).bytes_per_example / 1e3
    after = ", ".join(map(str, trace.checkpoint_steps))
    table.add_row("gradients of every example", f"after steps {after}; {kilobytes:.1f} kB each in all")
    if not trace.is_recorded:
        table.add_row("replay", "an adapter trained without a recorder cannot be replayed or audited")
        return table
    for name, value in _recipe(trace):
        table.add_row(name, value)
    return table


def _recipe(trace: Trace) -> Iterator[tuple[str, str]]:
    facts = trace.facts
    states = ", ".join(map(str, trace.state_steps))
    yield "states for replay", f"after steps {states}; {facts.bytes_per_state / 1e6:.1f} MB each"
    adam = facts.adam
    yield "AdamW", f"betas {adam.beta1:g} {adam.beta2:g}, eps {adam.eps:g}, weight decay {facts.weight_decay:g}"
    norms = [step.grad_norm or 0.0 for step in trace.steps]
    num_clipped = sum(norm > facts.max_grad_norm for norm in norms)
    yield (
        "gradient norm",
        f"{min(norms):.3g} to {max(norms):.3g}, clipped to {facts.max_grad_norm:g} in {num_clipped} steps",
    )
    kernel = f"{facts.attention} attention{', deterministic' if facts.deterministic else ''}"
    yield "arithmetic", f"{facts.dtype} on {facts.device}, {kernel}, torch {facts.versions['torch']}"
    workers = f"{facts.world_size} workers of {facts.threads_per_worker} threads, ZeRO-{facts.zero_stage}"
    yield "workers", workers
    for attempt in facts.attempts[1:]:
        yield f"attempt {attempt.attempt}", f"went on after step {attempt.step}"


def _scores(trail: "Trail", trace: Trace, name: str, *, top: int) -> Table:
    from attribution.lineage import Lineage

    names = Lineage(trail).contributor_names()
    scores = trace.in_run_scores(name)
    meta = trace.in_run
    assert meta is not None
    taken = f"gradients every {meta.refresh_steps} steps, {meta.overhead:.1%} on top of the training time"
    table = Table(title=f"In-run scores against {name}", caption=f"first order, Adam; {taken}; a ranking, no cause")
    for column in ("nats per token", "contributor", "row", "text"):
        table.add_column(column, justify="right" if column == "nats per token" else "left")
    order = np.argsort(-scores, kind="stable")
    shown = order if len(order) <= 2 * top else np.concatenate([order[:top], order[len(order) - top :]])
    for row in shown:
        example = trace.examples[row]
        owner = names.get(example.contributor, example.contributor[:12])
        text = " ".join(example.text.split())[:MAX_TEXT_CHARS]
        table.add_row(f"{scores[row]:+.2e}", owner, example.example_id[:19], text)
    return table
