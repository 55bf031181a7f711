"""Threads' requests, committed together: one fsync for all that came while the last one ran.

Requests queue up. The thread whose request stands first commits all that wait then, its own among them, hands each
its result and lets the next one lead. Threads that were served together tend to come back together: a leader waits for
as many as the last group had, at most twice as long as that commit took: two groups that take turns cost two commits.
So a lone thread waits for nobody.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

Request = TypeVar("Request")
Result = TypeVar("Result")


class _Ticket(Generic[Request, Result]):
    """A request that waits, and what became of it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_done = False
        self.outcome: Result | Exception | None = None


class GroupCommit(Generic[Request, Result]):
    """`commit` takes requests and returns as many outcomes; an Exception among them is its own request's alone.

    When `commit` raises, every request of the group gets that error.
    """

    def __init__(
        self, commit: Callable[[Sequence[Request]], Sequence[Result | Exception]], *, max_requests: int
    ) -> None:
        self._commit, self._max_requests = commit, max_requests
        lock = threading.Lock()
        self._changed, self._arrived = threading.Condition(lock), threading.Condition(lock)
        self._last_size, self._last_s = 1, 0.0
        self._waiting: deque[_Ticket[Request, Result]] = deque()
        self._is_led = False

    def submit(self, request: Request) -> Result:
        """Return the result of a request once the group it fell into was committed; raise what it failed with."""
        (outcome,) = self.submit_each([request])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def submit_each(self, requests: Sequence[Request]) -> list[Result | Exception]:
        """Return for each of some requests, which queue up together, its result or what it failed with."""
        tickets: list[_Ticket[Request, Result]] = [_Ticket(request) for request in requests]
        with self._changed:
            self._waiting.extend(tickets)
            self._arrived.notify()
        try:
            for ticket in tickets:
                if group := self._group_to_lead(ticket):
                    self._lead(group)
        except BaseException:  # interrupted: requests that nobody commits yet are taken back
            with self._changed:
                self._waiting = deque(ticket for ticket in self._waiting if ticket not in tickets)
                self._changed.notify_all()
            raise
        return [cast("Result | Exception", ticket.outcome) for ticket in tickets]

    def _group_to_lead(self, ticket: _Ticket[Request, Result]) -> list[_Ticket[Request, Result]]:
        """Wait until a ticket is done, and return nothing, or first in an idle queue, and return the group to lead."""
        with self._changed:
            self._changed.wait_for(lambda: ticket.is_done or self._may_lead(ticket))
            if ticket.is_done:
                return []
            self._is_led = True
            try:
                self._arrived.wait_for(lambda: len(self._waiting) >= self._last_size, self._last_s * 2)
            except BaseException:
                self._is_led = False
                raise
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_requests))]

    def _may_lead(self, ticket: _Ticket[Request, Result]) -> bool:
        return not self._is_led and bool(self._waiting) and self._waiting[0] is ticket

    def _lead(self, group: Sequence[_Ticket[Request, Result]]) -> None:
        """Commit a group, the caller's request first among it."""
        interrupted = RuntimeError("the commit was interrupted: its outcome is unknown")
        outcomes: Sequence[Result | Exception] = [interrupted] * len(group)
        began = time.monotonic()
        try:
            outcomes = self._commit([ticket.request for ticket in group])
        except Exception as error:
            outcomes = [error] * len(group)
        finally:
            with self._changed:
                for ticket, outcome in zip(group, outcomes, strict=True):
                    ticket.outcome, ticket.is_done = outcome, True
                self._is_led = False
                self._last_size, self._last_s = len(group), time.monotonic() - began
                self._changed.notify_all()
