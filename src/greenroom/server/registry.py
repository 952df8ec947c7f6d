"""The models this server offers: which there are, which are loaded, who is using them.

A model is loaded on its first request, in a worker, and unloaded when nobody has used it for
a while or when another one needs its place.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from greenroom.server.errors import ApiError
from greenroom.server.served import Served
from greenroom.server.settings import ServerSettings
from greenroom.server.source import ModelSource

log = logging.getLogger("greenroom.server")
WAIT_SECONDS = 30.0  # for a place when every loaded model is busy


class Registry:
    """Models by name.

    Args:
        sources: what may be loaded.
        load: makes an engine of a source; called in a worker thread.
        settings: how many stay loaded, and for how long.
    """

    def __init__(
        self,
        sources: Iterable[ModelSource],
        load: Callable[[ModelSource], Any],
        settings: ServerSettings,
    ) -> None:
        self.sources = {source.name: source for source in sources}
        self.loaded: dict[str, Served] = {}
        self.settings = settings
        self.workers = ThreadPoolExecutor(settings.workers, thread_name_prefix="greenroom-server")
        self._load = load
        self._changed = asyncio.Condition()
        self._loading = asyncio.Lock()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, engine: Any, name: str, settings: ServerSettings) -> "Registry":
        """A registry of one model that is loaded already and stays so."""

        def load(source: ModelSource) -> Any:
            return engine

        registry = cls([ModelSource(name, None)], load, settings)
        registry.adopt(name, engine)
        return registry

    def resolve(self, name: str | None) -> ModelSource:
        """The source a client means; without a name, the only one.

        Raises:
            ApiError: 404, there is none of that name; 400, no name and several models.
        """
        if name is None:
            if len(self.sources) == 1:
                return next(iter(self.sources.values()))
            raise ApiError(400, "model: name one of " + self._names(), field="model")
        for candidate in (name, name.removesuffix(":latest")):
            if candidate in self.sources:
                return self.sources[candidate]
        message = f"model {name!r} does not exist; there is {self._names()}"
        raise ApiError(404, message, field="model", code="model_not_found")

    def _names(self) -> str:
        names = sorted(self.sources)
        return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"

    async def lease(self, name: str | None) -> Served:
        """The model, loaded, kept so until it is released.

        Raises:
            ApiError: there is no such model, or no place for it.
            GreenroomError: it cannot be loaded.
        """
        source = self.resolve(name)
        served = self.loaded.get(source.name)
        if served is None:
            async with self._loading:
                served = self.loaded.get(source.name)
                if served is None:
                    served = await self._load_in_place(source)
        served.users += 1
        served.expires = None
        if timer := self._timers.pop(served.name, None):
            timer.cancel()
        return served

    async def _load_in_place(self, source: ModelSource) -> Served:
        await self._make_room()
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        engine = await loop.run_in_executor(self.workers, self._load, source)
        log.info("loaded %s in %.1f s", source.name, time.perf_counter() - started)
        served = self.adopt(source.name, engine)
        await served.in_worker(served.grammars.prepare)
        return served

    async def prepare(self) -> None:
        """Prepares the models that were loaded before."""
        for served in self.loaded.values():
            await served.in_worker(served.grammars.prepare)

    def adopt(self, name: str, engine: Any) -> Served:
        """Takes in an engine that is loaded already, under a source's name."""
        served = Served(name, engine, self.workers, self.settings.queue)
        self.loaded[name] = served
        return served

    async def _make_room(self) -> None:
        """Unloads the model idle longest, waiting a while if none is idle."""
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.loaded) >= self.settings.max_loaded:
            idle = [served for served in self.loaded.values() if not served.users]
            if idle:
                await self.unload(idle[0])
                continue
            try:
                async with self._changed:
                    left = deadline - time.monotonic()
                    await asyncio.wait_for(self._changed.wait(), max(0.0, left))
            except TimeoutError:
                raise ApiError(
                    503,
                    f"all of --max-loaded {self.settings.max_loaded} models are busy",
                    headers={"Retry-After": "30"},
                ) from None

    def release(self, served: Served, keep_alive: float | None = None) -> None:
        """Ends a lease; starts the clock of `keep_alive` when it was the last.

        Args:
            keep_alive: seconds; negative for ever, None for the server's setting.
        """
        served.users -= 1
        if served.users or self.loaded.get(served.name) is not served:
            return
        self.loaded[served.name] = self.loaded.pop(served.name)  # used last: at the end
        seconds = self.settings.keep_alive if keep_alive is None else keep_alive
        self._start(self._tell())
        if seconds is None or seconds < 0 or self.sources[served.name].path is None:
            return
        served.expires = time.time() + seconds
        loop = asyncio.get_running_loop()
        self._timers[served.name] = loop.call_later(seconds, self._expire, served)

    def _expire(self, served: Served) -> None:
        self._timers.pop(served.name, None)
        if not served.users and self.loaded.get(served.name) is served:
            self._start(self.unload(served))

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def unload(self, served: Served) -> None:
        """Closes a model's engine and frees its memory."""
        if self.loaded.get(served.name) is not served:
            return
        del self.loaded[served.name]
        if timer := self._timers.pop(served.name, None):
            timer.cancel()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.workers, served.engine.close)
        log.info("unloaded %s", served.name)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Each loaded engine's stats."""
        return {name: dict(served.engine.stats()) for name, served in self.loaded.items()}

    async def close(self) -> None:
        """Unloads everything."""
        for served in list(self.loaded.values()):
            await self.unload(served)
        self.workers.shutdown(wait=False, cancel_futures=True)
