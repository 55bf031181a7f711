"""The witnesses and the publisher of `trailmark up`, as the processes they are."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attribution.bodies import ApprovalBody
from attribution.log.policy import LOCAL_MARK, Policy
from attribution.log.verify import Trust
from attribution.trail import Trail
from cluster import cli
from cluster.local import status
from cluster.processes import cluster_processes, free_port, stop_processes, wait_until
from cluster.state import ClusterState, cluster_id_of, save_state
from cluster.witnesses import describe_witnesses, spawn_missing_witnesses, wait_for_witnesses
from configs import env
from configs.errors import UserError
from configs.schema import WitnessSettings

DIGEST = "sha256:" + "ab" * 32


def trailmark(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with one entry, whose two witnesses and publisher run."""
    home = tmp_path_factory.mktemp("home")
    Trail.open(home).record("approval", ApprovalBody(DIGEST, "approved", ""))
    state, settings = ClusterState(cluster_id_of(home)), WitnessSettings(ports=(free_port(), free_port()), quorum=2)
    environment = env.child_environment({"TRAILMARK_CLUSTER": state.cluster_id, "TRAILMARK_HOME": str(home)})
    parts = spawn_missing_witnesses(home, settings, state, environment)
    for part in parts:
        state = state.with_part(part)
    save_state(home, state)
    before = os.environ.get("TRAILMARK_HOME")
    env.set_variables({"TRAILMARK_HOME": str(home)})
    wait_for_witnesses(home, parts)
    yield home
    os.environ.pop("TRAILMARK_HOME") if before is None else env.set_variables({"TRAILMARK_HOME": before})
    assert stop_processes(cluster_processes(state.cluster_id)) == []


def cosigned(home: Path, size: int) -> bool:
    remarks = describe_witnesses(home)
    return len(remarks) == 3 and all(f"{size} leaves" in remarks[f"witness-{n}"].text for n in (1, 2))


def test_what_is_appended_gets_cosigned_and_verifies(home: Path, tmp_path: Path) -> None:
    leaf_hash = Trail.open(home).record("approval", ApprovalBody(DIGEST, "approved", "")).leaf_hash
    assert wait_until(lambda: cosigned(home, 2), timeout_s=60)
    out = str(tmp_path / "proof.json")
    assert trailmark("log", "proof", leaf_hash, "--out", out).exit_code == 0
    verified = trailmark("verify", out)
    assert verified.exit_code == 0, verified.output
    assert "2 of 2 cosigned; the policy asks for 2 of witness-1, witness-2" in verified.output
    assert "cosigned by          witness-2 at 20" in verified.output
    facts = json.loads(trailmark("verify", out, "--json").output)["facts"]
    assert set(facts["witnesses"]) == {"witness-1", "witness-2"}


def test_status_says_what_the_witnesses_say(home: Path) -> None:
    assert wait_until(lambda: cosigned(home, Trail.open(home).log.size), timeout_s=60)
    rows = {row.name: row for row in status(home)}
    assert set(rows) == {"witness-1", "witness-2", "publisher"}
    assert all(row.alive and not row.is_alarm for row in rows.values())
    assert rows["witness-1"].remark == f"{Trail.open(home).log.size} leaves cosigned"
    shown = trailmark("witness", "status")
    assert (shown.exit_code, shown.output.count("leaves cosigned")) == (0, 2)
    assert "tiles published" in trailmark("status").output


def test_tiles_and_policy_for_strangers(home: Path, tmp_path: Path) -> None:
    assert wait_until(lambda: cosigned(home, Trail.open(home).log.size), timeout_s=60)
    fetched = trailmark("log", "fetch", str(home / "tiles"), "0", "--entry", str(tmp_path / "leaf"))
    assert fetched.exit_code == 0, fetched.output
    assert fetched.output.startswith("c2sp.org/tlog-proof@v1\nindex 0\n")
    assert (tmp_path / "leaf").read_bytes() == Trail.open(home).log.leaf(0)
    (tmp_path / "checkpoint").write_text((home / "tiles" / "checkpoint").read_text())
    consistent = trailmark("log", "consistency", str(home / "tiles"), str(tmp_path / "checkpoint"))
    assert consistent.exit_code == 0
    assert "consistent" in consistent.output
    policy = trailmark("witness", "policy", "--quorum", "any")
    assert Policy.parse(policy.output.encode()).describe() == "1 of witness-1, witness-2"
    again = trailmark("log", "tiles")
    assert "another publisher is at work" in str(again.exception)


def test_up_again_keeps_policy_and_trust(home: Path) -> None:
    trust = Trust.load(home / "trust.json")
    assert trust.policy is not None
    assert trust.policy.describe() == "2 of witness-1, witness-2"
    assert all(witness.url is None for witness in trust.policy.witnesses), "readers need no addresses"
    assert (home / "policy").read_text().startswith(LOCAL_MARK)


def test_a_new_log_key_is_published_and_cosigned_at_once(home: Path, tmp_path: Path) -> None:
    """Neither witnesses nor policies wait for the next `up`, and the next proof has its cosignatures."""
    old = Trail.open(home).log.key
    rotated = trailmark("key", "rotate", "log")
    assert rotated.exit_code == 0, rotated.output
    assert "Published under the new key" in rotated.output and "Witness" not in rotated.output
    trail, out = Trail.open(home), str(tmp_path / "proof.json")
    assert trailmark("log", "proof", "0", "--out", out).exit_code == 0
    verified = trailmark("verify", out)
    assert verified.exit_code == 0 and "2 of 2 cosigned" in verified.output, verified.output
    keys = [str(trail.log.key), str(old)]
    assert [str(log.key) for log in Policy.load(home / "policy").logs] == keys
    trust = Trust.load(home / "trust.json")
    assert trust.policy is not None and [str(log.key) for log in trust.policy.logs] == keys
    assert trailmark("witness", "policy", "--quorum", "any").output.startswith(f"log {keys[0]}\n")


def test_a_policy_of_the_operators_own_is_left_alone(tmp_path: Path) -> None:
    Trail.open(tmp_path)
    (tmp_path / "policy").write_text("quorum none\n")
    state, settings = ClusterState(cluster_id_of(tmp_path)), WitnessSettings(ports=(free_port(),))
    environment = env.child_environment({"TRAILMARK_CLUSTER": state.cluster_id, "TRAILMARK_HOME": str(tmp_path)})
    parts = spawn_missing_witnesses(tmp_path, settings, state, environment)
    assert [part.name for part in parts] == ["witness-1", "publisher"]
    assert (tmp_path / "policy").read_text() == "quorum none\n"
    assert stop_processes(cluster_processes(state.cluster_id)) == []
    with pytest.raises(UserError, match=r"witness.quorum = 3: there are 2 witness.ports"):
        ports = (free_port(), free_port())
        spawn_missing_witnesses(tmp_path, WitnessSettings(ports=ports, quorum=3), state, environment)
