"""The local witnesses and the publisher of `trailmark up`: processes of their own, which outlive the command.

Witnesses that the operator of a log runs are a rehearsal: they show a fork or a rollback that happened by accident, and
every file is in the form that independent witnesses need. HOME/policy takes the address of those as well.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from attribution.log.note import NoteKey
from attribution.log.policy import LOCAL_MARK
from attribution.log.publisher import POLICY_FILE, WITNESSES, WitnessState, load_outcome, policy_of
from attribution.log.sequencer import file_lock
from attribution.log.trust import trust_bytes
from attribution.log.witness import Witness
from attribution.store import write_atomically
from attribution.trail import TRUST_FILE
from cluster.processes import require_free_port, wait_until
from cluster.services import http_answers, spawn
from cluster.state import ClusterState, Part
from configs.errors import UserError
from configs.schema import WitnessSettings

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Remark:
    """What `status` says beside a part."""

    text: str
    is_alarm: bool


def spawn_missing_witnesses(
    home: Path, settings: WitnessSettings, state: ClusterState, environment: dict[str, str]
) -> list[Part]:
    """Start the local witnesses and the publisher that do not run, without waiting for them to answer.

    Raises:
        UserError: a port is taken.
    """
    ports = _ports(settings)
    missing = {name: port for name, port in ports.items() if not state.is_alive(name)}
    for port in missing.values():
        require_free_port("witness.ports", port)
    if missing:
        prepare_witnesses(home, settings)
    parts = [_spawn_witness(home, name, port, environment) for name, port in missing.items()]
    if not state.is_alive("publisher"):
        command = [*_trailmark(), "log", "tiles", "--follow", "--interval-s", str(settings.publish_interval_s)]
        parts.append(spawn("publisher", str(home / "tiles"), command, home=home, environment=environment))
    return parts


def prepare_witnesses(home: Path, settings: WitnessSettings) -> None:
    """Make the witnesses' folders, and write HOME/policy and the policy in trust.json, unless somebody wrote their own.

    Raises:
        UserError: the quorum asks for more witnesses than there are.
    """
    ports = _ports(settings)
    witnesses = {name: _ensure_witness(home, name, settings) for name in ports}
    if settings.quorum > len(ports):
        raise UserError(f"witness.quorum = {settings.quorum}: there are {len(ports)} witness.ports")
    key, quorum = _log_key(home), str(settings.quorum or "none")
    listed = [(name, _url(ports[name]), witness.keys) for name, witness in witnesses.items()]
    _write_unless_own(home / POLICY_FILE, f"{LOCAL_MARK}\n{policy_of(listed, key, quorum)}")
    with file_lock(home / "log" / "lock"):
        trust = json.loads((home / TRUST_FILE).read_text(encoding="utf-8"))
        if trust.get("policy", LOCAL_MARK).startswith(LOCAL_MARK):
            text = policy_of([(name, "", keys) for name, _, keys in listed], key, quorum)
            trust["policy"] = f"{LOCAL_MARK}\n{text}"
            write_atomically(home / TRUST_FILE, trust_bytes(trust))


def wait_for_witnesses(home: Path, parts: Iterable[Part]) -> None:
    """Wait until each witness answers; `UserError` with its log when it ends or takes too long."""
    for part in parts:
        url = f"{part.address}/health"
        if not part.address.startswith("http"):
            continue
        wait_until(lambda url=url, part=part: http_answers(url) or not part.alive, timeout_s=START_TIMEOUT_S)  # type: ignore[misc]
        if not part.alive or not http_answers(url):
            raise UserError(f"{part.name} did not start: see {home / 'run' / f'{part.name}.log'}")


def describe_witnesses(home: Path) -> dict[str, Remark]:
    """Return by part what the last round of publishing said: leaves cosigned, or why not, or an alarm."""
    outcome = load_outcome(home)
    if outcome is None:
        return {}
    remarks = {state.name: _remark(state) for state in outcome.witnesses}
    remarks["publisher"] = Remark(outcome.error or "tiles published", bool(outcome.error))
    return remarks


def _remark(state: WitnessState) -> Remark:
    if state.alarm:
        return Remark(state.alarm, True)
    return Remark(state.error or f"{state.size} leaves cosigned", False)


def _ensure_witness(home: Path, name: str, settings: WitnessSettings) -> Witness:
    """The witness's folder, made on first use, knowing this home's log."""
    key = _log_key(home)
    directory = home / WITNESSES / name
    if directory.is_dir():
        witness = Witness(directory)
    else:
        (home / WITNESSES).mkdir(mode=0o700, exist_ok=True)
        witness = Witness.create(directory, f"{key.name}/{name}", with_ml_dsa=settings.ml_dsa)
    witness.add_log(key)
    return witness


def _spawn_witness(home: Path, name: str, port: int, environment: dict[str, str]) -> Part:
    command = [*_trailmark(), "witness", "run", str(home / WITNESSES / name), "--port", str(port)]
    return spawn(name, _url(port), command, home=home, environment=environment)


def _write_unless_own(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8").startswith(LOCAL_MARK):
        write_atomically(path, text.encode())


def _log_key(home: Path) -> NoteKey:
    return NoteKey.parse(json.loads((home / TRUST_FILE).read_text(encoding="utf-8"))["log"])


def _trailmark() -> list[str]:
    return [sys.executable, "-P", "-m", "cluster"]


def _ports(settings: WitnessSettings) -> dict[str, int]:
    """Port by name of each local witness."""
    return {f"witness-{number}": port for number, port in enumerate(settings.ports, 1)}


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
