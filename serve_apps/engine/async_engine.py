"""The engine behind an event loop: a thread of its own drives the steps, callers take outputs from queues."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from serve_apps.engine.config import AdapterRef, EngineConfig, Output, Request
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import EngineClosed, InvalidRequest

Command = Callable[[], None]
Result = TypeVar("Result")


class _Listener:
    """Where one request's outputs go: a queue of the event loop that asked."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Output | Exception] = asyncio.Queue()

    def put(self, item: Output | Exception) -> bool:
        """Hand an item over from the engine's thread; False when that event loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            return False
        return True


class AsyncEngine:
    """An `Engine` for asyncio callers. Requests are taken up in the order in which `generate` submits them."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the thread and wait until it has loaded the model. Raises as `Engine`."""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._is_closing = threading.Event()
        # The thread that steps loads too: a second one that computes would cost it its waiting OpenMP threads (see
        # `Native.compute_alone`).
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._build_and_drive, args=(config, built), name="trailmark-engine", daemon=True
        )
        self._thread.start()
        self._engine = built.result()

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """The most tokens that prompt and output may have together."""
        return self._engine.max_model_len

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield a request's outputs until the one that is `finished`; leaving early aborts the request.

        Raises what `Engine.add` raises, and EngineClosed. A cold adapter is read on another thread, so that running
        requests go on meanwhile.
        """
        if request.adapter is not None:
            await self._prefetch(request.adapter)
        if request.sampling.grammar is not None:
            await asyncio.to_thread(self._engine.prepare, request)
        listener = _Listener()
        self._submit(lambda: self._add(request, listener))
        is_finished = False
        try:
            while not is_finished:
                item = await listener.items.get()
                if isinstance(item, Exception):
                    is_finished = True
                    raise item
                is_finished = item.finished
                yield item
        finally:
            if not is_finished and not self._is_closing.is_set():
                self._commands.put(lambda: self._drop(request.request_id, listener))

    def abort(self, request_id: str) -> None:
        """End a request; whoever iterates over it gets a last output with finish_reason "abort"."""
        self._submit(lambda: self._abort(request_id))

    async def load(self, ref: AdapterRef) -> None:
        """Make an adapter resident. Raises as `Engine.load`. Running requests go on while it is read."""
        await self._prefetch(ref)
        await self._call(lambda: self._engine.load(ref))

    async def unload(self, digest: str) -> bool:
        """Free an adapter; False when it is not loaded. Raises AdapterInUse while a request runs on it."""
        return await self._call(lambda: self._engine.unload(digest))

    def stats(self) -> dict[str, object]:
        """Return the engine's counters and gauges."""
        return self._engine.stats()

    def close(self) -> None:
        """End the thread and wait for it; requests still running get EngineClosed. A second call does nothing."""
        if not self._is_closing.is_set():
            self._is_closing.set()
            self._commands.put(lambda: None)
        self._thread.join()
        # What slipped in behind the thread's last look must not leave its caller waiting.
        self._take_commands(block=False)

    async def _prefetch(self, ref: AdapterRef) -> None:
        """As `Engine.prefetch`, without a thread that waits for the read; whoever goes away leaves the read alone."""
        pool = self._engine.pool
        if pool.resident_bytes(ref.digest) is None:
            packed = await asyncio.shield(asyncio.wrap_future(pool.start(ref)))
            pool.check_size(ref.digest, packed.data.numel())

    async def _call(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the engine's thread between two steps; return what it returns or raise what it raises."""
        done: Future[Result] = Future()

        def command() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self._submit(command)
        return await asyncio.wrap_future(done)

    def _submit(self, command: Command) -> None:
        if self._is_closing.is_set():
            raise EngineClosed("the engine is closed; build a new one")
        self._commands.put(command)

    def _build_and_drive(self, config: EngineConfig, built: Future[Engine]) -> None:
        try:
            self._engine = Engine(config)
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(self._engine)
        self._drive()

    def _drive(self) -> None:
        """The thread: take commands, step while there is work, wait while there is none."""
        while not self._is_closing.is_set():
            self._take_commands()
            if self._engine.has_unfinished and not self._is_closing.is_set():
                self._step()
        self._take_commands(block=False)
        for request_id in list(self._listeners):
            self._engine.abort(request_id)
            self._listeners.pop(request_id).put(EngineClosed("the engine was closed while the request ran"))

    def _take_commands(self, *, block: bool = True) -> None:
        """Run every command that is there; with no request to run, wait for one."""
        while True:
            try:
                command = self._commands.get(block=block and not self._engine.has_unfinished)
            except queue.Empty:
                return
            command()
            if self._is_closing.is_set():
                block = False

    def _step(self) -> None:
        """One engine step. What it raises is a bug beyond one request: all unfinished ones fail, the thread goes on."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            for request_id in list(self._listeners):
                self._engine.abort(request_id)
                self._listeners.pop(request_id).put(error)
            return
        for output in outputs:
            self._deliver(output)

    def _deliver(self, output: Output) -> None:
        listener = self._listeners.get(output.request_id)
        if listener is None:
            return
        if output.finished:
            del self._listeners[output.request_id]
        if not listener.put(output) and not output.finished:
            self._drop(output.request_id, listener)

    def _add(self, request: Request, listener: _Listener) -> None:
        if self._is_closing.is_set():
            listener.put(EngineClosed("the engine was closed before the request began"))
            return
        if request.request_id in self._listeners:
            listener.put(
                InvalidRequest(f"request_id={request.request_id!r} is in use by an unfinished request; choose another")
            )
            return
        try:
            self._engine.add(request)
        except Exception as error:
            listener.put(error)
        else:
            self._listeners[request.request_id] = listener

    def _abort(self, request_id: str) -> None:
        output = self._engine.abort(request_id)
        if output is not None:
            self._deliver(output)

    def _drop(self, request_id: str, listener: _Listener) -> None:
        """Abort on behalf of a caller that has gone, unless the id has passed to somebody else meanwhile."""
        if self._listeners.get(request_id) is listener:
            del self._listeners[request_id]
            self._engine.abort(request_id)
