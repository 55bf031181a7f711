"""Does anything kill the log? kill -9 of real writers, a crash at every call to the disk, a disk that is really full.

    python -m benchmarks.log_faults [--quick] [--check] [--out FILE] [--kills N] [--seed N]

1. `kill -9`: two writer processes of two threads each append to one home; at a random moment both are killed, then the
   home is checked and two new writers start. After each kill: every acknowledged record has its place and its record,
   every checkpoint that was ever signed (the writers note each before its signature exists) is the log's own tree at
   its size, and `trailmark fsck` finds nothing damaged.
2. Crash points: on a simulated disk (see crash_disk.py) a run of appends is cut off before every single call that
   changes the disk; of what was not fsynced nothing, all or a random torn part survives. Every call is also made to
   fail, as on a full, a failing and a read-only disk, and then to work again.
3. A small real tmpfs is filled up to a few pages before each append, and remounted read-only (as root; else skipped).

The last line is one JSON object; `--check` exits 1 unless nothing was lost, nothing forked and every check passed.
"""

import argparse
import contextlib
import errno
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attribution import fsck
from attribution.bodies import ApprovalBody
from attribution.log.note import Checkpoint, NoteError, NoteKey
from attribution.log.sequencer import LogDiskError, LogError
from attribution.trail import Draft, Trail
from benchmarks.crash_disk import crash_points, failing_calls

DIGEST = "sha256:" + "ab" * 32
NUM_WRITERS, NUM_THREADS = 2, 2
MAX_LIFE_S = 0.08
KILLS_PER_HOME = 50  # then the command `trailmark fsck --repair` too is run, and a fresh home begun
PAGE = 4096


@dataclass
class Tally:
    """What was tried and what went wrong."""

    kills: int = 0
    acknowledged: int = 0
    checkpoints_signed: int = 0
    lost: list[str] = field(default_factory=list)
    forked: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    leftovers: int = 0
    crash_points: int = 0
    failed_calls: int = 0
    full_disk_appends: int = 0
    full_disk_refusals: int = 0
    read_only: str = "skipped"

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.forked or self.damaged)


class NotingSigner:
    """Signs as the log's key does, after writing down what is about to be signed."""

    def __init__(self, key: NoteKey, sign: Callable[[bytes], bytes], descriptor: int) -> None:
        self.public_bytes, self._sign, self._descriptor = key.public_bytes, sign, descriptor

    def sign(self, message: bytes) -> bytes:
        """Sign one checkpoint."""
        os.write(self._descriptor, json.dumps(message.decode()).encode() + b"\n")  # O_APPEND: whole lines
        return self._sign(message)


def write_until_killed(home: Path, signed: Path, acknowledged: int) -> None:
    """Append from several threads for ever, and tell of each record that was acknowledged."""
    descriptor = os.open(signed, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    opened = Trail.open(home)
    signer = NotingSigner(opened.log.key, opened.keys.get("log").sign, descriptor)
    trail = Trail.open(home, log_signer=signer)

    def write(name: str) -> None:
        for number in range(1_000_000):
            drafts = [Draft("approval", ApprovalBody(DIGEST, "approved", f"{name}.{number}"))] * (1 + number % 3)
            for entry in trail.record_many(drafts):
                os.write(acknowledged, f"{entry.index} {entry.leaf_hash}\n".encode())

    threads = [threading.Thread(target=write, args=(f"{os.getpid()}.{index}",)) for index in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start_writer(home: Path, signed: Path) -> tuple[int, int]:
    """Fork a writer; return its process id and the pipe of what it acknowledged."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return pid, read_end
    try:
        os.close(read_end)
        write_until_killed(home, signed, write_end)
    finally:
        os._exit(1)


def kill_loop(folder: Path, tally: Tally, *, num_kills: int, chance: random.Random) -> None:
    """Start writers and kill them at random moments, checking after each kill; a fresh home now and then."""
    while tally.kills < num_kills:
        home, signed = folder / f"home{tally.kills}", folder / f"signed{tally.kills}"
        Trail.open(home)
        known: dict[int, str] = {}
        position = 0
        for _ in range(min(KILLS_PER_HOME, num_kills - tally.kills) // NUM_WRITERS):
            told = _kill_writers(home, signed, MAX_LIFE_S * chance.random())
            tally.kills += NUM_WRITERS
            if tally.kills % 4 == 0:
                Trail.open(home)  # recovers; every other time fsck sees what the crash left
            report = fsck.check(home, with_store=False)
            tally.leftovers += len(report.leftovers)
            tally.damaged += [f"kill {tally.kills}: {finding}" for finding in report.damage]
            trail = Trail.open(home, create=False)
            _check_acknowledged(trail, told, known, tally)
            position = _check_signed(trail, signed, position, tally)
        _run_command(home, tally)
        print(f"  {tally.kills} kills, {tally.acknowledged} records acknowledged", flush=True)


def _kill_writers(home: Path, signed: Path, life_s: float) -> bytes:
    """Start writers, kill them `life_s` after the first acknowledgement, and return what they acknowledged."""
    writers = [start_writer(home, signed) for _ in range(NUM_WRITERS)]
    first = os.read(writers[0][1], 68)  # the kill falls on writers at work, not on their start
    time.sleep(life_s)
    for pid, _ in writers:
        os.kill(pid, signal.SIGKILL)
    for pid, _ in writers:
        os.waitpid(pid, 0)
    return first + b"".join(_drain(pipe) for _, pipe in writers)


def _drain(pipe: int) -> bytes:
    with os.fdopen(pipe, "rb") as file:
        return file.read()


def _check_acknowledged(trail: Trail, told: bytes, known: dict[int, str], tally: Tally) -> None:
    """Every acknowledged index holds that leaf, the new ones with their record, and no index was given twice."""
    new = {}
    for line in told.decode().splitlines():
        index_text, _, leaf_hash = line.partition(" ")
        if len(leaf_hash) == 64:
            if known.get(int(index_text), leaf_hash) != leaf_hash or new.get(int(index_text), leaf_hash) != leaf_hash:
                tally.forked.append(f"index {index_text} was given twice")
            new[int(index_text)] = leaf_hash
    known.update(new)
    tally.acknowledged += len(new)
    for index, leaf_hash in known.items():
        if index >= trail.log.size or trail.log.leaf_hash(index) != leaf_hash:
            tally.lost.append(f"kill {tally.kills}: entry {index} {leaf_hash}")
    there = [index for index in new if index < trail.log.size]
    tally.lost += [f"kill {tally.kills}: record of {index}" for index in there if trail.entry(index).record is None]


def _check_signed(trail: Trail, signed: Path, position: int, tally: Tally) -> int:
    """Every checkpoint ever signed is the root of the log's own leaves at its size; return how far was read."""
    with signed.open("rb") as file:
        file.seek(position)
        data = file.read()
    lines = data.split(b"\n")[:-1]
    for line in lines:
        try:
            checkpoint = Checkpoint.parse(json.loads(line))
        except (NoteError, ValueError):
            tally.forked.append(f"unreadable signed text: {line!r}")
            continue
        tally.checkpoints_signed += 1
        if checkpoint.size > trail.log.size or trail.log.root(checkpoint.size) != checkpoint.root:
            tally.forked.append(f"kill {tally.kills}: a checkpoint of {checkpoint.size} leaves was signed, and is lost")
    return position + sum(len(line) + 1 for line in lines)


def _run_command(home: Path, tally: Tally) -> None:
    command = [sys.executable, "-m", "cluster", "fsck", "--repair"]
    done = subprocess.run(
        command, env={**os.environ, "TRAILMARK_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        tally.damaged.append(f"kill {tally.kills}: trailmark fsck --repair: {done.stdout}{done.stderr}")


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path | None]:
    """A tmpfs of a few pages; None where we may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder: Path, tally: Tally, *, num_rounds: int) -> None:
    """Leave 0, 1, 2, ... pages of a real disk free, append until refused, free them, append again."""
    with small_disk(folder / "tmpfs", 512 * PAGE) as disk:
        if disk is None:
            print("  full disk: skipped, it takes root to mount a tmpfs")
            return
        trail = Trail.open(disk / "home")
        trail.record("approval", ApprovalBody(DIGEST, "approved", "first"))
        for round_number in range(num_rounds):
            _fill(disk / "filler", keep=round_number % 8)
            acknowledged = list(_append_until_refused(trail, tally))
            (disk / "filler").unlink()
            _expect_sound(disk / "home", acknowledged, tally, f"full disk, round {round_number}")
            trail.record("approval", ApprovalBody(DIGEST, "approved", "space again"))
        tally.read_only = _read_only(disk, trail, tally)


def _fill(filler: Path, *, keep: int) -> None:
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)) == PAGE:
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    os.truncate(filler, max(0, filler.stat().st_size // PAGE - keep) * PAGE)


def _append_until_refused(trail: Trail, tally: Tally) -> Iterator[str]:
    for number in range(2000):
        size = trail.log.size
        try:
            yield trail.record("approval", ApprovalBody(DIGEST, "approved", f"{number} " + "x" * 900)).leaf_hash
            tally.full_disk_appends += 1
        except LogDiskError:
            tally.full_disk_refusals += 1
            trail.refresh()
            if trail.log.size != size:
                tally.damaged.append("a record that was refused is in the log")
            return
    tally.damaged.append("the disk never filled up")


def _read_only(disk: Path, trail: Trail, tally: Tally) -> str:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        trail.record("approval", ApprovalBody(DIGEST, "approved", "read-only"))
        tally.damaged.append("a read-only disk took a record")
    except LogError as error:
        message = str(error)
    reader = Trail.open(disk / "home", create=False)
    _expect_sound(disk / "home", [entry.leaf_hash for entry in reader.entries()], tally, "read-only disk")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    trail.record("approval", ApprovalBody(DIGEST, "approved", "writable again"))
    return message.replace(str(disk), "DISK")


def _expect_sound(home: Path, acknowledged: Sequence[str], tally: Tally, when: str) -> None:
    report = fsck.check(home)
    tally.damaged += [f"{when}: {finding}" for finding in report.damage]
    log = Trail.open(home, create=False).log
    tally.lost += [f"{when}: {leaf_hash}" for leaf_hash in acknowledged if log.index_of(leaf_hash) is None]


def run(folder: Path, *, num_kills: int, seed: int, num_rounds: int, seeds_per_point: int) -> Tally:
    """Run all three parts below a folder and return what came of them."""
    tally, chance = Tally(), random.Random(seed)
    print(f"kill -9, {NUM_WRITERS} writers of {NUM_THREADS} threads each:")
    kill_loop(folder, tally, num_kills=num_kills, chance=chance)
    print("crash before every call to the disk:")
    for outcome in crash_points(folder / "crash", seed=seed, seeds_per_point=seeds_per_point):
        tally.crash_points += 1
        tally.lost += outcome.lost
        tally.forked += outcome.forked
        tally.damaged += outcome.damaged
    for outcome in failing_calls(folder / "failing"):
        tally.failed_calls += 1
        tally.lost += outcome.lost
        tally.forked += outcome.forked
        tally.damaged += outcome.damaged
    print(f"  {tally.crash_points} crashes, {tally.failed_calls} failing calls")
    full_disk(folder, tally, num_rounds=num_rounds)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print what came of it and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 kills, one torn state per crash point")
    parser.add_argument("--check", action="store_true", help="exit 1 when anything was lost, forked or damaged")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--kills", type=int, help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=20261125, help="of the moments and of what a crash tears")
    options = parser.parse_args(arguments)
    num_kills = options.kills or (100 if options.quick else 1000)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="log-faults-") as folder:
        tally = run(
            Path(folder),
            num_kills=num_kills,
            seed=options.seed,
            num_rounds=8 if options.quick else 32,
            seeds_per_point=1 if options.quick else 8,
        )
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
        "floor": {"lost": 0, "forked": 0, "damaged": 0, "kills": 1000},
        **asdict(tally),
    }
    for name, value in result.items():
        print(f"{name:20} {len(value) if isinstance(value, list) else value}")
    line = json.dumps(result)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 0 if tally.is_good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
