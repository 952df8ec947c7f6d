"""Freed memory goes back to the system while the server runs."""

import asyncio

from greenroom.server import memory


def test_memory_is_trimmed_now_and_then_and_no_longer(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(memory, "_trim_function", lambda: calls.append)

    async def run() -> int:
        async with memory.trimmed(0.005):
            while len(calls) < 2:
                await asyncio.sleep(0.005)
        seen = len(calls)
        await asyncio.sleep(0.05)
        return seen

    seen = asyncio.run(run())
    assert seen >= 2
    assert len(calls) == seen
    assert set(calls) == {0}


def test_nothing_is_asked_of_a_library_without_it(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_trim_function", lambda: None)

    async def run() -> None:
        async with memory.trimmed(0.0):
            await asyncio.sleep(0.01)

    asyncio.run(run())
