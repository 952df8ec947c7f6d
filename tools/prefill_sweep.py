"""Measure prefill with streamed experts under several budgets and shares of the CPU.

    python tools/prefill_sweep.py FILE.gguf [--vram 4GiB 6GiB] [--prompts 512 2048 8192]
        [--operations 0 1 2 3 4 6] [--slots]

For each budget, length and rate the CPU is taken to have for tokens beyond an expert's first 16 (in
1e12 operations a second; 0: it gets no experts; "own": what the engine does): tokens per second,
the median of `--rounds`. Then one more run with events gives milliseconds of a layer: copies,
products on the GPU, from one layer's routes to the next's, the CPU's experts; and how many those
are. Without --slots no expert has a place in VRAM. The last line is one JSON document.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from greenroom import LLM, SamplingParams
from greenroom.engine import load
from greenroom.experts.ring import Ring
from greenroom.experts.share import Rates
from greenroom.experts.stream import GroupMlp, LayerStream


def seconds_of(llm: LLM, length: int, seed: int) -> float:
    """From a prompt of random tokens to its first token."""
    vocabulary = llm.engine.model_config.vocabulary_size
    tokens = np.random.default_rng(seed).integers(0, vocabulary, length).tolist()
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    begin = time.perf_counter()
    times = [output.time for output in llm.stream(tokens, params)]
    return times[0] - begin


class Watch:
    """Pairs of events around calls, by name."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.lent: list[int] = []

    def around(self, name: str, call: Callable[..., Any], copies: bool = False) -> Any:
        """`call`, its time noted on the copy stream of its ring or on the current one."""

        @wraps(call)
        def noted(first: Any, *rest: Any) -> Any:
            stream = first._stream if copies else torch.cuda.current_stream()
            event: Any = torch.cuda.Event
            pair = [event(enable_timing=True) for _ in range(2)]
            pair[0].record(stream)
            found = call(first, *rest)
            pair[1].record(stream)
            self.pairs[name].append((pair[0], pair[1]))
            return found

        return noted

    def lends(self, call: Callable[..., Any]) -> Any:
        """`LayerStream._send`, which is called where experts are lent."""

        @wraps(call)
        def noted(stream: Any, step: Any, hidden: Any, lent: list[int]) -> Any:
            self.lent.append(len(lent))
            return call(stream, step, hidden, lent)

        return noted

    def total(self, name: str) -> float:
        """Milliseconds of all calls."""
        return float(sum(begin.elapsed_time(end) for begin, end in self.pairs[name]))

    def periods(self) -> float:
        """Milliseconds from one layer's routes to the next's, the median."""
        starts = [begin for begin, _ in self.pairs["layers"]]
        steps = [a.elapsed_time(b) for a, b in pairwise(starts)]
        return median(steps) if steps else 0.0


@contextmanager
def watching() -> Iterator[Watch]:
    """Within it, long steps are timed by events."""
    watch = Watch()
    kept = Ring.fetch, GroupMlp.__call__, LayerStream._serve, LayerStream._send
    changed: tuple[Any, ...] = (
        watch.around("copies", kept[0], copies=True), watch.around("products", kept[1]),
        watch.around("layers", kept[2]), watch.lends(kept[3]),
    )  # fmt: skip
    places = ((Ring, "fetch"), (GroupMlp, "__call__"), (LayerStream, "_serve"),
              (LayerStream, "_send"))  # fmt: skip
    for (owner, name), call in zip(places, changed, strict=True):
        setattr(owner, name, call)
    try:
        yield watch
    finally:
        for (owner, name), call in zip(places, kept, strict=True):
            setattr(owner, name, call)


def layer_times(llm: LLM, length: int) -> dict[str, float]:
    """Milliseconds of a layer in one run, and experts the CPU had."""
    model: Any = llm.engine.model
    model.meter()
    with watching() as watch:
        seconds_of(llm, length, 10_000 + length)
        torch.cuda.synchronize()
    layers = max(1, len(watch.pairs["layers"]))
    spent = sum(meter.long.seconds for meter in model.meters.values())
    return {
        "copies": watch.total("copies") / layers,
        "products": watch.total("products") / layers,
        "layer": watch.periods(),
        "cpu": 1e3 * spent / layers,
        "lent": sum(watch.lent) / layers,
    }


def sweep(path: Path, vram: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All lengths and rates of one budget."""
    lines: list[dict[str, Any]] = []
    settings: dict[str, Any] = {
        "backend": "cuda", "vram": vram, "context_length": args.context, "max_sequences": 1,
        "prefix_cache": False,
    }  # fmt: skip
    with LLM(path, **settings) as llm:
        chunk = llm.engine.config.prefill_chunk
        model: Any = llm.engine.model
        share = model.backend.tiers.share
        own, base = share.rates, share.rates or Rates(50e9, 60e9, 1.0)
        least = share.least
        print(f"{vram}: steps of {chunk} tokens, {own}, lent {share.lent}", flush=True)
        for length in args.prompts:
            for rate in args.operations:
                share.rates = own if rate == "own" else replace(base, operations=1e12 * float(rate))
                if rate == "0":
                    share.rates = replace(base, reading=1.0, operations=1.0)
                share.least = least if rate == "own" else 0.0  # rates tell how many the CPU gets
                seconds_of(llm, length, 99)  # compiles what this length needs
                seconds = median(seconds_of(llm, length, seed) for seed in range(args.rounds))
                parts = layer_times(llm, length)
                line = {"vram": vram, "tokens": length, "operations": rate, "seconds": seconds}
                lines.append(line | {"rate": length / seconds} | parts)
                shown = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
                print(f"{vram} {length:5} tokens, CPU {rate:>3}: {length / seconds:7.0f} tokens/s, "
                      f"{seconds:.3f} s; {shown}", flush=True)  # fmt: skip
    peak = torch.cuda.max_memory_reserved() / 2**20
    print(f"{vram}: peak reserved {peak:.0f} MiB", flush=True)
    return lines


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--vram", nargs="+", default=["4GiB", "6GiB"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--operations", nargs="+", default=["0", "1", "2", "3", "4", "6"])
    parser.add_argument("--context", type=int, default=8400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    args = parsed()
    if not args.slots:
        planned = load.planned
        load.planned = lambda *given: replace(planned(*given), slots=0, slot_bytes=0)
    lines = [line for vram in args.vram for line in sweep(args.model, vram, args)]
    print(json.dumps({"model": args.model.name, "lines": lines}))


if __name__ == "__main__":
    main()
