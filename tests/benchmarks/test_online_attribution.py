"""The program runs to its end at toy size, and its answers are the same bytes twice."""

import json

import pytest

from benchmarks import online_attribution


def test_toy(capsys: pytest.CaptureFixture[str]) -> None:
    assert online_attribution.main(["--toy", "--check"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = {figure["name"]: figure["value"] for figure in report["figures"]}
    assert figures["examples in the store"] == online_attribution.TOY.num_rows
    assert figures["asked twice, and of the store opened anew: same bytes"] == 1
