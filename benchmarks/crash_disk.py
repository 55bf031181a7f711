"""A disk that loses what was not fsynced: every state a crash could leave, made for real in a fresh folder.

`CrashDisk` does each call on the real file system and keeps a model beside it: of a file, its durable bytes and the
writes since its last fsync; of a directory, its durable names and the changes since its last fsync. `crashed_copy`
makes the folder as a crash leaves it: of what was not fsynced nothing survives, all, or a random part, writes torn into
sectors that survive each on its own (a lost one reads as zeros) and names changed or not, each on its own.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from attribution import fsck
from attribution.bodies import ApprovalBody
from attribution.disk import Disk
from attribution.log.note import Checkpoint, NoteKey
from attribution.log.sequencer import LogDiskError, OutcomeUnknown
from attribution.private_records import PrivateRecords
from attribution.trail import Draft, Trail
from configs.errors import UserError

SECTOR = 512
SEGMENT_BYTES = 4096  # small, so that the appends below begin segments
NUM_APPENDS = 6
DIGEST = "sha256:" + "ab" * 32


class Crash(BaseException):
    """The machine went down; no call to the disk returns any more."""


@dataclass
class Inode:
    """A file: what is durable of it and what was done since, a write (offset, bytes) or a cut (size, None)."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def after(self, keep: Callable[[], bool]) -> bytes:
        """Return the bytes when of the pending changes those survive that `keep` says, sector by sector."""
        data = bytearray(self.durable)
        for offset, piece in self.pending:
            if piece is None:
                if keep():
                    del data[offset:]
                    data.extend(bytes(offset - len(data)))
                continue
            for start in range(0, len(piece), SECTOR):
                if keep():
                    end = offset + start + len(piece[start : start + SECTOR])
                    data.extend(bytes(max(0, end - len(data))))
                    data[offset + start : end] = piece[start : start + SECTOR]
        return bytes(data)


@dataclass
class Directory:
    """A directory: its durable names and the changes since, each a set of names and what they mean then."""

    durable: dict[str, "Inode | Directory"] = field(default_factory=dict)
    pending: list[dict[str, "Inode | Directory | None"]] = field(default_factory=list)

    def after(self, keep: Callable[[], bool]) -> dict[str, "Inode | Directory"]:
        """Return the names when of the pending changes those survive that `keep` says."""
        names: dict[str, Inode | Directory | None] = dict(self.durable)
        for change in self.pending:
            if keep():
                names.update(change)
        return {name: node for name, node in names.items() if node is not None}


class CrashDisk(Disk):
    """Crashes before, or fails, call number `at` (from 0); counts the calls."""

    def __init__(self, root: Path, *, at: int | None = None, error: int | None = None, for_good: bool = False) -> None:
        self.root, self.num_calls = root, 0
        self._at, self._error, self._for_good = at, error, for_good
        self._top = Directory()
        self._names: dict[Path, Inode | Directory] = {root: self._top}  # what a living process sees
        self._open: dict[int, Inode] = {}

    def adopt(self) -> None:
        """Take what lies in the root folder for durable, as after a restart; keys and views stay unmodelled."""
        for path in sorted(self.root.rglob("*")):
            if path.is_dir():
                self._change(path.parent, {path.name: Directory()})
            elif path.suffix not in (".key", ".pub") and path.name != "lock":
                self._change(path.parent, {path.name: Inode(path.read_bytes())})
        for node in self._names.values():
            if isinstance(node, Directory):
                node.durable, node.pending = node.after(lambda: True), []

    def space_returns(self) -> None:
        """Fail no call from now on."""
        self._at = None

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """See Disk."""
        is_new = path not in self._names
        if is_new and flags & os.O_CREAT:
            self._count()
            self._change(path.parent, {path.name: Inode()})
        descriptor = super().open(path, flags, mode)
        node = self._names[path]
        assert isinstance(node, Inode)
        self._open[descriptor] = node
        return descriptor

    def close(self, descriptor: int) -> None:
        """See Disk; a dead process's files are closed too."""
        self._open.pop(descriptor, None)
        super().close(descriptor)

    def write(self, descriptor: int, data: bytes, *, offset: int) -> None:
        """See Disk; a failing write leaves its first half, as a disk that fills up does."""
        try:
            self._count()
        except OSError:
            half = data[: len(data) // 2]
            super().write(descriptor, half, offset=offset)
            self._open[descriptor].pending.append((offset, half))
            raise
        super().write(descriptor, data, offset=offset)
        self._open[descriptor].pending.append((offset, data))

    def truncate(self, descriptor: int, size: int) -> None:
        """See Disk."""
        self._count(needs_space=False)
        super().truncate(descriptor, size)
        self._open[descriptor].pending.append((size, None))

    def fsync(self, descriptor: int) -> None:
        """See Disk."""
        self._count()
        node = self._open[descriptor]
        node.durable, node.pending = node.after(lambda: True), []

    def replace(self, source: Path, target: Path) -> None:
        """See Disk."""
        self._count()
        super().replace(source, target)
        node = self._names[source]
        if source.parent == target.parent:
            self._change(target.parent, {source.name: None, target.name: node})
        else:
            self._change(target.parent, {target.name: node})
            self._change(source.parent, {source.name: None})

    def unlink(self, path: Path) -> None:
        """See Disk."""
        self._count(needs_space=False)
        super().unlink(path)
        if path in self._names:
            self._change(path.parent, {path.name: None})

    def make_directory(self, path: Path, mode: int = 0o777) -> None:
        """See Disk."""
        if path not in self._names:
            self._count()
            self._change(path.parent, {path.name: Directory()})
        super().make_directory(path, mode)

    def sync_directory(self, path: Path) -> None:
        """See Disk."""
        self._count()
        node = self._names[path]
        assert isinstance(node, Directory)
        node.durable, node.pending = node.after(lambda: True), []

    def crashed_copy(self, target: Path, keep: Callable[[], bool]) -> None:
        """Write the root folder as a crash leaves it; files that did not go through this disk are as they are."""
        shutil.copytree(self.root, target, ignore=lambda folder, names: self._modelled(Path(folder), names))
        _write_directory(self._top, target, keep)

    def _modelled(self, folder: Path, names: Sequence[str]) -> list[str]:
        return [name for name in names if isinstance(self._names.get(folder / name), Inode)]

    def _count(self, *, needs_space: bool = True) -> None:
        """Count a call that changes the disk; the one whose turn it is ends here."""
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if self._at is None or number < self._at:
            return
        if self._error is None:
            raise Crash
        if number == self._at or (self._for_good and needs_space):
            raise OSError(self._error, os.strerror(self._error))

    def _change(self, folder: Path, names: dict[str, Inode | Directory | None]) -> None:
        node = self._names[folder]
        assert isinstance(node, Directory)
        node.pending.append(names)
        for name, child in names.items():
            if child is None:
                self._names.pop(folder / name, None)
            else:
                self._names[folder / name] = child


def _write_directory(node: Directory, target: Path, keep: Callable[[], bool]) -> None:
    for name, child in node.after(keep).items():
        if isinstance(child, Directory):
            (target / name).mkdir(exist_ok=True)
            _write_directory(child, target / name, keep)
        else:
            (target / name).write_bytes(child.after(keep))


@dataclass
class Outcome:
    """What one crash or failure did to the log."""

    lost: list[str] = field(default_factory=list)
    forked: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class Run:
    """Appends to a new home on a CrashDisk, and what was acknowledged and signed meanwhile."""

    def __init__(self, home: Path, disk: CrashDisk) -> None:
        self.home, self.disk = home, disk
        self.acknowledged: dict[int, str] = {}
        self.refused: list[str] = []
        self.signed: list[Checkpoint] = []

    def append_all(self) -> None:
        """Make the home and append groups of one, two and three records."""
        trail = self.open(self.home, self.disk)
        for number in range(NUM_APPENDS):
            self.append(trail, number)

    def append(self, trail: Trail, number: int) -> None:
        """Append one group; note what was acknowledged or refused."""
        draft = Draft("approval", ApprovalBody(DIGEST, "approved", f"{number} " + "x" * 400))
        before = trail.log.size
        try:
            self.acknowledged.update({e.index: e.leaf_hash for e in trail.record_many([draft] * (1 + number % 3))})
        except OutcomeUnknown:
            trail.refresh()
        except LogDiskError:
            trail.refresh()
            if trail.log.size != before:
                self.refused.append(f"append {number} was refused and is in the log")

    def open(self, home: Path, disk: Disk) -> Trail:
        """Open a home so that every checkpoint is noted before it is signed."""
        opened = Trail.open(home, disk=disk)
        signer = _Noting(opened.log.key, opened.keys.get("log").sign, self.signed)
        trail = Trail.open(home, log_signer=signer, disk=disk)
        trail.private = PrivateRecords(home / "records", disk=disk, segment_bytes=SEGMENT_BYTES)
        return trail

    def judge(self, home: Path, when: str) -> Outcome:
        """Check a home after the crash, append to it once more, and check again."""
        outcome = Outcome(damaged=[f"{when}: {problem}" for problem in self.refused])
        try:
            self._judge(home, when, outcome)
        except (UserError, ValueError) as error:  # a home that cannot even be opened
            outcome.damaged.append(f"{when}: {error}")
        return outcome

    def _judge(self, home: Path, when: str, outcome: Outcome) -> None:
        for step in ("as it was left", "after one more append"):
            report = fsck.check(home)
            outcome.damaged += [f"{when}, {step}: {finding}" for finding in report.damage]
            trail = self.open(home, Disk())
            for index, leaf_hash in self.acknowledged.items():
                if index >= trail.log.size or trail.log.leaf_hash(index) != leaf_hash:
                    outcome.lost.append(f"{when}, {step}: entry {index}")
                elif trail.entry(index).record is None:
                    outcome.lost.append(f"{when}, {step}: record of entry {index}")
            outcome.forked += [
                f"{when}, {step}: the signed checkpoint of {checkpoint.size} leaves"
                for checkpoint in self.signed
                if checkpoint.size > trail.log.size or trail.log.root(checkpoint.size) != checkpoint.root
            ]
            trail.record("approval", ApprovalBody(DIGEST, "approved", "goes on"))


class _Noting:
    """Signs as the log's key does, after noting what is about to be signed."""

    def __init__(self, key: NoteKey, sign: Callable[[bytes], bytes], signed: list[Checkpoint]) -> None:
        self.public_bytes, self._sign, self._signed = key.public_bytes, sign, signed

    def sign(self, message: bytes) -> bytes:
        """Sign one checkpoint."""
        self._signed.append(Checkpoint.parse(message.decode()))
        return self._sign(message)


def crash_points(folder: Path, *, seed: int, seeds_per_point: int) -> Iterator[Outcome]:
    """Crash before each call to the disk in turn, in each way, and judge what is left."""
    for at in range(_num_calls(folder / "count")):
        home = folder / f"{at}" / "home"
        (folder / f"{at}").mkdir(parents=True)
        run = Run(home, CrashDisk(folder / f"{at}", at=at))
        with suppress(Crash):
            run.append_all()
        for number in range(2 + seeds_per_point):
            chance = random.Random(seed + 1000 * at + number)
            keep = [lambda: False, lambda: True, lambda chance=chance: chance.random() < 0.5][min(number, 2)]
            left = folder / f"{at}.{number}"
            run.disk.crashed_copy(left, keep)
            again = Run(left / "home", run.disk)
            again.acknowledged, again.signed = run.acknowledged, list(run.signed)
            if (left / "home" / "trust.json").exists() or run.acknowledged:
                yield again.judge(left / "home", f"crash at call {at}, state {number}")
            else:
                yield Outcome()  # there was no home yet, and nothing to lose
            shutil.rmtree(left)
        shutil.rmtree(folder / f"{at}")


def failing_calls(folder: Path) -> Iterator[Outcome]:
    """Let each call to the disk fail in turn, once or until space returns, and judge what is left."""
    num_calls, first = _num_calls(folder / "count"), _num_calls(folder / "count0", num_appends=0)
    for at in range(first, num_calls):
        for error, for_good in ((errno.ENOSPC, True), (errno.EIO, False), (errno.EROFS, True)):
            root = folder / f"{at}.{error}"
            root.mkdir(parents=True)
            disk = CrashDisk(root, at=at, error=error, for_good=for_good)
            run = Run(root / "home", disk)
            trail = run.open(root / "home", disk)
            for number in range(NUM_APPENDS):
                run.append(trail, number)
            disk.space_returns()
            for number in range(2):
                run.append(trail, number)
            if not run.acknowledged:
                run.refused.append("nothing was acknowledged once there was space again")
            yield run.judge(root / "home", f"{errno.errorcode[error]} at call {at}")
            shutil.rmtree(root)


def _num_calls(folder: Path, *, num_appends: int | None = None) -> int:
    """How many calls change the disk in an undisturbed run of so many appends (default: NUM_APPENDS)."""
    folder.mkdir(parents=True)
    disk = CrashDisk(folder)
    run = Run(folder / "home", disk)
    trail = run.open(folder / "home", disk)
    for number in range(NUM_APPENDS if num_appends is None else num_appends):
        run.append(trail, number)
    shutil.rmtree(folder)
    return disk.num_calls
