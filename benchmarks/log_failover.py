"""A node dies with the log writer on it, under load: Ray starts the writer on another, and nothing is lost.

    python -m benchmarks.log_failover [--quick] [--check] [--out FILE]

Nodes (raylets) of one Ray on this machine, the home on its disk. Callers append through the log writer without a pause
and try again what failed; the writer's node is killed, hard, again and again. At the end every acknowledged record is
in the log, there was a numbered take-over for each kill, and fsck finds the home sound. A record may be in the log
twice where a reply was lost: plain records carry no id of their own (receipts do, and are recorded once).

The last line is one JSON object; `--check` exits 1 when anything was lost, damaged or not taken over.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from attribution import actors, fsck
from attribution.bodies import ApprovalBody
from attribution.log.fence import Fence
from attribution.trail import Trail
from cluster.session import ray_environment, ray_variables
from cluster.state import ensure_token

DIGEST = "sha256:" + "ab" * 32
NUM_CALLERS = 4
RESOURCE = "log"
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Result:
    """What came of it; times in seconds."""

    kills: int
    take_overs: int
    acknowledged: int
    retries: int
    lost: int
    damaged: int
    longest_pause_s: float

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost and each kill was followed by a take-over."""
        return self.lost == self.damaged == 0 and self.take_overs >= self.kills + 1


class Callers:
    """Threads that append through the writer, whoever it is at the moment."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.num_retries = 0
        self.longest_pause_s = 0.0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(index,)) for index in range(NUM_CALLERS)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int) -> None:
        """Wait until so many more records were acknowledged."""
        target, deadline = len(self.acknowledged) + count, time.monotonic() + 4 * CALL_TIMEOUT_S
        while len(self.acknowledged) < target:
            if time.monotonic() > deadline:
                raise TimeoutError("the log writer did not come back")
            time.sleep(0.02)

    def stop(self) -> None:
        """Let the calls under way end."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _call(self, index: int) -> None:
        number, last = 0, time.monotonic()
        while not self._stopped.is_set():
            body = ApprovalBody(DIGEST, "approved", f"{index}.{number}")
            try:
                self.acknowledged.append(
                    ray.get(actors.log_writer().append.remote("approval", body), timeout=CALL_TIMEOUT_S)
                )
            except (ray.exceptions.RayError, ValueError):  # dead, starting, or not yet known by its name again
                self.num_retries += 1
                time.sleep(0.05)
                continue
            number, now = number + 1, time.monotonic()
            self.longest_pause_s, last = max(self.longest_pause_s, now - last), now


def run(home: Path, *, num_kills: int, between: int) -> Result:
    """Start the nodes, kill the writer's `num_kills` times, and judge the log."""
    from ray.cluster_utils import Cluster

    Trail.open(home)
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, namespace=actors.NAMESPACE, log_to_driver=False)
        nodes = [cluster.add_node(resources={RESOURCE: 1}, **node)]
        writer = actors.start_log_writer(home, resources={RESOURCE: 0.01})
        ray.get(writer.ready.remote(), timeout=actors.START_TIMEOUT_S)
        callers = Callers()
        for _ in range(num_kills):
            callers.wait_for(between)
            nodes.append(cluster.add_node(resources={RESOURCE: 1}, **node))
            attempt = _attempt(home)
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            # A writer outlives its raylet by some moments, in which it may acknowledge hundreds.
            _wait_for_take_over(home, after=attempt)
            callers.wait_for(between)
        callers.stop()
    finally:
        ray.shutdown()
        cluster.shutdown()
    log = Trail.open(home).log
    return Result(
        kills=num_kills,
        take_overs=_attempt(home),
        acknowledged=len(callers.acknowledged),
        retries=callers.num_retries,
        lost=sum(log.index_of(leaf_hash) is None for leaf_hash in callers.acknowledged),
        damaged=len(fsck.check(home).damage),
        longest_pause_s=round(callers.longest_pause_s, 2),
    )


def _attempt(home: Path) -> int:
    claim = Fence(home / "log").read()
    return 0 if claim is None else claim.attempt


def _wait_for_take_over(home: Path, *, after: int) -> None:
    deadline = time.monotonic() + 4 * CALL_TIMEOUT_S
    while _attempt(home) <= after:
        if time.monotonic() > deadline:
            raise TimeoutError("no writer took the log over")
        time.sleep(0.02)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print what came of it and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 kill instead of 5")
    parser.add_argument("--check", action="store_true", help="exit 1 when anything was lost, damaged or not taken over")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="log-failover-")))
        stack.enter_context(ray_environment(ray_variables(ensure_token(folder / "token"))))
        result = run(folder / "home", num_kills=1 if options.quick else 5, between=50)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    for name, value in asdict(result).items():
        print(f"{name:20} {value}")
    line = json.dumps({"hardware": hardware, "floor": {"lost": 0, "damaged": 0}, **asdict(result)})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 0 if result.is_good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
