"""Prints what a decode step costs the host: all that Python does between one step and the next,
with a device that computes nothing and is done at once.

`whole`: from one step to the next. `waits`: from the token on the host to the next launch; a
device would stand idle for so long. Where steps are launched early it is none, as long as `whole`
is shorter than what the device computes.
Usage: PYTHONPATH=src python bench/host_step.py [sequences ...] [--profile]
"""

import cProfile
import pstats
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from greenroom import SamplingParams
from greenroom.engine import Engine, EngineConfig, assemble
from greenroom.engine.collect import Collector, Fetch
from greenroom.layers.batch import Batch, KVCache, Launched
from greenroom.layers.decode_graphs import DecodeGraphs, Recorded, addresses_of, widened
from greenroom.layers.staging import Staging

STEPS, REPEATS = 400, 5
VOCABULARY, WIDTH, CONTEXT = 64, 2880, 4096  # logits would be copied by the device
CPU = torch.device("cpu")


class Table:
    """An embedding of which nothing is looked up."""

    def __init__(self, reads: bool) -> None:
        self.reads = reads
        self._rows = torch.zeros(1, WIDTH)

    def rows(self, tokens: Tensor) -> Tensor:
        """A row per token."""
        return self._rows.expand(len(tokens), WIDTH)


class NoDevice:
    """A model with the inputs of gpt-oss-20b whose steps are recorded and computed in no time."""

    def __init__(self, reads: bool) -> None:
        self.chains, self._table = reads, Table(reads)
        self.config = SimpleNamespace(vocabulary_size=VOCABULARY, context_length=CONTEXT)
        self.kv_groups = tuple(SimpleNamespace(window=window) for window in (128, None))
        backend: Any = SimpleNamespace(device=CPU, answering=lambda tokens: nullcontext())
        self._graphs = DecodeGraphs(backend, None)
        self._graphs.usable = True
        self.began: list[float] = []  # launches

    def new_caches(
        self, blocks: Sequence[int], block_size: int, dtype: torch.dtype
    ) -> list[KVCache]:
        """Of no use, but for their shape."""
        return [KVCache(*(torch.zeros(n, 1, block_size, 1) for _ in range(2))) for n in blocks]

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """Zeros; a decode step is recorded from then on."""
        logits = torch.zeros(len(batch.output_rows), VOCABULARY)
        tokens, wide = batch.tokens, widened(batch, CONTEXT // caches[0].k.shape[2])
        first = tokens if self._table.reads else self._table.rows(tokens)
        staging = Staging(CPU, [first, *addresses_of(wide)])
        graph, step = SimpleNamespace(replay=lambda: None), SimpleNamespace()
        best = torch.zeros(len(tokens), dtype=torch.int64)
        for end in (512, 2048, 8192):
            known = Recorded(graph, staging, step, logits, best)  # type: ignore[arg-type]
            self._graphs._graphs[len(tokens), end] = known
        self._graphs._caches = caches
        return logits

    def launch(
        self, batch: Batch, caches: Sequence[KVCache], chosen: Tensor | None = None
    ) -> Launched | None:
        """A step as `Model` launches it."""
        if len(batch.tokens) != len(batch.context_lengths):
            return None
        found = self._graphs.replay(batch, caches, self._table, chosen)  # type: ignore[arg-type]
        self.began.append(time.perf_counter())
        return found

    def prepare(self, batch: Batch, caches: Sequence[KVCache]) -> None:
        """As `Model` does it."""
        self._graphs.prepare(batch, caches)

    def memory(self) -> dict[str, int]:
        """It has none."""
        return {}


class Tokens:
    """Every token is a letter."""

    eog_ids: frozenset[int] = frozenset()

    def stream(self, context: object = ()) -> Any:
        """Decodes one at a time."""
        return SimpleNamespace(push=lambda token: "a", flush=lambda: "")


def measure(model: NoDevice, sequences: int) -> tuple[float, float]:
    """Microseconds per step: `whole` and `waits`."""
    config = EngineConfig(kv_type="f32", threads=1, max_sequences=sequences, context_length=CONTEXT)
    engine: Engine = assemble(model, Tokens(), config)
    engine._runner._collector = Collector(remote=True)
    known: list[float] = []  # when tokens were on the host
    take: Callable[[Fetch], Any] = Fetch.take

    def taken(fetch: Fetch) -> Any:
        found = take(fetch)
        known.append(time.perf_counter())
        return found

    Fetch.take = taken  # type: ignore[method-assign]
    try:
        run(engine, sequences)
    finally:
        Fetch.take = take  # type: ignore[method-assign]
        engine.close()
    whole = statistics.median(b - a for a, b in pairwise(known[20:-20]))
    count = len(model.began) - 1  # each launch but the first needs the token before it
    gaps = [b - a for a, b in zip(known[-count - 1 : -1], model.began[-count:], strict=True)]
    return whole * 1e6, max(0.0, statistics.median(gaps[20:-20])) * 1e6


def run(engine: Engine, sequences: int) -> None:
    """Has so many sequences answered at once."""
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    left, done = [sequences], threading.Event()

    def sink(item: Any) -> None:
        if isinstance(item, Exception) or item.finish_reason:
            left[0] -= 1
            if not left[0]:
                done.set()

    for _ in range(sequences):
        engine.start([1, 2, 3], params, None, sink)
    done.wait()


def main() -> None:
    """Measures, or profiles the engine's thread."""
    torch.set_num_threads(1)  # copies that a device would do are not to wait for other processes
    counts = [int(a) for a in sys.argv[1:] if a.isdigit()] or [1, 4, 16]
    if "--profile" in sys.argv:
        profile(counts[0])
        return
    print("sequences  launched  whole us  waits us")
    for count in counts:
        for reads in (False, True):
            found = [measure(NoDevice(reads), count) for _ in range(REPEATS)]
            whole, waits = (statistics.median(part) for part in zip(*found, strict=True))
            print(f"{count:9}  {'early' if reads else 'after':>8}  {whole:8.0f}  {waits:8.0f}")


def profile(sequences: int) -> None:
    """What the engine's thread spends its time on."""
    profiler, work = cProfile.Profile(), Engine._work
    Engine._work = lambda self: profiler.runcall(work, self)  # type: ignore[method-assign]
    measure(NoDevice(True), sequences)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
