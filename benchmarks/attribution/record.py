"""Peers' scores: run in their own environment, kept as files, and the small record that the repository carries."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attribution.banks import Plan
from benchmarks.attribution.export import export
from benchmarks.attribution.lab import Lab
from benchmarks.attribution.methods import Found

HERE = Path(__file__).resolve().parent
RECORD_FILE = HERE / "recorded" / "peers.npz"
PEERS_PYTHON = HERE.parent.parent / ".peers" / "bin" / "python"
PEERS = ("dattri", "bergson", "magic", "kronfluence", "trak")
"""Runners in peers/, by name; "magic" is bergson's and takes minutes a seed."""
HOW_TO_GET_PEERS = "run `make peers` (2 GB in .peers/, some minutes), or leave it to the recorded scores (--quick)"


class RecordError(SystemExit):
    """The record is of another experiment, or the peers' environment is not there."""


@dataclass(frozen=True)
class Record:
    """What peers said about one lab: scores by method, and the digests of what they saw."""

    digest: str
    subsets: dict[str, str]
    found: dict[str, Found]


def run_peers(lab: Lab, *, cache: Path, peers: Sequence[str] = PEERS) -> dict[str, Found]:
    """Return peers' scores on a lab; runs those that the cache does not have. Raises RecordError."""
    folder = (cache / lab.digest[:16]).resolve()  # runners are started in a folder of their own
    results: dict[str, Found] = {}
    for peer in peers:
        out = folder / "peers" / f"run_{peer}.npz"
        if not out.exists():
            _run(f"run_{peer}.py", export(lab, folder / "lab"), out)
        results |= _read(out).found
    return results


def write_record(lab: Lab, plans: Sequence[Plan], found: dict[str, Found]) -> None:
    """Keep peers' scores with the repository: float16, each method's largest size 1 (ranks need no scale)."""
    arrays = {name: _half(one.scores) for name, one in found.items()}
    _write(RECORD_FILE, lab.digest, found, arrays, subsets={plan.name: plan.digest for plan in plans})


def read_record(lab: Lab, plans: Sequence[Plan]) -> dict[str, Found]:
    """Return the recorded scores. Raises RecordError unless experiment and subsets are those of the record."""
    record = _read(RECORD_FILE)
    if record.digest != lab.digest:
        raise RecordError(
            f"{RECORD_FILE.name}: recorded on experiment {record.digest[:16]}, this is {lab.digest[:16]}; record again "
            "with --record where .peers/ is"
        )
    for plan in plans:
        if record.subsets.get(plan.name) != plan.digest:
            raise RecordError(f"{RECORD_FILE.name}: the subsets of {plan.name} are not those of the record")
    return record.found


def _run(runner: str, lab_folder: Path, out: Path) -> None:
    if not PEERS_PYTHON.exists():
        raise RecordError(f"{PEERS_PYTHON}: not there; {HOW_TO_GET_PEERS}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.npz")
    command = [str(PEERS_PYTHON), "-W", "ignore", str(HERE / "peers" / runner), str(lab_folder), str(partial)]
    print(f"peers: {runner}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE / "peers")
    if done.returncode:
        raise RecordError(f"{runner}: {done.stderr[-2000:]}")
    partial.rename(out)


def _read(file: Path) -> Record:
    with np.load(file) as stored:
        facts = json.loads(str(stored["facts"]))
        found = {name: Found(scores=stored[name].astype(np.float64), **cost) for name, cost in facts["costs"].items()}
    return Record(facts["digest"], facts.get("subsets", {}), found)


def _write(file: Path, digest: str, found: dict[str, Found], arrays: dict[str, Any], **more: Any) -> None:
    fields = ("kind", "build_cpu_s", "query_cpu_s", "bytes_per_example", "settings", "version")
    costs = {name: {key: getattr(one, key) for key in fields} for name, one in found.items()}
    np.savez_compressed(file, facts=np.array(json.dumps({"digest": digest, "costs": costs, **more})), **arrays)


def _half(scores: np.ndarray) -> np.ndarray:
    return (scores / np.abs(scores).max(axis=1, keepdims=True).clip(1e-30)).astype(np.float16)
