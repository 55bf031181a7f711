"""No receipt is lost: not when the log is away, not when a process dies, and none is recorded twice."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_apps import usage
from serve_apps.calls import AdapterChoice, Answer, Call
from serve_apps.engine.config import SamplingParams
from serve_apps.openai import output_digest
from serve_apps.spool import Spool, SpooledRow
from serve_apps.usage import Receipts, RowsRefused, Server, receipt_row

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


class ListLog:
    """A log in memory that fails as often as it is told to."""

    def __init__(self, *, failures: int = 0, fail_after_append: bool = False) -> None:
        self.receipts: list[str] = []
        self.batches: list[int] = []
        self.loads: list[str] = []
        self.poison: set[str] = set()
        self._failures, self._fail_after_append = failures, fail_after_append
        self._lock = threading.Lock()

    def append(self, rows: Sequence[SpooledRow]) -> None:
        with self._lock:
            if self.poison & {row.receipt_id for row in rows}:
                raise RowsRefused("poison")
            failing = self._failures > 0
            self._failures -= failing
            if not failing or self._fail_after_append:
                new = [row.receipt_id for row in rows if row.receipt_id not in self.receipts]
                self.receipts += new
                self.batches.append(len(new))
            if failing:
                raise ConnectionError("the log is away")

    def adapter_loaded(self, adapter: str) -> None:
        self.loads.append(adapter)


def row(number: int) -> SpooledRow:
    return SpooledRow({"id": f"rcpt_{number:026d}", "tenant": "t"}, bytes(32), {"prompt": f"secret {number}"})


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def files(spool: Spool) -> list[Path]:
    return list(spool._folder.glob("*.jsonl"))


def start(log: Any, spool: Spool, flush_s: float = 0.01) -> Receipts:
    return Receipts(log, spool, owner="r", flush_s=flush_s)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def test_receipts_reach_the_log_in_order_and_leave_the_spool(spool: Spool) -> None:
    log = ListLog()
    receipts = start(log, spool)
    for number in range(20):
        receipts.note(row(number))
    assert receipts.flush(20)
    assert log.receipts == [row(number).receipt_id for number in range(20)]
    assert receipts.close()
    assert files(spool) == []


def test_a_receipt_is_on_disk_before_note_returns_and_only_its_owner_may_read_it(spool: Spool) -> None:
    receipts = start(ListLog(), spool, flush_s=60)
    receipts.note(row(1))
    found = spool.find(row(1).receipt_id)
    assert found == row(1)
    assert spool.find(row(2).receipt_id) is None
    assert [path.stat().st_mode & 0o777 for path in files(spool)] == [0o600]
    assert receipts.close()


def test_a_full_batch_does_not_wait_for_the_clock(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_BATCH", 5)
    log = ListLog()
    receipts = start(log, spool, flush_s=3600)
    for number in range(5):
        receipts.note(row(number))
    assert receipts.flush(20)
    assert log.batches == [5]
    receipts.close()


@pytest.mark.parametrize("fail_after_append", [False, True])
def test_a_failing_log_is_tried_again_and_a_lost_reply_does_not_double(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, fail_after_append: bool
) -> None:
    monkeypatch.setattr(usage, "FIRST_RETRY_S", 0.005)
    log = ListLog(failures=3, fail_after_append=fail_after_append)
    receipts = start(log, spool)
    receipts.note(row(1))
    receipts.note(row(2))
    assert receipts.flush(20)
    assert log.receipts == [row(1).receipt_id, row(2).receipt_id]
    receipts.close()


def test_a_segment_is_nobodys_orphan_before_it_is_locked(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for orphans between its creation and its lock took the lock, and the answer's receipt failed."""
    real, seen = fcntl.flock, []

    def look_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        seen.extend(spool.orphans())
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", look_first)
    segment = spool.open_segment("r")
    assert seen == [] and segment.path.exists() and list(spool.orphans()) == []
    segment.discard()
    assert files(spool) == []


def test_what_the_log_did_not_take_waits_on_disk_for_the_next_start(spool: Spool) -> None:
    away = ListLog(failures=1_000_000)
    receipts = start(away, spool)
    for number in range(3):
        receipts.note(row(number))
    assert not receipts.close(timeout_s=0.3)
    assert len(files(spool)) >= 1
    log = ListLog()
    again = start(log, spool)
    wait_until(lambda: len(log.receipts) == 3)
    assert again.close()
    assert sorted(log.receipts) == [row(number).receipt_id for number in range(3)]
    assert files(spool) == []


def test_requests_are_refused_when_too_many_receipts_wait(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_WAITING", 3)
    receipts = start(ListLog(failures=1_000_000), spool)
    assert not receipts.is_full
    for number in range(3):
        receipts.note(row(number))
    assert receipts.is_full
    receipts.close(timeout_s=0.0)


def test_an_adapter_load_is_recorded_once_per_replica(spool: Spool) -> None:
    log = ListLog()
    receipts = start(log, spool)
    for adapter in (DIGEST, OTHER, DIGEST):
        receipts.note_adapter(adapter)
    assert receipts.flush(20)
    assert log.loads == [DIGEST, OTHER]
    receipts.close()


def test_a_living_process_keeps_its_segment(spool: Spool) -> None:
    segment = spool.open_segment("r")
    segment.append(row(1))
    assert list(Spool(spool._folder).orphans()) == []
    segment.close()
    orphans = list(spool.orphans())
    assert [orphan.rows() for orphan in orphans] == [[row(1)]]
    for orphan in orphans:
        orphan.discard()
    assert files(spool) == []


def test_a_row_is_durable_before_its_answer_goes_out_and_requests_share_the_fsync(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    receipts = start(ListLog(failures=1_000_000), spool, flush_s=3600)
    segments = [receipts.note(row(number)) for number in range(3)]
    assert synced == []
    segments[0].sync()
    assert synced == [str(segments[0].path), str(spool._folder)], "the file, and once its name"
    segments[2].sync()
    assert synced[2:] == [str(segments[0].path)]
    receipts.close(timeout_s=0.0)
    segments[0].sync()
    assert len(synced) == 3, "closed: the log has the rows, or the next start sends them"


def test_a_line_cut_short_by_a_crash_is_left_out(spool: Spool) -> None:
    segment = spool.open_segment("r")
    segment.append(row(1))
    segment.close()
    with segment.path.open("ab") as file:
        file.write(row(2).to_line()[:-20])
    (orphan,) = spool.orphans()
    assert orphan.rows() == [row(1)]
    orphan.discard()


def test_a_row_that_does_not_fit_leaves_the_segment_as_it_was(spool: Spool) -> None:
    """The kernel writes what fits below the limit, then fails: both must be noticed, and the half line taken back."""
    segment = spool.open_segment("r")
    segment.append(row(1))
    before = segment.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            segment.append(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert segment.path.read_bytes() == before
    segment.append(row(3))
    assert segment.rows() == [row(1), row(3)]
    segment.discard()


def test_short_writes_are_gone_on_with(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    segment = spool.open_segment("r")
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    segment.append(row(1))
    monkeypatch.undo()
    assert segment.rows() == [row(1)]
    segment.discard()


def test_a_refused_row_is_set_aside_and_the_others_reach_the_log(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    count, poison = 2 * usage.MAX_BATCH + 88, {3, 300, 301}
    segment = spool.open_segment("dead")
    for number in range(count):
        segment.append(row(number))
    segment.close()
    log = ListLog()
    log.poison = {row(number).receipt_id for number in poison}
    receipts = start(log, spool)
    receipts.note(row(count))
    assert receipts.flush(20)
    receipts.close()
    assert log.receipts == [row(number).receipt_id for number in range(count + 1) if number not in poison]
    assert max(log.batches) <= usage.MAX_BATCH
    assert files(spool) == []
    refused = [SpooledRow.from_line(path.read_bytes()) for path in (spool._folder / "refused").iterdir()]
    assert sorted(found.receipt_id for found in refused) == sorted(log.poison)
    assert {path.stat().st_mode & 0o777 for path in (spool._folder / "refused").iterdir()} == {0o600}
    assert all(receipt_id in caplog.text for receipt_id in log.poison)


NOTER = """
import sys
from pathlib import Path
from serve_apps.spool import Spool, SpooledRow
segment = Spool(Path(sys.argv[1])).open_segment("r")
number = 0
while True:
    segment.append(SpooledRow({"id": f"rcpt_{number:026d}"}, bytes(32), {}))
    print(number, flush=True)
    number += 1
"""


def test_kill_minus_nine_loses_no_acknowledged_receipt(spool: Spool) -> None:
    command = [sys.executable, "-c", NOTER, str(spool._folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
        assert child.stdout is not None
        acknowledged = -1
        for line in child.stdout:
            acknowledged = int(line)
            if acknowledged >= 200:
                break
        os.kill(child.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in child.stdout)])
    log = ListLog()
    receipts = start(log, spool)
    wait_until(lambda: len(log.receipts) > acknowledged)
    receipts.close()
    assert log.receipts[: acknowledged + 1] == [f"rcpt_{number:026d}" for number in range(acknowledged + 1)]


def test_a_receipt_names_the_adapter_that_ran_and_vouches_for_no_other() -> None:
    call = Call(
        receipt_id="rcpt_1",
        time_us=7,
        model="support",
        tenant="acme",
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(),
        adapter=AdapterChoice(DIGEST, "support@3", "c" * 64),
        request_digest=OTHER,
        content={"messages": []},
    )
    text_digest = output_digest("hi", (3,))
    answer = Answer("hi", (3,), (), "stop", 2, DIGEST, text_digest)
    made = receipt_row(call, answer, server=Server("r1", OTHER))
    assert made.receipt["adapter"] == DIGEST
    assert (made.receipt["adapter_name"], made.receipt["adapter_record"]) == ("support@3", "c" * 64)
    assert (made.receipt["prompt_tokens"], made.receipt["completion_tokens"]) == (2, 1)
    assert made.content == {
        "messages": [],
        "prompt_token_ids": [1, 2],
        "output_text": "hi",
        "output_token_ids": [3],
    }
    swapped = receipt_row(call, replace(answer, adapter_digest=OTHER), server=Server("r1", OTHER))
    assert (swapped.receipt["adapter"], swapped.receipt["adapter_name"]) == (OTHER, None)
    assert swapped.receipt["adapter_record"] is None
    assert made.salt != swapped.salt
