"""How many records a second the log acknowledges, and how long a receipt takes on its way into it.

    python -m benchmarks.log_rate [--quick] [--check] [--out FILE] [--no-ray]

A leaf counted here is a whole record: built, signed (Ed25519), its private half and its leaf fsynced, a signed
checkpoint over it replaced and its directory fsynced, and the entry handed back. Measured with 8 threads of one
process, with 8 processes that take turns at the log's lock, with one thread (no commit is shared), and with 8 callers
of the log writer actor, threads of one process and processes of their own. The floor in the same run: as many bytes as
a record has, appended and fsynced by one thread.

Receipts: replicas (threads with a spool of their own) answer at a steady rate; `note` and the fsync before the last
token are what a request waits for, and the time from there until a checkpoint covers its batch is the publish delay.
With Ray the batches go to the log writer actor, else to the same class in this process.

The last line is one JSON object; `--check` exits 1 when a figure misses its floor.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attribution.bodies import AdapterBody, ApprovalBody, BaseModelBody
from attribution.receipt_file import receipt_file
from attribution.receipts import ReceiptRow, new_receipt_id
from attribution.records import Artefact
from attribution.trail import Trail
from benchmarks.log_verify import BATCH, GOLDEN, MAX_RECEIPT_BYTES, MILLION, Figure, grown, small_json
from benchmarks.log_verify import measure as measure_verify
from serve_apps.spool import Segment, Spool, SpooledRow
from serve_apps.usage import Receipts

NUM_WRITERS = 8
DIGEST = "sha256:" + "ab" * 32
MIN_LEAVES_S = 1000.0
MAX_REQUEST_MS = 1.0
MAX_PUBLISH_S = 5.0


@dataclass(frozen=True)
class Bound:
    """A figure with the bound it is held to: at least (rates) or at most (times); None is for comparison only."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether the bound holds."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


def append_records(home: Path, name: str, seconds: float) -> int:
    """Record for so long; return how many were acknowledged."""
    return _append(Trail.open(home), name, seconds)


def _append(trail: Trail, name: str, seconds: float) -> int:
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        trail.record("approval", ApprovalBody(DIGEST, "approved", f"{name} {count}"))
        count += 1
    return count


def rate_of_threads(home: Path, *, num_threads: int, seconds: float) -> float:
    """Return acknowledged records a second of threads that share one trail."""
    trail, counts = Trail.open(home), [0] * num_threads
    trail.record("approval", ApprovalBody(DIGEST, "approved", "warm"))

    def work(index: int) -> None:
        counts[index] = _append(trail, str(index), seconds)

    wall_s = run_together(work, num_threads)
    assert Trail.open(home).log.size == sum(counts) + 1, "every acknowledged record is in the log, once"
    return sum(counts) / wall_s


def run_together(work: Callable[[int], None], num_threads: int) -> float:
    """Run `work(0)`, `work(1)`, ... in threads of their own; return the seconds until the last one ended."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def rate_of_processes(home: Path, *, num_processes: int, seconds: float) -> float:
    """Return acknowledged records a second of processes that append to one home; their start is not counted."""
    Trail.open(home)
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        pool.starmap(append_records, [(home, "warm", 0.01)] * num_processes, chunksize=1)
        before, began = Trail.open(home).log.size, time.perf_counter()
        counts = pool.starmap(append_records, [(home, str(n), seconds) for n in range(num_processes)], chunksize=1)
        wall_s = time.perf_counter() - began
    assert Trail.open(home).log.size == before + sum(counts), "every acknowledged record is in the log, once"
    return sum(counts) / wall_s


def rate_of_bare_appends(folder: Path, *, num_bytes: int, seconds: float) -> float:
    """Return how often a second one thread can append and fsync as many bytes as a record has, and do nothing else."""
    descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        os.write(descriptor, bytes(num_bytes))
        os.fsync(descriptor)
        count += 1
    os.close(descriptor)
    return count / seconds


@dataclass
class Sent:
    """One receipt's way: seconds that its request waited, and when it was durable in the spool."""

    receipt_id: str
    waited_s: float
    noted_at: float


class TimedLog:
    """Hands batches to the log writer, and notes when each receipt was under a checkpoint."""

    def __init__(self, trail: Trail, append: Callable[[Sequence[ReceiptRow], str], object]) -> None:
        self._trail, self._append = trail, append
        self.published_at: dict[str, float] = {}

    def append(self, rows: Sequence[SpooledRow]) -> None:
        """Append one batch, as serve_apps/replica.py does."""
        stored = [ReceiptRow(row.receipt, row.salt, self._trail.put_json(row.content)) for row in rows]
        self._append(stored, str(rows[0].receipt["replica"]))
        now = time.perf_counter()
        self.published_at.update({row.receipt_id: now for row in rows})

    def adapter_loaded(self, adapter: str) -> None:
        """No adapter is loaded here."""


def receipt_traffic(
    home: Path,
    append: Callable[[Sequence[ReceiptRow], str], object],
    *,
    adapter: dict[str, str],
    num_replicas: int,
    per_second: float,
    seconds: float,
) -> tuple[list[Sent], dict[str, float]]:
    """Answer at a steady rate; return each receipt's wait, and when each was published."""
    log = TimedLog(Trail.open(home), append)
    sent: list[Sent] = []
    replicas = [
        Receipts(log, Spool(home / "run" / f"spool{index}"), owner=f"replica-{index}", flush_s=1.0)
        for index in range(num_replicas)
    ]

    def answer(index: int) -> None:
        period, start = num_replicas / per_second, time.perf_counter()
        for number in range(int(seconds / period)):
            time.sleep(max(0.0, start + number * period - time.perf_counter()))
            row = spooled_row(f"replica-{index}", adapter)
            began = time.perf_counter()
            segment: Segment = replicas[index].note(row)
            segment.sync()
            now = time.perf_counter()
            sent.append(Sent(row.receipt_id, now - began, now))

    run_together(answer, num_replicas)
    for replica in replicas:
        assert replica.close(timeout_s=60.0), "the log took every receipt"
    return sent, log.published_at


def spooled_row(replica: str, adapter: dict[str, str]) -> SpooledRow:
    """Return one answer's receipt, about as large as a real one of 300 words."""
    now_us = time.time_ns() // 1000
    receipt = {
        "v": 1,
        "id": new_receipt_id(now_us),
        "time_us": now_us,
        "model": "support@1",
        **adapter,
        "prompt_version": None,
        "retrieved": [],
        "request_digest": DIGEST,
        "output_digest": DIGEST,
        "prompt_tokens": 64,
        "completion_tokens": 64,
        "finish_reason": "stop",
        "replica": replica,
        "tenant": "bench",
    }
    content = {"prompt": "word " * 150, "output_text": "word " * 150, "output_token_ids": list(range(64))}
    return SpooledRow(receipt, os.urandom(32), content)


def receipt_figures(home: Path, append: Callable[[Sequence[ReceiptRow], str], object], **load: Any) -> list[Bound]:
    """Return what receipts cost, how soon they are published and how large they are, under a load."""
    trail = Trail.open(home)
    adapter = _adapter(trail)
    sent, published_at = receipt_traffic(home, append, adapter=adapter, **load)
    waits = sorted(item.waited_s * 1000 for item in sent)
    delays = sorted(published_at[item.receipt_id] - item.noted_at for item in sent)
    file = receipt_file(Trail.open(home), sent[-1].receipt_id)
    whole, _ = grown(file, size=MILLION, batch=BATCH, folder=home)
    return [
        Bound("receipts a second, answered", len(sent) / load["seconds"], "/s"),
        Bound("a request waits, p50", statistics.median(waits), "ms", at_most=MAX_REQUEST_MS),
        Bound("a request waits, p99", waits[int(len(waits) * 0.99)], "ms"),
        Bound("published after, p50", statistics.median(delays), "s"),
        Bound("published after, p99", delays[int(len(delays) * 0.99)], "s", at_most=MAX_PUBLISH_S),
        Bound("receipt file, as written", len(small_json(file)), "bytes", at_most=MAX_RECEIPT_BYTES),
        Bound(f"receipt file, {MILLION} entries, 2 cosignatures", len(whole), "bytes", at_most=MAX_RECEIPT_BYTES),
    ]


def _adapter(trail: Trail) -> dict[str, str]:
    """Record a base model and an adapter; return what a receipt says of them."""
    base, adapter = trail.store.put_blob(b"base"), trail.store.put_blob(b"adapter")
    body = BaseModelBody("base", "benchmark", "none", "Apache-2.0", "float32", "", 1)
    made = trail.record("base_model", body, outputs=[Artefact("base_model", "base", base)])
    trained = AdapterBody("support", base, DIGEST, 8, 16, ("q_proj",), 1, 1, 0, 0, DIGEST)
    outputs = [Artefact("adapter", "support", adapter)]
    entry = trail.record("adapter", trained, inputs=made.record.outputs if made.record else (), outputs=outputs)
    return {"base": base, "adapter": adapter, "adapter_name": "support@1", "adapter_record": entry.leaf_hash}


def in_process_writer(home: Path) -> Callable[[Sequence[ReceiptRow], str], object]:
    """Return the log writer's own append, without an actor round it."""
    from attribution.actors import LogWriter

    return LogWriter(str(home)).append_completions


def rate_of_callers(append: Callable[[str, ApprovalBody], object], *, seconds: float, num: int = NUM_WRITERS) -> float:
    """Return records a second that threads get acknowledged, all through one function."""
    counts = [0] * num

    def call(index: int) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            append("approval", ApprovalBody(DIGEST, "approved", f"{index} {counts[index]}"))
            counts[index] += 1

    wall_s = run_together(call, num)
    return sum(counts) / wall_s


def rate_of_caller_processes(num_processes: int, *, seconds: float, empty: bool = False) -> float:
    """Return records a second that `NUM_WRITERS` threads, spread over Ray workers, get acknowledged by the log writer.

    With `empty` each call does nothing there: what Ray itself takes.
    """
    import ray

    from attribution import actors

    @ray.remote(num_cpus=0)
    class Caller:
        def call(self, seconds: float) -> float:
            client, writer = actors.LogClient(), actors.log_writer()

            def append(kind: str, body: ApprovalBody) -> object:
                return ray.get(writer.ready.remote()) if empty else client.append(kind, body)

            return rate_of_callers(append, seconds=seconds, num=NUM_WRITERS // num_processes)

    callers = [Caller.remote() for _ in range(num_processes)]
    ray.get([caller.call.remote(0.1) for caller in callers])  # their start is not counted
    rate = float(sum(ray.get([caller.call.remote(seconds) for caller in callers])))
    for caller in callers:
        ray.kill(caller)
    return rate


def actor_figures(folder: Path, *, seconds: float, load: dict[str, Any]) -> list[Bound]:
    """Return the figures of the log writer as a Ray actor: 8 callers, then receipts."""
    import ray

    from attribution import actors
    from cluster.session import private_ray

    home = folder / "actor"
    Trail.open(home)
    with private_ray(num_cpus=4, object_store_mib=100):
        writer = actors.start_log_writer(home)
        ray.get(writer.ready.remote(), timeout=actors.START_TIMEOUT_S)
        client = actors.LogClient()
        together = rate_of_callers(client.append, seconds=seconds)
        apart = {num: rate_of_caller_processes(num, seconds=seconds) for num in (2, 4, NUM_WRITERS)}
        empty = rate_of_caller_processes(NUM_WRITERS, seconds=seconds / 2, empty=True)

        def append(rows: Sequence[ReceiptRow], replica: str) -> object:
            return ray.get(writer.append_completions.remote(rows, replica))

        found = [
            Bound(f"{NUM_WRITERS} threads through the actor", together, "leaves/s", at_least=MIN_LEAVES_S),
            Bound(f"{NUM_WRITERS} threads of 2 processes through it", apart[2], "leaves/s", at_least=MIN_LEAVES_S),
            Bound(f"{NUM_WRITERS} threads of 4 processes through it", apart[4], "leaves/s"),
            Bound(f"{NUM_WRITERS} processes through it", apart[NUM_WRITERS], "leaves/s"),
            Bound(f"floor: {NUM_WRITERS} processes, empty calls of Ray", empty, "/s"),
            Bound(f"{NUM_WRITERS} processes over that floor", apart[NUM_WRITERS] / empty, "x"),
        ]
        found += receipt_figures(home, append, **load)
        actors.stop()
    return found


def measure(folder: Path, *, seconds: float, with_ray: bool) -> list[Bound]:
    """Return all figures, measured below a folder."""
    threads = rate_of_threads(folder / "threads", num_threads=NUM_WRITERS, seconds=seconds)
    alone = rate_of_threads(folder / "alone", num_threads=1, seconds=seconds)
    processes = rate_of_processes(folder / "processes", num_processes=NUM_WRITERS, seconds=seconds)
    home = folder / "threads"
    num_bytes = sum(path.stat().st_size for path in (home / "records").iterdir()) // Trail.open(home).log.size
    bare = rate_of_bare_appends(folder, num_bytes=num_bytes, seconds=seconds / 4)
    load = {"num_replicas": 4, "per_second": 200.0, "seconds": 4 * seconds}
    found = [
        Bound(f"{NUM_WRITERS} threads of one process", threads, "leaves/s", at_least=MIN_LEAVES_S),
        Bound("1 thread: no shared commit", alone, "leaves/s"),
        Bound(f"{NUM_WRITERS} processes in turn", processes, "leaves/s"),
        Bound(f"floor: {num_bytes} bytes written and fsynced", bare, "/s"),
        Bound(f"{NUM_WRITERS} threads over the floor", threads / bare, "x"),
    ]
    if with_ray:
        found += actor_figures(folder, seconds=seconds, load=load)
    else:
        home = folder / "receipts"
        found += receipt_figures(home, in_process_writer(home), **load)
    verify = measure_verify(GOLDEN / "receipt_bundle.json", GOLDEN / "trust.json", num_runs=5)
    return found + [_of(figure) for figure in verify]


def _of(figure: Figure) -> Bound:
    return Bound(figure.name, figure.value, figure.unit, at_most=figure.at_most)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 seconds of each instead of 10")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--no-ray", action="store_true", help="receipts go to the log writer's class, not to its actor")
    options = parser.parse_args(arguments)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"records acknowledged by the log against bare fsyncs, on {hardware}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="log-rate-")))
        figures = measure(folder, seconds=2.0 if options.quick else 10.0, with_ray=not options.no_ray)
    for figure in figures:
        bound = next((text for text in _bounds(figure)), "")
        print(f"{figure.name:48} {figure.value:11.3f} {figure.unit:9}{bound}")
    line = json.dumps({"hardware": hardware, "figures": [asdict(figure) for figure in figures]})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


def _bounds(figure: Bound) -> list[str]:
    missed = "" if figure.is_good else "  MISSED"
    if figure.at_least is not None:
        return [f" (at least {figure.at_least:g}){missed}"]
    return [] if figure.at_most is None else [f" (at most {figure.at_most:g}){missed}"]


if __name__ == "__main__":
    sys.exit(main())
