"""The run in progress, written down before and after each step, so that a driver killed without a word loses nothing.

HOME/run/workflows/NAME.json is the run as it stands; it goes once the run's record is in the log. NAME.lock is held by
the driver; the system lets go of it when the driver dies.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.records import canonical_bytes, to_plain
from attribution.store import make_directory, write_atomically
from attribution.workflow_runs import Key, Run, StepRun, run_from_plain
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

FOLDER = Path("run") / "workflows"


class Journal:
    """One workflow's run in progress."""

    def __init__(self, home: Path, workflow: str) -> None:
        make_directory(home / FOLDER)
        self._workflow = workflow
        self._file = home / FOLDER / f"{workflow}.json"
        self._lock = home / FOLDER / f"{workflow}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only driver of this workflow for the block.

        Raises:
            UserError: another process runs it.
        """
        with self._lock.open("a+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"workflow {self._workflow!r}: process {file.read().strip()} runs it; wait for it, or stop it"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def write(self, run: Run) -> None:
        """Write the run as it stands, durable on return."""
        write_atomically(self._file, canonical_bytes(to_plain(run, "run"), "run"))

    def read(self) -> Run | None:
        """Return the run that a driver left behind, or None."""
        if not self._file.is_file():
            return None
        return run_from_plain(json.loads(self._file.read_bytes()))

    def clear(self) -> None:
        """Forget the run; its record is in the log."""
        self._file.unlink(missing_ok=True)


def find_made(trail: "Trail", key: Key, *, kind: str, log_size: int) -> "Entry | None":
    """Return the record of a kind, appended at `log_size` or later, that says it was made from exactly this key.

    A driver may die between the record and the note that the step is done; the work is not done twice then.
    """
    for entry in trail.entries(start=log_size, kind=kind):
        if entry.record is None or entry.record.config != key.config or entry.record.seed != key.seed:
            continue
        sources = {item.digest for item in entry.record.inputs} | {f"sha256:{leaf}" for leaf in entry.leaf.parents}
        if {item.digest for item in key.inputs} | ({key.base} if key.base else set()) <= sources:
            return entry
    return None


def killed(run: Run) -> Run:
    """Return a run left behind as its record should tell it: what was running was killed."""

    def told(step: StepRun) -> StepRun:
        is_open = step.status == "running"
        return replace(step, status="killed", reason="its driver was killed") if is_open else step

    return replace(run, status="killed", steps=tuple(told(step) for step in run.steps))
