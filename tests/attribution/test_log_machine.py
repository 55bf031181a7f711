"""Random lives of a log against a slow plain model: appends of many threads and openings, crashes, failing disks."""

import errno
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from attribution import fsck
from attribution.bodies import ApprovalBody
from attribution.log.note import Checkpoint, open_checkpoint
from attribution.log.sequencer import LogError
from attribution.trail import Draft
from benchmarks.crash_disk import Crash, CrashDisk, Run
from tests.attribution.test_merkle import mth

DIGEST = "sha256:" + "ab" * 32
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS]


class LogMachine(RuleBasedStateMachine):
    """The model: index -> leaf hash of what was acknowledged; what was signed; reasons that were refused."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="log-machine-"))
        self.number = 0
        self.home = self.folder / "0" / "home"
        (self.folder / "0").mkdir()
        self.disk = CrashDisk(self.folder / "0")
        self.run = Run(self.home, self.disk)
        self.trail = self.run.open(self.home, self.disk)
        self.acknowledged: dict[int, str] = {}
        self.refused: set[str] = set()

    def reason(self) -> str:
        self.number += 1
        return str(self.number)

    def draft(self, reason: str) -> Draft:
        return Draft("approval", ApprovalBody(DIGEST, "approved", reason))

    @rule(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
    def append(self, sizes: list[int]) -> None:
        groups = [[self.draft(self.reason()) for _ in range(size)] for size in sizes]
        with ThreadPoolExecutor(len(groups)) as pool:
            for entries in pool.map(self.trail.record_many, groups):
                self.acknowledge({entry.index: entry.leaf_hash for entry in entries})

    def acknowledge(self, new: dict[int, str]) -> None:
        assert not set(new) & set(self.acknowledged), "an index was given twice"
        self.acknowledged |= new

    @rule()
    def append_from_elsewhere(self) -> None:
        """Another opening of the home, as a command makes one."""
        entry = self.run.open(self.home, self.disk).record("approval", ApprovalBody(DIGEST, "approved", self.reason()))
        self.acknowledge({entry.index: entry.leaf_hash})

    @rule(after=st.integers(0, 14), error=st.sampled_from(ERRORS), for_good=st.booleans())
    def append_on_a_failing_disk(self, after: int, error: int, for_good: bool) -> None:
        self.disk._at, self.disk._error, self.disk._for_good = self.disk.num_calls + after, error, for_good
        reason = self.reason()
        try:
            entry = self.trail.record("approval", ApprovalBody(DIGEST, "approved", reason))
            self.acknowledge({entry.index: entry.leaf_hash})
        except LogError as refusal:
            if "nothing was recorded" in str(refusal):
                self.refused.add(reason)
        self.disk.space_returns()

    @rule(after=st.integers(0, 20), share=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 2**32))
    def crash_and_reopen(self, after: int, share: float, seed: int) -> None:
        chance = Random(seed)
        self.disk._at, self.disk._error = self.disk.num_calls + after, None
        try:
            entries = self.trail.record_many([self.draft(self.reason()) for _ in range(3)])
            self.acknowledge({entry.index: entry.leaf_hash for entry in entries})
        except Crash:
            pass
        self.number += 1
        left = self.folder / str(self.number)
        self.disk.crashed_copy(left, lambda: chance.random() < share)
        self.home, self.disk = left / "home", CrashDisk(left)
        self.disk.adopt()
        signed = self.run.signed
        self.run = Run(self.home, self.disk)
        self.run.signed = signed
        self.trail = self.run.open(self.home, self.disk)

    @invariant()
    def check_integrity(self) -> None:
        if not hasattr(self, "trail"):
            return
        log = self.trail.log
        with log.exclusive():  # what was signed and not published is, before anything else is appended
            pass
        leaves = list(log.leaves(0, log.size))
        assert open_checkpoint(log.checkpoint, log.key) == Checkpoint(log.key.name, len(leaves), mth(leaves))
        for index, leaf_hash in self.acknowledged.items():
            assert sha256(b"\x00" + leaves[index]).hexdigest() == leaf_hash
        for checkpoint in self.run.signed:
            assert checkpoint.size <= len(leaves) and mth(leaves[: checkpoint.size]) == checkpoint.root
        reasons = [entry.record.body.reason for entry in self.trail.entries()]  # type: ignore[union-attr]
        assert not self.refused & set(reasons)
        assert len(set(reasons)) == len(reasons)
        assert fsck.check(self.home, with_store=False).is_sound

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(
    max_examples=8, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
