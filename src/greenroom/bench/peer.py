"""Times a model here and in llama.cpp (through `xllamacpp`), side by side in one run.

Each engine lives in a process of its own with the same file and the same number of threads;
requests alternate, so that both see the same machine. Only one works at a time. Rates come from
time stamps here and from llama.cpp's own `timings` there.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from greenroom.errors import GreenroomError

Answer = Callable[[list[int], int], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Workload:
    """What one round asks of both engines."""

    prompt: int = 512  # tokens
    generate: int = 64
    rounds: int = 5
    vocabulary: int = 30_000  # prompt ids are drawn below this


@dataclass(frozen=True, slots=True)
class Rates:
    """Medians over the rounds, tokens per second."""

    prompt: float
    generation: float


def prompt_ids(workload: Workload, round_index: int) -> list[int]:
    """A different prompt every round, so that no prefix cache helps either side."""
    return [
        3 + (7919 * (i + 1) + 104_729 * round_index) % (workload.vocabulary - 3)
        for i in range(workload.prompt)
    ]


def _open_ours(path: Path, threads: int, context: int) -> Answer:
    from greenroom import LLM, SamplingParams

    llm = LLM(path, threads=threads, context_length=context, vram="0")  # as llama.cpp here

    def answer(tokens: list[int], count: int) -> tuple[float, float]:
        import time

        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        times = [output.time for output in llm.stream(tokens, params)]
        prompt = len(tokens) / (times[0] - begin)
        return prompt, (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0

    return answer


def _open_llama_cpp(path: Path, threads: int, context: int) -> Answer:
    import json

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel = context, 1
    params.n_gpu_layers = 0
    params.warmup = True
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def answer(tokens: list[int], count: int) -> tuple[float, float]:
        reply = server.handle_completions(
            {
                "prompt": tokens,
                "n_predict": count,
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": False,
            }
        )
        if isinstance(reply, (str, bytes)):
            reply = json.loads(reply)
        timings = reply["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]

    return answer


OPENERS = {"greenroom": _open_ours, "llama.cpp": _open_llama_cpp}


def _serve(pipe: Connection, engine: str, path: Path, threads: int, context: int) -> None:
    try:
        answer = OPENERS[engine](path, threads, context)
        pipe.send(("ready", None))
        while (task := pipe.recv()) is not None:
            pipe.send(("rates", answer(*task)))
    except (GreenroomError, ImportError, RuntimeError, KeyError) as error:
        pipe.send(("error", f"{engine}: {error}"))


def _expect(pipe: Connection) -> Any:
    kind, value = pipe.recv()
    if kind == "error":
        raise GreenroomError(value)
    return value


def compare(
    path: Path,
    threads: int,
    workload: Workload | None = None,
    engines: Sequence[str] = tuple(OPENERS),
) -> dict[str, Rates]:
    """Medians of the engines on one file; raises GreenroomError if one cannot run it."""
    workload = workload or Workload()
    context = workload.prompt + workload.generate + 64
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for engine in engines:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(
            target=_serve, args=(theirs, engine, path, threads, context), daemon=True
        )
        worker.start()
        theirs.close()
        _expect(ours)
        pipes[engine] = ours
        workers.append(worker)
    seen: dict[str, list[tuple[float, float]]] = {engine: [] for engine in engines}
    for index in range(-1, workload.rounds):  # round -1 warms up
        for engine, pipe in pipes.items():
            pipe.send((prompt_ids(workload, index + 1), workload.generate))
            rates = _expect(pipe)
            if index >= 0:
                seen[engine].append(rates)
    for pipe in pipes.values():
        pipe.send(None)
    for worker in workers:
        worker.join(timeout=30)
    return {
        engine: Rates(*(statistics.median(column) for column in zip(*rates, strict=True)))
        for engine, rates in seen.items()
    }
