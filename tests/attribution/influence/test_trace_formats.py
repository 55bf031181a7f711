"""A trace of format 1, written before there was a recorder, still reads, and says what it cannot do."""

import pytest

from attribution.influence.store import Trace, TraceError
from tests.attribution.influence.planted import CHECKPOINT_STEPS, NUM_STEPS, Planted


def test_a_trace_without_a_recorder_reads_and_says_what_it_lacks(planted: Planted) -> None:
    trace = Trace(planted.trace)
    assert not trace.is_recorded and trace.in_run is None
    assert len(trace.steps) == NUM_STEPS and trace.steps[0].grad_norm is None
    assert [trace.examples[row].example_id for row in trace.steps[0].rows] == list(trace.steps[0].example_ids)
    assert trace.gradients(CHECKPOINT_STEPS[0]).shape[0] == len(trace.examples)
    for ask in (lambda: trace.facts, lambda: trace.state_steps, lambda: trace.state(20), lambda: trace.encoded):
        with pytest.raises(TraceError, match=r"an adapter trained without a recorder: .* 3 gradient checkpoints still"):
            ask()
    with pytest.raises(TraceError, match=r"'facts': the run was not scored against it; registered .*: none"):
        trace.in_run_scores("facts")
