"""Several choices of one request: a call each, side by side, each with its own seed and its own receipt.

A receipt speaks of one answer: one output digest, one finish reason, one text to attribute. So a request for n choices
leaves n receipts with the same request digest; the output digest tells which choice each is of.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Protocol

from attribution.receipts import new_receipt_id
from serve_apps.calls import Answer, Call, Piece
from serve_apps.errors import Problem

# Pieces of all choices that may wait for a slow client; then the choices wait too.
MAX_WAITING_PIECES = 64

IndexedPiece = tuple[int, Piece]


class Answers(Protocol):
    """What is needed of the gateway's `Backend`."""

    async def complete(self, call: Call) -> Answer | Problem:
        """Answer in one piece; cancelling it aborts the request."""

    def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Answer as it is generated; closing the generator aborts the request."""


def split(call: Call, num_choices: int) -> tuple[Call, ...]:
    """Return a call per choice. The first is `call` itself, so n = 1 and choice 0 of n = 5 say the same."""
    others = (
        replace(
            call,
            receipt_id=new_receipt_id(call.time_us),
            sampling=replace(call.sampling, seed=choice_seed(call.sampling.seed, index)),
        )
        for index in range(1, num_choices)
    )
    return (call, *others)


def choice_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of a choice: the request's own for choice 0, else 53 bits of SHA-256 of "seed/index"."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8]) >> 11


async def complete_all(backend: Answers, calls: Sequence[Call]) -> list[Answer] | Problem:
    """Return the answers in the calls' order. The first problem is everyone's: the other calls are aborted."""
    tasks = [asyncio.create_task(backend.complete(call)) for call in calls]
    try:
        for done in asyncio.as_completed(tasks):
            result = await done
            if isinstance(result, Problem):
                return result
        return [answer for task in tasks if isinstance(answer := task.result(), Answer)]
    finally:
        await _end(tasks)


async def stream_all(backend: Answers, calls: Sequence[Call]) -> AsyncGenerator[IndexedPiece, None]:
    """Yield the pieces of all choices as they come; the last is the last Answer, or a Problem.

    Closing it, and a problem of any choice, aborts the calls that still run.
    """
    if len(calls) == 1:
        async with contextlib.aclosing(backend.stream(calls[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    waiting: asyncio.Queue[IndexedPiece | Exception] = asyncio.Queue(MAX_WAITING_PIECES)
    tasks = [asyncio.create_task(_pump(backend, index, call, waiting)) for index, call in enumerate(calls)]
    try:
        num_running = len(calls)
        while num_running:
            item = await waiting.get()
            if isinstance(item, Exception):
                raise item
            num_running -= isinstance(item[1], Answer)
            yield item
            if isinstance(item[1], Problem):
                return
    finally:
        await _end(tasks)


async def _pump(backend: Answers, index: int, call: Call, waiting: "asyncio.Queue[IndexedPiece | Exception]") -> None:
    """Carry one choice's pieces to the queue."""
    try:
        async with contextlib.aclosing(backend.stream(call)) as pieces:
            async for piece in pieces:
                await waiting.put((index, piece))
    except Exception as error:  # belongs to whoever reads the queue
        await waiting.put(error)


async def _end(tasks: Sequence["asyncio.Task[object]"]) -> None:
    """Cancel what still runs and wait until it has let go."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
