"""A writer that was taken over from writes nothing more, whatever it was doing."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attribution.bodies import ApprovalBody
from attribution.log import fence
from attribution.log.fence import FencedError
from attribution.trail import Trail
from tests.attribution.test_sequencer import append, check_integrity, in_child

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From now on this process looks as if it ran on another machine."""
    monkeypatch.setattr(fence, "machine", lambda: "other/0123")
    return monkeypatch


def test_the_newest_take_over_writes_and_no_earlier_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    old, new = Trail.open(home), Trail.open(home)
    assert old.log.take_over() == 1
    append(old, "old")
    assert new.log.take_over() == 2
    before = (home / "log" / "entries.bin").read_bytes()
    with pytest.raises(FencedError, match=r"is take-over 1 and was fenced off by take-over 2, by process \d+ on"):
        append(old, "too late")
    with pytest.raises(FencedError):
        old.log.release()
    assert (home / "log" / "entries.bin").read_bytes() == before
    append(new, "new")
    assert len(list(old.entries())) == 2, "who may not write can read"
    check_integrity(home)


def test_commands_on_the_same_machine_append_beside_the_writer(tmp_path: Path) -> None:
    home = tmp_path / "home"
    writer, command = Trail.open(home), Trail.open(home)
    writer.log.take_over()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda trail: [append(trail, number) for number in range(10)], (writer, command)))
    assert check_integrity(home).log.size == 20


def test_another_machine_may_append_once_the_writer_gave_up_or_was_taken_over(
    tmp_path: Path, elsewhere: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    elsewhere.undo()
    writer = Trail.open(home)
    writer.log.take_over()
    elsewhere.setattr(fence, "machine", lambda: "other/0123")
    command = Trail.open(home)
    with pytest.raises(FencedError, match=r"held by take-over 1.*`trailmark log take-over`"):
        append(command, "from another machine")
    assert command.log.take_over() == 2
    append(command, "after take-over")
    with pytest.raises(FencedError):
        append(writer, "the old one")
    command.log.release()
    elsewhere.undo()
    append(Trail.open(home), "anyone")
    assert check_integrity(home).log.size == 2


def test_a_writer_that_was_stopped_wakes_up_fenced(tmp_path: Path) -> None:
    """Stopped as a cut-off node is, taken over from meanwhile; awake again it must not append one leaf."""
    home = tmp_path / "home"
    Trail.open(home)

    def work(write_end: int) -> None:
        trail = Trail.open(home)
        trail.log.take_over()
        try:
            for number in range(1_000_000):
                os.write(write_end, f"{append(trail, number)}\n".encode())
        except FencedError:
            os.write(write_end, b"fenced\n")

    pid, read_end = in_child(work)
    first = os.read(read_end, 65)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    if not _lock_is_free(home):  # it was stopped with the lock in hand: nobody may take over before it goes on
        os.kill(pid, signal.SIGCONT)
    new = Trail.open(home)
    new.log.take_over()
    new.refresh()
    size = new.log.size
    os.kill(pid, signal.SIGCONT)
    with os.fdopen(read_end) as told:
        lines = (first.decode() + told.read()).split()
    assert os.waitpid(pid, 0)[1] == 0
    assert lines[-1] == "fenced"
    new.refresh()
    assert new.log.size == size, "nothing was appended after the take-over"
    assert {entry.leaf_hash for entry in new.entries()} >= set(lines[:-1])


def _lock_is_free(home: Path) -> bool:
    import fcntl

    with (home / "log" / "lock").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_were_the_lock_none_no_second_history_would_be_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The take-over comes between the leaves and the signature: on a file system whose locks hold nothing."""
    home = tmp_path / "home"
    old = Trail.open(home)
    old.log.take_over()
    append(old, "before")
    checks, real = iter(range(9)), old.log._fence.check

    def check() -> None:
        if next(checks) == 1:
            fence.Fence(home / "log").take_over()
        real()

    monkeypatch.setattr(old.log._fence, "check", check)
    note = (home / "log" / "checkpoint").read_text()
    with pytest.raises(FencedError):
        old.record("approval", ApprovalBody(DIGEST, "approved", "between"))
    assert (home / "log" / "checkpoint").read_text() == note


def test_a_damaged_claim_is_refused(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    (tmp_path / "home" / "log" / "writer.json").write_text("{}")
    with pytest.raises(FencedError, match="damaged"):
        append(trail, 1)
