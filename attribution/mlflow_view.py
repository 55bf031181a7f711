"""MLflow as a view of the log: a follower that reads the log from a cursor and writes each record once.

The log is the outbox. The cursor moves only after a record is fully written; writing one again finds what is there
by its leaf hash and changes nothing. So a crash, a server that is down or an emptied server cost time, never a record.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from attribution.lineage import Lineage
from attribution.mlflow_context import ViewContext
from attribution.mlflow_cursor import CURSOR_FILE, Aside, Cursor
from attribution.mlflow_datasets import write_dataset
from attribution.mlflow_notes import EXPERIMENT_NOTE, VIEW_TAG, provenance_view
from attribution.mlflow_prompts import write_prompt
from attribution.mlflow_reconcile import Difference, differences
from attribution.mlflow_redact import write_redaction, write_row_redaction
from attribution.mlflow_runs import (
    write_adapter,
    write_base_model,
    write_benchmark,
    write_publication,
    write_refinement,
    write_settlement,
)
from attribution.mlflow_server import TAG_NOTE, UNSHOWABLE, MlflowServer, ViewUnavailable, translated_errors
from attribution.mlflow_traces import write_completions, write_influence
from attribution.mlflow_workflows import (
    write_approval,
    write_workflow_effect,
    write_workflow_patch,
    write_workflow_run,
)
from attribution.pages.show import LineagePages
from attribution.trail import Entry, Trail

logger = logging.getLogger(__name__)

NUM_TRIES = 3  # of a record that MLflow refuses, before it is set aside
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
WRITERS: dict[str, Callable[[ViewContext, Entry], None]] = {
    "dataset": write_dataset,
    "refinement": write_refinement,
    "base_model": write_base_model,
    "adapter": write_adapter,
    "benchmark": write_benchmark,
    "publication": write_publication,
    "prompt": write_prompt,
    "completions": write_completions,
    "influence": write_influence,
    "workflow_run": write_workflow_run,
    "workflow_patch": write_workflow_patch,
    "workflow_effect": write_workflow_effect,
    "approval": write_approval,
    "redaction": write_redaction,
    "row_redaction": write_row_redaction,
    "settlement": write_settlement,
}
OnRecord = Callable[[Entry], None]


class MlflowView:
    """One home's log as one server shows it. One process at a time should write; the follower of `up` is it."""

    def __init__(self, trail: Trail, tracking_uri: str, *, cursor_file: Path | None = None) -> None:
        self.trail = trail
        self.uri = tracking_uri.rstrip("/")
        self.cursor = Cursor(cursor_file or trail.home / CURSOR_FILE)
        self._context: ViewContext | None = None

    def sync(self, on_record: OnRecord | None = None) -> int:
        """Write what the log has and the view has not; return how many records that were.

        Raises:
            ViewUnavailable: the server does not answer. What was written stays, the next sync goes on from there.
            ViewRefused: the experiment on the server shows another log.
        """
        retry = self._context is None
        context = self._connect()
        num_written = self._write_asides(context) if retry else 0
        for entry in self.trail.entries(start=self.cursor.next_index):
            if self._write(context, entry):
                num_written += 1
                if on_record is not None:
                    on_record(entry)
            self.cursor.advance(entry.index + 1)
        return num_written

    def follow(self, stop: threading.Event, *, interval_s: float = 1.0, on_record: OnRecord | None = None) -> None:
        """Sync every `interval_s` until `stop` is set, waiting longer and longer while the server is away."""
        pause_s = interval_s
        while not stop.is_set():
            try:
                if self.cursor.next_index < self._log_size() or self._context is None:
                    self.sync(on_record)
                pause_s = interval_s
            except ViewUnavailable as error:
                self._context = None
                pause_s = min(LAST_RETRY_S, max(FIRST_RETRY_S, pause_s * 2))
                logger.warning("%s; trying again in %.0f s", error, pause_s)
            stop.wait(pause_s)

    def reconcile(self, *, repair: bool = True) -> list[Difference]:
        """Compare the server with the log and return what differs, after mending it when `repair` is set.

        An emptied server is filled from nothing first. Mending writes missing entities again and sets altered tags
        back; entities that no record stands behind are reported, not removed.
        """
        if repair:
            self.sync()
        context = self._connect()
        with translated_errors(self.uri):
            found = differences(context)
        if not repair:
            return found
        self._write_asides(context)
        with translated_errors(self.uri):
            for item in found:
                item.clear(context)
        for leaf in dict.fromkeys(item.leaf for item in found if item.leaf and item.problem != "unknown"):
            self.cursor.forget(leaf)
            self._write(context, self.trail.entry(leaf))
        with translated_errors(self.uri):
            for item in found:
                item.mend(context)
            return differences(context)

    def asides(self) -> list[Aside]:
        """Return the records that the server refused."""
        return self.cursor.asides()

    def close(self) -> None:
        """Close the cursor."""
        self.cursor.close()

    def _log_size(self) -> int:
        self.trail.refresh()
        return self.trail.log.size

    def _connect(self) -> ViewContext:
        """Return the context; a new server, or one that was emptied, starts at the log's first entry."""
        with translated_errors(self.uri):
            server = self._context.server if self._context is not None else MlflowServer(self.uri)
            self.cursor.bind(server.connect(str(self.trail.log.key)))
            if self._context is None:
                self.cursor.experiment = server.experiment_id
                server.client.set_experiment_tag(server.experiment_id, TAG_NOTE, EXPERIMENT_NOTE)
                server.client.set_experiment_tag(server.experiment_id, VIEW_TAG, provenance_view())
                lineage = Lineage(self.trail)
                pages = LineagePages(self.trail, lineage)
                self._context = ViewContext(self.trail, lineage, pages, server, self.cursor)
        return self._context

    def _write_asides(self, context: ViewContext) -> int:
        """Try the refused records again (the program may have learned since) and return how many were written."""
        return sum(self._write(context, self.trail.entry(aside.log_index)) for aside in self.cursor.asides())

    def _write(self, context: ViewContext, entry: Entry) -> bool:
        """Write one record; False when it has no place in MLflow, was erased, or was refused and set aside."""
        writer = WRITERS.get(entry.leaf.kind)
        if writer is None or entry.record is None:
            return False
        refusal = ""
        for _ in range(NUM_TRIES):
            try:
                with translated_errors(self.uri):
                    writer(context, entry)
            except ViewUnavailable:
                raise
            except UNSHOWABLE as error:
                self.cursor.forget(entry.leaf_hash)  # perhaps a user deleted the run: look again by tag
                refusal = str(error)
            else:
                self.cursor.take_back(entry.index)
                return True
        logger.error("log entry %d (%s) set aside: %s", entry.index, entry.leaf.kind, refusal)
        self.cursor.set_aside(entry.index, refusal)
        return False
