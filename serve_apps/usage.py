"""From a finished completion to its receipt in the log, off the request path.

`note` writes the facts to the spool and returns; a thread hands batches to the log and removes them from the spool when
the log has them. A log that is away is tried again until it answers; when too many receipts wait, new requests are
refused, so that none is ever served without one. A row the log will never take is set aside in the spool and holds up
no other.
"""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from configs.errors import UserError
from serve_apps.calls import Answer, Call
from serve_apps.spool import Segment, Spool, SpooledRow

logger = logging.getLogger(__name__)

MAX_BATCH = 256  # most rows of one record; as many are flushed at once, without waiting for the clock
MAX_WAITING = 20_000  # rows without a log before requests are refused; about 60 MB of spool at 3 kB each
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 10.0


class RowsRefused(UserError):
    """The log will never take these rows, however often they are sent."""


class ReceiptLog(Protocol):
    """Where receipts go. Both calls return when the log has them and raise when it is not known to.

    Both may be repeated after a lost reply: what the log has is not recorded again. RowsRefused when repeating is
    useless.
    """

    def append(self, rows: Sequence[SpooledRow]) -> None:
        """Append one batch, at most MAX_BATCH rows of any replicas."""

    def adapter_loaded(self, adapter: str) -> None:
        """Record that this replica loaded an adapter."""


@dataclass(frozen=True)
class Server:
    """What is the same in every receipt of a replica."""

    replica: str
    base_digest: str


def receipt_row(call: Call, answer: Answer, *, server: Server) -> SpooledRow:
    """Return the receipt of one completion. The adapter's name and record are given only if it is the one that ran."""
    ran = call.adapter if call.adapter is not None and call.adapter.digest == answer.adapter_digest else None
    receipt: dict[str, Any] = {
        "v": 1,
        "id": call.receipt_id,
        "time_us": call.time_us,
        "model": call.model,
        "base": server.base_digest,
        "adapter": answer.adapter_digest,
        "adapter_name": ran.name if ran else None,
        "adapter_record": ran.record if ran else None,
        "prompt_version": call.prompt_version,
        "retrieved": [],
        "request_digest": call.request_digest,
        "output_digest": answer.output_digest,
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_completion_tokens,
        "finish_reason": answer.finish_reason,
        "replica": server.replica,
        "tenant": call.tenant,
    }
    content = {
        **call.content,
        "prompt_token_ids": list(call.prompt_token_ids),
        "output_text": answer.text,
        "output_token_ids": list(answer.token_ids),
    }
    return SpooledRow(receipt, secrets.token_bytes(32), content)


class Receipts:
    """Takes completions from the event loop and gives them to the log from a thread of its own."""

    def __init__(self, log: ReceiptLog, spool: Spool, *, owner: str, flush_s: float) -> None:
        self._log, self._spool, self._owner, self._flush_s = log, spool, owner, flush_s
        self._changed = threading.Condition()
        self._segment: Segment | None = None
        self._rows: list[SpooledRow] = []
        self._loads: list[str] = []
        self._loaded: set[str] = set()
        self._num_in_flight = 0
        self._give_up_at: float | None = None  # monotonic seconds; set by close
        self._thread = threading.Thread(target=self._run, name="receipts", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Receipts and adapter loads the log does not have yet."""
        with self._changed:
            return self._count()

    @property
    def is_full(self) -> bool:
        """Whether requests must be refused until the log is back."""
        return self.num_waiting >= MAX_WAITING

    def note(self, row: SpooledRow) -> Segment:
        """Write one receipt to the spool, queue it and return its segment: `sync` that before the answer goes out.

        OSError when it cannot be written: then the answer must not go out.
        """
        with self._changed:
            if self._segment is None:
                self._segment = self._spool.open_segment(self._owner)
            self._segment.append(row)
            self._rows.append(row)
            self._changed.notify_all()
            return self._segment

    def note_adapter(self, adapter: str) -> None:
        """Queue the record that this replica loaded `adapter`, once per adapter."""
        with self._changed:
            if adapter not in self._loaded:
                self._loaded.add(adapter)
                self._loads.append(adapter)
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the log has everything noted; False when it does not within `timeout_s` (the spool keeps it)."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count() == 0, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Flush and stop; False when the log did not take all: the spool keeps that for the next start."""
        with self._changed:
            self._give_up_at = time.monotonic() + timeout_s
            self._changed.notify_all()
        self._thread.join(timeout=timeout_s + 5.0)
        with self._changed:
            if self._segment is not None:
                self._segment.close()
                self._segment = None
            return self._count() == 0

    def _count(self) -> int:
        return len(self._rows) + len(self._loads) + self._num_in_flight

    def _run(self) -> None:
        for orphan in self._spool.orphans():
            self._deliver(orphan.rows(), orphan)
        while self._wait_for_work():
            with self._changed:
                rows, segment, loads = self._rows, self._segment, self._loads
                self._rows, self._segment, self._loads = [], None, []
                self._num_in_flight = len(rows) + len(loads)
            for adapter in loads:
                self._deliver_load(adapter)
            undelivered = 0 if self._deliver(rows, segment) else len(rows)
            with self._changed:
                self._num_in_flight = undelivered
                self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait for a first item, then for more until the clock or the batch is full; False when closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._loads or self._give_up_at)
            if not self._give_up_at:
                self._changed.wait_for(lambda: len(self._rows) >= MAX_BATCH or self._give_up_at, self._flush_s)
            return bool(self._rows or self._loads) and not self._is_given_up()

    def _deliver(self, rows: Sequence[SpooledRow], segment: Segment | None) -> bool:
        """Send one segment's rows until accepted; the segment stays on disk when we are told to stop before."""
        starts = range(0, len(rows), MAX_BATCH)
        accepted = all(self._deliver_batch(rows[start : start + MAX_BATCH]) for start in starts)
        if segment is not None:
            segment.discard() if accepted else segment.close()
        return accepted

    def _deliver_batch(self, rows: Sequence[SpooledRow]) -> bool:
        """Send one batch; of a refused one each half, until the rows at fault stand alone and are set aside."""
        try:
            return self._until_accepted(lambda: self._log.append(rows))
        except RowsRefused as refusal:
            reason = str(refusal)
        if len(rows) == 1:
            return self._until_accepted(lambda: self._set_aside(rows[0], reason))
        middle = len(rows) // 2
        return self._deliver_batch(rows[:middle]) and self._deliver_batch(rows[middle:])

    def _set_aside(self, row: SpooledRow, reason: str) -> None:
        path = self._spool.refuse(row)
        logger.error("THE LOG REFUSED A RECEIPT, which is kept in %s: %s: %s", path, row.receipt_id, reason)

    def _deliver_load(self, adapter: str) -> None:
        try:
            self._until_accepted(lambda: self._log.adapter_loaded(adapter))
        except RowsRefused as error:
            logger.error("the log refused the load of adapter %s: %s", adapter, error)

    def _until_accepted(self, send: Callable[[], None]) -> bool:
        """Call `send` until it returns, waiting longer after each failure; False when closing ends first.

        Passes RowsRefused on.
        """
        delay_s = FIRST_RETRY_S
        for attempt in itertools.count():
            try:
                send()
                return True
            except RowsRefused:
                raise
            except Exception as error:  # the log is behind a network: whatever failed, the receipts must wait, not die
                logger.warning(
                    "the log did not take receipts (attempt %d): %s: %s", attempt + 1, type(error).__name__, error
                )
            with self._changed:
                self._changed.wait_for(self._is_given_up, delay_s if self._give_up_at is None else FIRST_RETRY_S)
                if self._is_given_up():
                    return False
            delay_s = min(2 * delay_s, LAST_RETRY_S)
        raise AssertionError("itertools.count ends never")

    def _is_given_up(self) -> bool:
        return self._give_up_at is not None and time.monotonic() >= self._give_up_at
