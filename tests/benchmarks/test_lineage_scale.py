"""The large home is a real one, at toy size, and the program measures it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from attribution.lineage_queries import LineageQueries
from attribution.records import signers_of
from attribution.trail import Trail
from benchmarks import lineage_scale
from tests.attribution.lineage_oracle import PlainGraph

NUM_RECORDS = 1500


def test_home_and_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    assert lineage_scale.main(["--records", str(NUM_RECORDS), "--home", str(home)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    by_name = {figure["name"]: figure for figure in figures}
    assert by_name["records"]["value"] == NUM_RECORDS
    assert by_name["index made from the log"]["floor"] == 20_000
    assert all(figure["value"] > 0 for figure in figures if figure["unit"] in ("ms", "records/s"))

    trail = Trail.open(home)
    operator = trail.keys.get("operator")
    kinds = Counter(entry.leaf.kind for entry in trail.entries())
    assert kinds["completions"] > 0.7 * NUM_RECORDS and len(kinds) > 9
    for index in range(
        0, NUM_RECORDS, 50
    ):  # canonical, committed to and signed: what `Trail` checks of its own records
        entry = trail.entry(index)
        assert entry.envelope is not None
        assert signers_of(entry.envelope, {operator.key_id: operator.public_bytes}) == (operator.key_id,)
    plain, queries = PlainGraph(trail), LineageQueries.of(trail)
    for name in ("person-0", "base-1", "adapter-2"):
        (start,) = queries.resolve(name).below
        assert queries.impact(name).total == len(plain.descendants([trail.log.leaf_hash(start)]))
