"""The engine behind an event loop: streams, errors, cancellation, close."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_apps.engine.async_engine import AsyncEngine
from serve_apps.engine.config import AdapterRef, EngineConfig, Output, Request
from serve_apps.engine.errors import EngineClosed, InvalidRequest, UnknownAdapter
from serve_apps.engine.packed_adapter import PackedAdapter
from tests.serve_apps.engine.engine_cases import engine_for, prompts, ref, request, run, text, tokens


@pytest.fixture
def engine(tiny_base: Path) -> Iterator[AsyncEngine]:
    """A running engine; its thread must be gone afterwards."""
    built = AsyncEngine(EngineConfig(str(tiny_base), max_model_len=400, num_threads=1, max_num_seqs=4))
    yield built
    built.close()
    assert not any(thread.name == "trailmark-engine" and thread.is_alive() for thread in threading.enumerate())


async def collect(stream: AsyncIterator[Output]) -> list[Output]:
    return [output async for output in stream]


async def until(condition: Callable[[], bool]) -> None:
    """Give way to the engine's thread until something holds; the suite's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.001)


def test_concurrent_streams_equal_the_plain_engine(
    engine: AsyncEngine, tiny_base: Path, strong_adapters: dict[str, Path]
) -> None:
    plain = engine_for(tiny_base)
    folders = [None, *strong_adapters.values(), None]
    asked = [
        request(f"r{i}", prompt, None if folder is None else ref(folder))
        for i, (prompt, folder) in enumerate(zip(prompts(plain, 6), folders, strict=True))
    ]
    expected = run(plain, asked)

    async def main() -> list[list[Output]]:
        return await asyncio.gather(*(collect(engine.generate(item)) for item in asked))

    for item, outputs in zip(asked, asyncio.run(main()), strict=True):
        assert tokens(outputs) == tokens(expected[item.request_id])
        assert text(outputs) == text(expected[item.request_id])
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_errors_reach_the_caller_and_nobody_else(engine: AsyncEngine, tmp_path: Path) -> None:
    async def main() -> None:
        good = asyncio.create_task(collect(engine.generate(request("good", [5, 6], max_tokens=20))))
        with pytest.raises(InvalidRequest, match="empty"):
            await collect(engine.generate(request("empty", [])))
        with pytest.raises(UnknownAdapter):
            await collect(engine.generate(request("unknown", [5], ref(tmp_path / "nowhere"))))
        assert (await good)[-1].finish_reason == "length"

    asyncio.run(main())


def long(name: str) -> Request:
    return request(name, [5, 6], max_tokens=390)


def test_leaving_a_stream_aborts_the_request(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.generate(long("left"))
        await anext(stream)
        await stream.aclose()
        await until(lambda: engine.stats()["num_running"] == 0)
        task = asyncio.create_task(collect(engine.generate(long("cancelled"))))
        await until(lambda: engine.stats()["num_running"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats()["num_running"] == 0)
        assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"]
        # The id is free again.
        assert (await collect(engine.generate(request("left", [5], max_tokens=1))))[-1].finished

    asyncio.run(main())


def test_abort_ends_the_stream(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.generate(long("r"))
        await anext(stream)
        engine.abort("r")
        assert (await collect(stream))[-1].finish_reason == "abort"

    asyncio.run(main())


def test_an_id_in_use_is_refused_and_its_owner_unharmed(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.generate(long("r"))
        await anext(stream)
        with pytest.raises(InvalidRequest, match="in use"):
            await collect(engine.generate(request("r", [7])))
        assert (await collect(stream))[-1].finish_reason == "length"

    asyncio.run(main())


def test_a_step_that_breaks_fails_the_running_and_goes_on(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Output]:
        raise RuntimeError("a bug in the step")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine._engine, "step", broken)
            with pytest.raises(RuntimeError, match="a bug in the step"):
                await collect(engine.generate(request("r", [5])))
        assert (await collect(engine.generate(request("r", [5]))))[-1].finish_reason == "length"

    asyncio.run(main())


def test_adapters_load_and_unload(engine: AsyncEngine, strong_adapters: dict[str, Path]) -> None:
    adapter = ref(strong_adapters["strong-r2-mlp"])

    async def main() -> None:
        await engine.load(adapter)
        assert engine.stats()["adapters_resident"] == [adapter.digest]
        assert await engine.unload(adapter.digest) and not await engine.unload(adapter.digest)
        assert engine.stats()["adapter_bytes"] == 0

    asyncio.run(main())


def test_cold_adapters_hold_no_thread_that_others_need(
    engine: AsyncEngine, strong_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many on their way from disk: receipts, which are synced on the loop's threads, go on. Leaving harms no waiter."""
    is_open, folder = threading.Event(), strong_adapters["strong-r1-qv"]
    host: Any = engine._engine.pool._host
    read = host._read

    def gated(adapter: AdapterRef) -> PackedAdapter:
        assert is_open.wait(60)
        return read(adapter)

    monkeypatch.setattr(host, "_read", gated)

    async def main() -> None:
        refs = [AdapterRef(f"sha256:cold{index}", str(folder)) for index in range(40)]
        cold = [
            asyncio.create_task(collect(engine.generate(request(each.digest, [5, 6], each, max_tokens=1))))
            for each in refs
        ]
        leaver = asyncio.create_task(engine.load(refs[39]))
        await until(lambda: engine.stats()["adapters_loading"] == 40)
        leaver.cancel()
        try:
            await asyncio.wait_for(asyncio.to_thread(lambda: None), 10)
        finally:
            is_open.set()
        assert all(outputs[-1].finish_reason == "length" for outputs in await asyncio.gather(*cold))

    asyncio.run(main())


def test_close_ends_streams_and_refuses_new_ones(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.generate(long("r"))
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineClosed):
            await collect(stream)
        with pytest.raises(EngineClosed):
            await collect(engine.generate(request("s", [5])))

    asyncio.run(main())


def test_what_slips_in_while_the_engine_closes_is_answered(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted behind the thread's last look: a request and an unload, neither of which may wait for ever."""

    def slip_in(command: Callable[[], None]) -> None:
        engine._commands.put(command)

    async def main() -> None:
        engine._is_closing.set()
        engine._commands.put(lambda: None)
        engine._thread.join()
        monkeypatch.setattr(engine, "_submit", slip_in)
        late = asyncio.create_task(collect(engine.generate(request("late", [5]))))
        unload = asyncio.create_task(engine.unload("sha256:unknown"))
        await until(lambda: engine._commands.qsize() == 2)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineClosed):
            await late
        assert await unload is False

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_raises_and_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=str(tmp_path)):
        AsyncEngine(EngineConfig(str(tmp_path)))
    assert not any(thread.name == "trailmark-engine" and thread.is_alive() for thread in threading.enumerate())


def test_the_thread_that_steps_has_loaded_the_model(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_apps.engine import async_engine

    loaded_on: list[str] = []

    def engine_on_record(config: EngineConfig) -> object:
        loaded_on.append(threading.current_thread().name)
        return engine_for(tiny_base)

    monkeypatch.setattr(async_engine, "Engine", engine_on_record)
    AsyncEngine(EngineConfig(str(tiny_base))).close()
    assert loaded_on == ["trailmark-engine"]
