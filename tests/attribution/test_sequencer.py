"""The log under crashes, concurrent writers, failing disks and tampering: no acknowledged record is ever lost."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from attribution.bodies import ApprovalBody
from attribution.log.merkle import Tree, hash_leaf, verify_consistency
from attribution.log.note import NoteKey, open_checkpoint
from attribution.log.proof import parse_proof
from attribution.log.sequencer import Log, LogError
from attribution.trail import Draft, Trail

NUM_KILLS = 40
SEED = 20261122
DIGEST = "sha256:" + "ab" * 32


def note(number: int | str) -> ApprovalBody:
    return ApprovalBody(DIGEST, "approved", str(number))


def append(trail: Trail, number: int | str) -> str:
    return trail.record("approval", note(number)).leaf_hash


def reasons(trail: Trail) -> list[str]:
    return [entry.record.body.reason for entry in trail.entries()]  # type: ignore[union-attr]


def check_integrity(home: Path) -> Trail:
    """Reopen, check root, every inclusion proof and the order of time; return the trail."""
    trail = Trail.open(home, create=False)
    key = trail.log.key
    checkpoint = open_checkpoint(trail.log.checkpoint, key)
    entries = list(trail.entries())
    tree = Tree(hash_leaf(entry.leaf.to_bytes()) for entry in entries)
    assert (checkpoint.size, checkpoint.root) == (len(entries), tree.root())
    for entry, text in zip(entries, trail.log.proofs(range(len(entries))), strict=True):
        proof = parse_proof(text)
        proof.include(bytes.fromhex(entry.leaf_hash), proof.open(key))
        assert entry.record is not None, "a leaf without its record"
    times = [entry.leaf.time_us for entry in entries]
    assert times == sorted(times)
    size = (home / "log" / "entries.bin").stat().st_size
    assert size == sum(2 + len(entry.leaf.to_bytes()) for entry in entries)
    return trail


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work(write end of a pipe)` in a forked process; return its pid and the read end."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return pid, read_end
    os.close(read_end)
    status = 1
    try:
        work(write_end)
        status = 0
    finally:
        os._exit(status)


def read_lines(descriptor: int) -> Iterator[str]:
    with os.fdopen(descriptor) as file:
        for line in file:
            if line.endswith("\n"):
                yield line[:-1]


def test_kill_9_at_random_points_loses_no_acknowledged_record(tmp_path: Path) -> None:
    home, chance = tmp_path / "home", random.Random(SEED)
    append(Trail.open(home), "first")
    acknowledged: list[str] = []
    for round_number in range(NUM_KILLS):

        def write_forever(write_end: int, round_number: int = round_number) -> None:
            trail = Trail.open(home)
            for number in range(1_000_000):
                leaf_hash = append(trail, f"{round_number}.{number}")
                os.write(write_end, f"{leaf_hash}\n".encode())

        pid, read_end = in_child(write_forever)
        first = os.read(read_end, 65)  # the kill falls on a writer at work, not on its start
        time.sleep(chance.uniform(0, 0.03))  # a random point of the append, not a wait for a condition
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged += [first.decode().strip(), *read_lines(read_end)]
        log = Trail.open(home).log  # refuses a log whose leaves do not lead to its checkpoint
        lost = [leaf_hash for leaf_hash in acknowledged if log.index_of(leaf_hash) is None]
        assert not lost, f"kill {round_number} (seed {SEED}) lost {len(lost)} acknowledged records"
    assert len(acknowledged) >= NUM_KILLS
    append(check_integrity(home), "last")
    check_integrity(home)


def test_two_processes_and_an_inherited_trail_append_together(tmp_path: Path) -> None:
    home, each = tmp_path / "home", 20
    inherited = Trail.open(home)

    def write(name: str, open_trail: Callable[[], Trail]) -> Callable[[int], None]:
        def work(write_end: int) -> None:
            trail = open_trail()
            for number in range(each):
                os.write(write_end, f"{append(trail, f'{name}{number}')}\n".encode())

        return work

    children = [in_child(write("a", lambda: Trail.open(home))), in_child(write("b", lambda: inherited))]
    for number in range(each):
        append(inherited, f"c{number}")
    acknowledged = [line for _, read_end in children for line in read_lines(read_end)]
    assert [os.waitpid(pid, 0)[1] for pid, _ in children] == [0, 0]
    trail = check_integrity(home)
    found = reasons(trail)
    for name in "abc":
        assert [reason for reason in found if reason[0] == name] == [f"{name}{number}" for number in range(each)]
    assert len(found) == 3 * each
    assert set(acknowledged) <= {entry.leaf_hash for entry in trail.entries()}
    assert len(list(inherited.entries())) == 3 * each


def test_processes_may_open_one_new_home_at_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    children = [in_child(lambda _: append(Trail.open(home), "x") and None) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid, _ in children] == [0] * 4
    for _, read_end in children:
        os.close(read_end)
    assert check_integrity(home).log.size == 4


@pytest.mark.parametrize(
    "tail", [b"\x00", b"\x01\x09", b'\x01\x09{"commit', b"\x00\x00" * 8, b"\x00\x02{}", b"\xff" * 300]
)
def test_a_torn_tail_is_cut_on_reopen(tmp_path: Path, tail: bytes) -> None:
    home = tmp_path / "home"
    trail = Trail.open(home)
    hashes = [append(trail, number) for number in range(3)]
    before = trail.log.checkpoint
    with (home / "log" / "entries.bin").open("ab") as file:
        file.write(tail)
    reopened = check_integrity(home)
    assert [entry.leaf_hash for entry in reopened.entries()] == hashes
    assert reopened.log.checkpoint == before


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_an_older_checkpoint_after_a_crash_brings_back_every_record(tmp_path: Path, keep: int) -> None:
    """The leaves are durable before the checkpoint: a file system that lost the newer checkpoint loses no record."""
    home = tmp_path / "home"
    trail = Trail.open(home)
    checkpoints = [trail.log.checkpoint]
    for number in range(3):
        append(trail, number)
        checkpoints.append(trail.log.checkpoint)
    (home / "log" / "checkpoint").write_text(checkpoints[keep])
    with (home / "log" / "entries.bin").open("ab") as file:
        file.write(b"\x01\x09torn")
    reopened = check_integrity(home)
    assert reasons(reopened) == ["0", "1", "2"]
    assert reopened.log.checkpoint == checkpoints[3], "Ed25519 is deterministic: the same tree, the same checkpoint"


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "os.open", "os.pwrite"])
def test_a_failing_disk_never_leaves_a_log_that_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    home = tmp_path / "home"
    trail = Trail.open(home)
    acknowledged = [append(trail, "start")]
    owner, name = (os, call.split(".")[1]) if call.startswith("os.") else (Path, "replace")
    real = getattr(owner, name)
    for fail_at in range(10):
        num_calls = 0

        def failing(*arguments: object, fail_at: int = fail_at, **options: object) -> object:
            nonlocal num_calls
            num_calls += 1
            if num_calls == fail_at + 1:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with suppress(LogError):
                acknowledged.append(append(trail, fail_at))
        logged = [entry.leaf_hash for entry in check_integrity(home).entries()]
        assert set(acknowledged) <= set(logged)
        acknowledged.append(append(trail, f"{fail_at} again"))
    assert set(acknowledged) <= {entry.leaf_hash for entry in check_integrity(home).entries()}


def corrupt(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_tampering_is_refused_with_a_remedy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    trail = Trail.open(home)
    for number in range(4):
        append(trail, number)
    entries = home / "log" / "entries.bin"
    for position in (0, 5, entries.stat().st_size // 2, entries.stat().st_size - 1):
        copy = tmp_path / f"copy{position}"
        shutil.copytree(home, copy)
        corrupt(copy / "log" / "entries.bin", position)
        with pytest.raises(LogError, match="restore"):
            Trail.open(copy)
    shutil.copytree(home, tmp_path / "short")
    os.truncate(tmp_path / "short" / "log" / "entries.bin", entries.stat().st_size - 1)
    with pytest.raises(LogError, match="the checkpoint covers 4"):
        Trail.open(tmp_path / "short")
    (home / "log" / "checkpoint").unlink()
    with pytest.raises(LogError, match="could contradict an earlier one"):
        Trail.open(home)


def test_an_open_log_refuses_rollback_and_a_leaf_changed_under_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    trail = Trail.open(home)
    append(trail, 0)
    old_note, old_size = trail.log.checkpoint, (home / "log" / "entries.bin").stat().st_size
    append(trail, 1)
    new_note = trail.log.checkpoint
    (home / "log" / "checkpoint").write_text(old_note)
    with pytest.raises(LogError, match="rolled back from 2 to 1"):
        append(trail, 2)
    (home / "log" / "checkpoint").write_text(new_note)
    append(trail, 2)
    corrupt(home / "log" / "entries.bin", old_size + 20)
    with pytest.raises(LogError, match="leaf 1 was altered"):
        trail.log.leaf(1)


def test_a_checkpoint_of_another_key_is_refused(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    trail = Trail.open(home)
    append(Trail.open(other), 0)
    (home / "log" / "checkpoint").write_bytes((other / "log" / "checkpoint").read_bytes())
    with pytest.raises(LogError, match="not this log's"):
        trail.refresh()


def test_checkpoints_extend_one_another(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    append(trail, 0)
    old = open_checkpoint(trail.log.checkpoint, trail.log.key)
    trail.record_many([Draft("approval", note(number)) for number in range(1, 9)])
    new = open_checkpoint(trail.log.checkpoint, trail.log.key)
    assert (old.size, new.size) == (1, 9)
    path = trail.log.consistency_path(old.size)
    verify_consistency(old.size, new.size, old_root=old.root, root=new.root, path=path)


def test_without_the_log_key_a_home_can_be_read_but_not_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    append(Trail.open(home), 0)
    (home / "keys" / "log.key").unlink()
    trail = Trail.open(home)
    assert reasons(trail) == ["0"]
    with pytest.raises(LogError, match="no log key"):
        append(trail, 1)


def test_oversized_leaves_are_refused(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    with trail.log.exclusive() as appender, pytest.raises(LogError, match="65535"):
        appender.append([b"x" * 65_536])
    assert trail.log.size == 0


def test_reading_needs_no_lock_and_sees_whole_groups(tmp_path: Path) -> None:
    home = tmp_path / "home"
    writer, reader = Trail.open(home), Trail.open(home)
    trust = NoteKey.parse(str(writer.log.key))
    with writer.log.exclusive():
        assert list(reader.entries()) == []
    writer.record_many([Draft("approval", note(number)) for number in range(5)])
    assert reasons(reader) == ["0", "1", "2", "3", "4"]
    log = Log(home / "log", trust, signer=None, is_leaf=lambda data: True)
    assert (log.size, log.root()) == (5, writer.log.root())
