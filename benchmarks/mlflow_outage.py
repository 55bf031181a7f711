"""MLflow away for ten minutes while receipts keep coming: what is lost, and how long until the view equals the log?

A real MLflow server is killed (SIGKILL), stays away for the outage and is started again over its own files. Receipts
are recorded all the while; the follower runs in a process of its own, as `trailmark up` runs it, and is killed once
too. Afterwards every receipt must be a trace linked to the adapter that answered, and `reconcile` must find nothing.

`--outage-s` may be shorter than ten minutes: `--rate` then rises so that as many receipts come in as in ten minutes at
`--real-rate` a second.

    python -m benchmarks.mlflow_outage [--quick] [--check] [--out FILE]
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from attribution.mlflow_cursor import CURSOR_FILE, Cursor
from attribution.mlflow_traces import trace_id_of
from attribution.mlflow_view import MlflowView
from attribution.receipts import append_completions, new_receipt_id
from attribution.trail import Trail
from tests.attribution.mlflow_process import MlflowProcess
from tests.attribution.story import Story, receipt_row, tell

REAL_OUTAGE_S = 600.0
FLOOR_LOST, FLOOR_CATCH_UP_S = 0, 60.0
BATCH_S = 1.0  # a replica logs its receipts about once a second
CATCH_UP_TIMEOUT_S = 1200.0
NUM_BEFORE = 3  # batches before the server goes away


@dataclass(frozen=True)
class Result:
    """What happened. `catch_up_s`: from the moment the server answered again until every receipt was a trace."""

    outage_s: float
    real_outage_s: float
    real_rate_per_s: float
    num_receipts: int
    num_during_outage: int
    num_traces: int
    num_lost: int
    num_differences: int
    server_start_s: float
    catch_up_s: float
    traces_per_s: float


def main() -> int:
    """Run it, print what was found, and return 1 when a floor was missed under --check."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="trailmark-outage-") as folder:
        result = measure(Path(folder), outage_s=arguments.outage_s, real_rate=arguments.real_rate)
    figures = {
        **asdict(result),
        "floors": {"num_lost": FLOOR_LOST, "num_differences": FLOOR_LOST, "catch_up_s": FLOOR_CATCH_UP_S},
        "mlflow": version("mlflow"),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    _print(result)
    line = json.dumps(figures)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    missed = result.num_lost > FLOOR_LOST or result.num_differences > 0 or result.catch_up_s > FLOOR_CATCH_UP_S
    return int(arguments.check and missed)


def measure(folder: Path, *, outage_s: float, real_rate: float) -> Result:
    """Fill, break, refill and count."""
    trail = Trail.open(folder / "home")
    story = tell(trail, num_receipts=2)
    server = MlflowProcess(folder / "server")
    server.start()
    follower = _follower(folder, server.uri)
    ids = list(story.receipt_ids)
    num_batches = max(1, round(outage_s / BATCH_S))
    per_batch = max(1, round(real_rate * REAL_OUTAGE_S / num_batches))
    try:
        for _ in range(NUM_BEFORE):
            ids += _record(story, 5)
        _wait_for_cursor(trail, follower)
        server.kill()
        during = _load(story, num_batches, per_batch)
        ids += during
        follower.kill()  # its cursor is on disk: the next one goes on from there
        follower.wait()
        follower = _follower(folder, server.uri)
        start = time.monotonic()
        server.start()
        answered = time.monotonic()
        ids += _record(story, 5)  # load goes on
        _wait_for_cursor(trail, follower)
        catch_up_s = time.monotonic() - answered
        view = MlflowView(trail, server.uri)
        found = view.reconcile(repair=False)
        stored = {info.trace_id for info in view._connect().server.trace_infos()}
        view.close()
    finally:
        follower.send_signal(signal.SIGTERM)
        follower.wait(timeout=60)
        server.stop()
    lost = [receipt for receipt in ids if trace_id_of(receipt) not in stored]
    return Result(
        outage_s=outage_s,
        real_outage_s=REAL_OUTAGE_S,
        real_rate_per_s=real_rate,
        num_receipts=len(ids),
        num_during_outage=len(during),
        num_traces=len(stored),
        num_lost=len(lost),
        num_differences=len(found),
        server_start_s=round(answered - start, 2),
        catch_up_s=round(catch_up_s, 2),
        traces_per_s=round((len(during) + 5) / catch_up_s, 1),
    )


def _load(story: Story, num_batches: int, per_batch: int) -> list[str]:
    """Record a batch every BATCH_S until the outage is over."""
    ids: list[str] = []
    start = time.monotonic()
    for number in range(num_batches):
        ids += _record(story, per_batch)
        time.sleep(max(0.0, start + (number + 1) * BATCH_S - time.monotonic()))
    return ids


def _record(story: Story, count: int) -> list[str]:
    """Record a batch of receipts with ids of their own."""
    rows = []
    for number in range(count):
        row = receipt_row(story.trail, number, story.base, story.adapter, time.time_ns() // 1000)
        row.receipt["id"] = new_receipt_id()
        rows.append(row)
    append_completions(story.trail, rows, replica="replica-0")
    return [row.receipt["id"] for row in rows]


def _follower(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cluster", "mlflow", "follow", "--uri", uri, "--interval-s", "0.5"]
    environment = {**os.environ, "TRAILMARK_HOME": str(folder / "home")}
    with (folder / "follower.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _wait_for_cursor(trail: Trail, follower: subprocess.Popen[bytes]) -> None:
    """Wait until the follower's cursor, which moves only after MLflow has an entry, reaches the log's end."""
    size, deadline = trail.log.size, time.monotonic() + CATCH_UP_TIMEOUT_S
    while True:
        cursor = Cursor(trail.home / CURSOR_FILE)
        reached = cursor.next_index
        cursor.close()
        if reached >= size:
            return
        if follower.poll() is not None:
            raise SystemExit(f"the follower ended at {reached} of {size}; see follower.log in {trail.home.parent}")
        if time.monotonic() > deadline:
            raise SystemExit(f"the view stands at {reached} of {size} after {CATCH_UP_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _print(result: Result) -> None:
    print(
        f"MLflow {version('mlflow')} killed for {result.outage_s:.0f} s, standing for {result.real_outage_s:.0f} s at"
    )
    print(f"{result.real_rate_per_s:g} receipts/s: {result.num_during_outage} receipts came in meanwhile.")
    rows = [
        ("receipts recorded", result.num_receipts, ""),
        ("traces in MLflow afterwards", result.num_traces, ""),
        ("receipts lost", result.num_lost, f"floor {FLOOR_LOST}"),
        ("differences found by reconcile", result.num_differences, f"floor {FLOOR_LOST}"),
        ("server start, s", result.server_start_s, ""),
        ("catch-up after it answered, s", result.catch_up_s, f"floor {FLOOR_CATCH_UP_S:.0f}"),
        ("traces written per second", result.traces_per_s, ""),
    ]
    for name, value, floor in rows:
        print(f"  {name:<34}{value:>10}  {floor}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an outage of 20 s instead of 60 s; as many receipts")
    parser.add_argument("--outage-s", type=float, help="how long the server really stays away")
    parser.add_argument("--real-rate", type=float, default=2.0, help="receipts per second of the ten minutes stood for")
    parser.add_argument("--check", action="store_true", help="exit 1 when a floor is missed")
    parser.add_argument("--out", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    arguments.outage_s = arguments.outage_s or (20.0 if arguments.quick else 60.0)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
