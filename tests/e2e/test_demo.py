"""`trailmark demo` on SmolLM2, on its default ports: about 12 minutes, so chosen with `-m smollm2`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import env

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.smollm2
@pytest.mark.timeout(1800)
def test_demo_names_who_supplied_the_facts(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    environment = env.child_environment({"TRAILMARK_HOME": str(home)})
    command = [sys.executable, "-m", "cluster"]
    try:
        subprocess.run([*command, "demo", "--out", str(out)], cwd=REPOSITORY, env=environment, check=True)
        again = subprocess.run(
            [*command, "demo", "--out", str(out)],
            cwd=REPOSITORY,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    finally:
        subprocess.run([*command, "down"], cwd=REPOSITORY, env=environment, check=True)
    rows = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    answered = [row for row in rows if row["adapter_is_right"]]
    named = [row for row in answered if row["ranked_first"]["influence"] == row["supplied_by"]]
    assert len(rows) == 10
    assert sum(row["base_is_right"] for row in rows) <= 1, "the base must not know invented facts"
    assert len(answered) >= 8
    assert len(named) >= 8
    assert "published by an earlier run" in again.stdout, "a second run goes on from the first"
    receipts = list(out.glob("rcpt_*.json"))
    assert receipts
    for receipt in receipts:
        verify = [*command, "verify", str(receipt), "--keys", str(out / "trust.json")]
        subprocess.run(verify, cwd=REPOSITORY, env=environment, check=True)
