"""Engines to be measured, each in a process of its own, so that memory and load time are its
alone and two can be asked in turn. Knows the engine and the meters, no statistics.
"""

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from greenroom.bench.workloads import Case, Run, run_case
from greenroom.errors import GreenroomError
from greenroom.placement.gpus import nvml, nvml_handle

_SAMPLE_SECONDS = 0.05
_END_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Job:
    """An engine: its name in reports, the file, fields of EngineConfig, and whether to load it
    from the disk first, with the page cache emptied. `explain` has its layers timed.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    cold: bool = False
    explain: bool = False


class Peak:
    """Watches this process's memory: `rss` and `vram` are the largest bytes seen so far.

    VRAM is what the driver counts for the process, with its context; where NVML does not tell
    (or a container hides the process), what the device lost since the watch began.
    """

    def __init__(self) -> None:
        self.rss, self.vram = 0, 0
        self._process = psutil.Process()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        with nvml() as lib:
            handle = nvml_handle(lib)
            before = None if handle is None else int(lib.nvmlDeviceGetMemoryInfo(handle).used)
            while True:
                self.rss = max(self.rss, int(self._process.memory_info().rss))
                if before is not None:
                    self.vram = max(self.vram, _vram(lib, handle, before))
                if self._end.wait(_SAMPLE_SECONDS):
                    return


def _vram(lib: Any, handle: Any, before: int) -> int:
    for process in lib.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid == os.getpid() and process.usedGpuMemory:
            return int(process.usedGpuMemory)
    return max(0, int(lib.nvmlDeviceGetMemoryInfo(handle).used) - before)


def forget(path: Path) -> None:
    """Drops a model's files from the page cache, as far as the system does that."""
    from greenroom.gguf import GGUFFile

    with GGUFFile(path) as file:
        paths = file.paths
    for part in paths:
        with open(part, "rb") as opened, contextlib.suppress(OSError, AttributeError):
            os.fsync(opened.fileno())  # dirty pages would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Session:
    """A loaded model and its meters, in this process.

    Args:
        job: what to load.
    """

    def __init__(self, job: Job) -> None:
        from greenroom.engine import LLM

        self.peak = Peak()
        self.load: dict[str, float] = {}
        if job.cold:
            forget(job.path)
            self.load["cold"] = self._open(LLM, job)
            self.llm.close()
            del self.llm
            gc.collect()
        self.load["warm"] = self._open(LLM, job)
        if job.explain:
            self.llm.engine.meter()

    def _open(self, engine: Any, job: Job) -> float:
        begin = time.perf_counter()
        self.llm = engine(job.path, **job.settings)
        return time.perf_counter() - begin

    def run(self, case: Case, seed: int) -> Run:
        """One run, with the energy it took."""
        with energy() as spent:
            found = run_case(self.llm, case, seed)
        return replace(found, joules=spent[0])

    def facts(self) -> dict[str, Any]:
        """Load times, memory by tier, hits: what has been seen until now."""
        import torch

        cuda: Any = torch.cuda
        reserved = cuda.max_memory_reserved() if cuda.is_initialized() else 0
        stats = self.llm.engine.stats()
        return {
            "load_seconds": self.load,
            "memory": stats["memory"],
            "peak_rss": self.peak.rss,
            "peak_vram": self.peak.vram,
            "peak_vram_torch": reserved,
            "experts": stats.get("experts"),
            "layers": stats.get("layers"),
            "threads": self.llm.engine.config.threads,
            "backend": self.llm.engine.config.backend,
            "context_length": self.llm.engine.config.context_length,
            "placement": self._placement(),
        }

    def _placement(self) -> dict[str, Any] | None:
        found = self.llm.engine.placement
        return None if found is None else asdict(found)

    def close(self) -> None:
        """Frees the model."""
        self.llm.close()
        self.peak.close()


@contextlib.contextmanager
def energy() -> Iterator[list[float | None]]:
    """A list whose one item becomes the joules the GPU spent in the block, None if unknown."""
    spent: list[float | None] = [None]
    with nvml() as lib:
        before = _millijoules(lib)
        yield spent
        after = _millijoules(lib)
    if before is not None and after is not None:
        spent[0] = (after - before) / 1e3


def _millijoules(lib: Any) -> int | None:
    with contextlib.suppress(Exception):  # no GPU, or one that does not count
        return int(lib.nvmlDeviceGetTotalEnergyConsumption(nvml_handle(lib)))
    return None


class Remote:
    """A `Session` in a process of its own, which starts at once: programs take seconds to import
    and others may be loading meanwhile. `load` comes before everything else.

    Args:
        job: what to load there.
    """

    def __init__(self, job: Job) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def load(self) -> None:
        """Loads the model.

        Raises:
            GreenroomError: it cannot be loaded; with that process's message.
        """
        self._expect()  # until it has imported what it needs
        self._ask(("load",))

    def run(self, case: Case, seed: int) -> Run:
        """See `Session.run`."""
        found: Run = self._ask(("run", case, seed))
        return found

    def facts(self) -> dict[str, Any]:
        """See `Session.facts`."""
        found: dict[str, Any] = self._ask(("facts",))
        return found

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError, EOFError):
            self._pipe.send(None)
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, task: tuple[Any, ...]) -> Any:
        self._pipe.send(task)
        return self._expect()

    def _expect(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise GreenroomError("the measured process ended; is there enough memory?") from None
        if kind == "error":
            raise GreenroomError(value)
        return value


def _serve(pipe: Connection, job: Job) -> None:
    session = None
    try:
        import greenroom.engine  # noqa: F401 - takes seconds, and is no part of loading

        pipe.send(("there", None))
        if pipe.recv() is None:
            return
        session = Session(job)
        pipe.send(("ready", None))
        while (task := pipe.recv()) is not None:
            pipe.send(("done", getattr(session, task[0])(*task[1:])))
    except (GreenroomError, OSError, MemoryError) as error:
        pipe.send(("error", str(error) or "out of memory"))
    except (KeyboardInterrupt, EOFError):
        pass  # the parent says what there is to say
    finally:
        if session is not None:
            session.close()
