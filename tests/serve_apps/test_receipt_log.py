"""From the spool through the log writer actor: whatever dies, each receipt is recorded once and verifies."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from attribution import actors
from attribution.log.fence import FencedError
from attribution.log.verify import Trust, verify_file
from attribution.receipts import ReceiptError, ReceiptRow, append_completions, receipt_bundle
from attribution.trail import Trail
from serve_apps.replica import ActorReceiptLog
from serve_apps.spool import Spool, SpooledRow
from serve_apps.usage import Receipts, RowsRefused, Server
from tests.attribution.story import START_US, Story, receipt_row, tell

LATER_US = START_US + 3_600_000_000


@pytest.fixture
def story(trail: Trail) -> Story:
    return tell(trail)


@pytest.fixture
def writer(ray_cluster: str, story: Story) -> Iterator[Any]:
    options = {"name": actors.LOG_WRITER_NAME, "namespace": actors.NAMESPACE, "max_restarts": -1}
    handle = ray.remote(actors.LogWriter).options(num_cpus=0.1, **options).remote(str(story.trail.home))
    ray.get(handle.ready.remote(), timeout=actors.START_TIMEOUT_S)
    yield handle
    actors.stop()


def spooled(story: Story, number: int, *, replica: str = "replica-dead") -> SpooledRow:
    made = receipt_row(story.trail, number, story.base, story.adapter, LATER_US + number)
    return SpooledRow({**made.receipt, "replica": replica}, made.salt, {"prompt": f"question {number}"})


def stored(story: Story, row: SpooledRow) -> ReceiptRow:
    return ReceiptRow(row.receipt, row.salt, story.trail.put_json(row.content))


def verify(story: Story, receipt_id: str, folder: Path) -> None:
    """Write the receipt's bundle as a caller keeps it, and verify that file."""
    trail = Trail.open(story.trail.home)
    file = folder / f"{receipt_id}.json"
    file.write_text(json.dumps(receipt_bundle(trail, receipt_id)))
    assert verify_file(file, trust=Trust.load(trail.home / "trust.json")).kind == "receipt"


def recorded_ids(story: Story) -> list[str]:
    trail = Trail.open(story.trail.home)
    entries = [entry for entry in trail.entries(kind="completions") if entry.record]
    return [row["receipt"]["id"] for entry in entries for row in trail.get_json(entry.record.body.table)]


def log_of(story: Story) -> ActorReceiptLog:
    return ActorReceiptLog(story.trail, server=Server("replica-alive", story.base.record.outputs[0].digest))


def test_a_batch_takes_no_receipt_of_another_replica(story: Story) -> None:
    size = story.trail.log.size
    with pytest.raises(ReceiptError, match=r"replica 'replica-dead' is not the batch's 'replica-alive'"):
        append_completions(story.trail, [stored(story, spooled(story, 10))], replica="replica-alive")
    assert story.trail.log.size == size


def test_the_writer_records_a_receipt_once(story: Story) -> None:
    writer = actors.LogWriter(str(story.trail.home))
    rows = [stored(story, spooled(story, number)) for number in range(10, 14)]
    first = writer.append_completions(rows[:3], "replica-dead")
    assert writer.append_completions(rows[:3], "replica-dead") == first
    assert writer.append_completions(rows[:1], "replica-dead") == first, "the batch of the same adapter"
    assert writer.append_completions(rows, "replica-dead") != first
    assert sorted(recorded_ids(story)[-4:]) == [row.receipt["id"] for row in rows]
    size = Trail.open(story.trail.home).log.size
    with pytest.raises(ReceiptError, match="another receipt of this id"):
        writer.append_completions([replace(rows[0], salt=bytes(32))], "replica-dead")
    assert Trail.open(story.trail.home).log.size == size


def test_the_writer_records_a_load_once(story: Story) -> None:
    adapter, base = story.adapter.record.outputs[0].digest, story.base.record.outputs[0].digest
    writer = actors.LogWriter(str(story.trail.home))
    first = writer.adapter_loaded("r1", adapter, base)
    assert writer.adapter_loaded("r1", adapter, base) == first
    newer = actors.LogWriter(str(story.trail.home))
    assert newer.adapter_loaded("r1", adapter, base) == first
    assert newer.adapter_loaded("r2", adapter, base) != first
    with pytest.raises(FencedError, match="this writer is take-over 1 and was fenced off by take-over 2"):
        writer.adapter_loaded("r3", adapter, base)
    assert len(list(Trail.open(story.trail.home).entries(kind="adapter_loaded"))) == 2


def test_calls_that_overlap_record_a_receipt_once(story: Story) -> None:
    """A caller whose reply is late sends the same rows again while the first call still runs."""
    writer = actors.LogWriter(str(story.trail.home))
    rows = [stored(story, spooled(story, number)) for number in range(10, 18)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: writer.append_completions(rows[: number + 1], "replica-dead"), range(8)))
    assert sorted(recorded_ids(story)[-8:]) == [row.receipt["id"] for row in rows]
    assert len(set(recorded_ids(story))) == len(recorded_ids(story))


@pytest.mark.ray
def test_what_a_dead_replica_left_is_recorded_under_its_name_and_verifies(
    writer: Any, story: Story, tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "spool")
    segment = spool.open_segment("replica-dead")
    orphaned = [spooled(story, number) for number in range(10, 13)]
    orphaned.append(spooled(story, 13, replica="replica-older"))
    for row in orphaned:
        segment.append(row)
    segment.close()
    receipts = Receipts(log_of(story), spool, owner="replica-alive", flush_s=0.01)
    mine = spooled(story, 14, replica="replica-alive")
    receipts.note(mine)
    assert receipts.flush(60)
    receipts.close()
    for row in [*orphaned, mine]:
        verify(story, row.receipt_id, tmp_path)
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.ray
def test_a_row_the_writer_refuses_is_told_from_one_it_could_not_take(writer: Any, story: Story) -> None:
    bad = spooled(story, 20)
    bad.receipt["prompt_tokens"] = "many"
    with pytest.raises(RowsRefused, match="prompt_tokens"):
        log_of(story).append([bad])
    good = spooled(story, 21)
    log_of(story).append([good])
    assert recorded_ids(story)[-1] == good.receipt_id


@pytest.mark.ray
def test_a_killed_writer_loses_and_doubles_no_acknowledged_receipt(writer: Any, story: Story, tmp_path: Path) -> None:
    rows = [spooled(story, number, replica="replica-alive") for number in range(30, 42)]
    log, acknowledged = log_of(story), []
    for row in rows[:4]:
        log.append([row])
        acknowledged.append(row.receipt_id)
    ray.kill(writer, no_restart=False)
    receipts = Receipts(log, Spool(tmp_path / "spool"), owner="replica-alive", flush_s=0.01)
    for row in rows[4:8]:
        receipts.note(row)
    assert receipts.flush(120), "the writer never came back"
    ray.kill(writer, no_restart=False)
    for row in rows[8:]:
        receipts.note(row)
    assert receipts.flush(120), "the writer never came back"
    receipts.close()
    acknowledged += [row.receipt_id for row in rows[4:]]
    assert sorted(recorded_ids(story)[-len(rows) :]) == acknowledged
    for receipt_id in acknowledged:
        verify(story, receipt_id, tmp_path)
