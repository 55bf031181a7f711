"""The outage program at toy size: a real server killed, receipts recorded meanwhile, nothing lost."""

from pathlib import Path

from benchmarks.mlflow_outage import measure


def test_nothing_is_lost_while_mlflow_is_away(tmp_path: Path) -> None:
    result = measure(tmp_path, outage_s=2.0, real_rate=0.1)
    assert result.num_during_outage == 60 and result.num_receipts == 60 + 2 + 3 * 5 + 5
    assert (result.num_lost, result.num_differences) == (0, 0)
    assert result.num_traces == result.num_receipts and result.catch_up_s > 0
