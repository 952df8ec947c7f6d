"""What commands show: a progress bar while loading, an answer as it comes, a table at the end.

Answers go to standard output, everything else to standard error, where a pipe stays quiet.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from greenroom.commands.progress import bytes_progress

if TYPE_CHECKING:
    from greenroom.engine import LLM, TokenOutput

errors = Console(stderr=True, highlight=False)

PREPARING = "preparing the GPU"
FIRST = ": compiling kernels, the first time takes longer"

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@contextmanager
def loaded(path: Path, **settings: Any) -> "Iterator[LLM]":
    """A model, loaded while `loading_shown` says how far it is; closed at the end."""
    with loading_shown(path.name) as (progress, preparing):
        from greenroom.engine import LLM, EngineConfig
        from greenroom.engine.load import load_engine

        config = EngineConfig(**settings)
        llm = LLM.from_engine(load_engine(path, config, progress, preparing=preparing))
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def loading_shown(name: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[], None]]]:
    """What `load_engine` takes as `progress` and `preparing`: a bar on standard error, then a line
    in its place, until the block is left; nothing if nobody is looking."""
    with ExitStack() as shown:
        progress = shown.enter_context(bytes_progress(f"loading {name}"))

        def preparing() -> None:
            shown.close()
            shown.enter_context(preparing_shown())

        yield progress, preparing


@contextmanager
def preparing_shown() -> Iterator[None]:
    """A line on standard error says that a GPU is prepared, and from the first kernel on that was
    not in Triton's cache, why it takes longer than another time."""
    if not errors.is_terminal:
        yield
        return
    with errors.status(PREPARING) as line, compilations(lambda: line.update(PREPARING + FIRST)):
        yield


def awaited(outputs: "Iterator[TokenOutput]") -> "Iterator[TokenOutput]":
    """The outputs. While the first is waited for, a line says if kernels are compiled, which a
    GPU's first answers need some seconds for."""
    with compiling_shown():
        first = next(outputs, None)
    if first is not None:
        yield first
        yield from outputs


@contextmanager
def compiling_shown() -> Iterator[None]:
    """From the first kernel on that was not in Triton's cache, a line on standard error says so
    until the block is left, if somebody is looking."""
    if not errors.is_terminal:
        yield
        return
    line, lock, over = errors.status("compiling kernels for this GPU (once)"), Lock(), Event()

    def compiled() -> None:  # called by the engine's thread
        with lock:
            if not over.is_set():
                line.start()

    with compilations(compiled):
        try:
            yield
        finally:
            with lock:
                over.set()
                line.stop()


@contextmanager
def compilations(compiled: Callable[[], None]) -> Iterator[None]:
    """Within the block `compiled` is called after each kernel that was not in Triton's cache, by
    the thread that needed it."""
    knobs: Any = sys.modules.get("triton.knobs")  # of a process that uses a GPU
    if knobs is None:
        yield
        return
    before = knobs.compilation.listener

    def listen(*, cache_hit: bool, **told: Any) -> None:
        if before is not None:
            before(cache_hit=cache_hit, **told)
        if not cache_hit:
            compiled()

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before


class Writer:
    """Writes an answer to standard output as it comes: content plain, reasoning dim and only
    on a terminal.

    Args:
        parser: tells content and reasoning apart; None if all is content.
        quiet: collect only.
    """

    def __init__(self, parser: Any = None, quiet: bool = False) -> None:
        self.parser = parser
        self.quiet = quiet
        self.content = ""
        self.colour = sys.stdout.isatty()
        self.last = "content"

    def push(self, output: "TokenOutput") -> None:
        """Writes what one token completed."""
        if self.parser is None:
            self._write("content", output.text)
            return
        for delta in self.parser.push(output.token_id, output.text):
            self._delta(delta)

    def finish(self) -> None:
        """Writes what was held back, and ends the line."""
        for delta in self.parser.finish() if self.parser is not None else ():
            self._delta(delta)
        if not self.quiet:
            print(flush=True)

    def _delta(self, delta: Any) -> None:
        name = f"\n[{delta.name}] " if delta.name else ""
        self._write(delta.kind, name + delta.text)

    def _write(self, kind: str, text: str) -> None:
        if kind != "reasoning":
            self.content += text
        if self.quiet or not text or (kind == "reasoning" and not self.colour):
            return
        if kind != self.last and "reasoning" in (kind, self.last) and self.last_written:
            sys.stdout.write("\n\n")
        self.last, self.last_written = kind, True
        dim = kind == "reasoning" and self.colour
        sys.stdout.write(f"{_DIM}{text}{_PLAIN}" if dim else text)
        sys.stdout.flush()

    last_written = False


@dataclass
class Measured:
    """Tokens and times of one answer."""

    prompt_tokens: int
    started: float = field(default_factory=time.perf_counter)  # seconds
    cached_tokens: int = 0
    times: list[float] = field(default_factory=list)  # of each token, perf_counter seconds
    finish_reason: str = "interrupted"

    def note(self, output: "TokenOutput") -> None:
        """Takes note of a token."""
        self.times.append(output.time)
        self.cached_tokens = output.cached_tokens
        self.finish_reason = output.finish_reason or self.finish_reason

    def figures(self) -> dict[str, Any]:
        """What was measured; None where there was too little to measure."""
        first = self.times[0] - self.started if self.times else None
        spent = self.times[-1] - self.times[0] if len(self.times) > 1 else None
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": len(self.times),
            "finish_reason": self.finish_reason,
            "time_to_first_token_s": first,
            "prompt_tokens_per_s": (self.prompt_tokens - self.cached_tokens) / first
            if first
            else None,
            "generation_tokens_per_s": (len(self.times) - 1) / spent if spent else None,
        }


def show_figures(figures: dict[str, Any], memory: dict[str, int]) -> None:
    """The table after an answer, on standard error."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    cached = figures["cached_tokens"]
    reused = f" ({cached} reused)" if cached else ""
    reason = figures["finish_reason"]
    ended = reason if reason == "interrupted" else f"ended by {reason}"
    rows = {
        "prompt": f"{figures['prompt_tokens']} tokens{reused}, "
        f"{_number(figures['prompt_tokens_per_s'])} tokens/s",
        "generated": f"{figures['generated_tokens']} tokens, "
        f"{_number(figures['generation_tokens_per_s'])} tokens/s, {ended}",
        "first token": f"{_number(figures['time_to_first_token_s'], 3)} s",
        "memory": ", ".join(f"{name} {size(count)}" for name, count in memory.items()),
    }
    for name, text in rows.items():
        if not text:
            continue
        table.add_row(name.replace("_", " "), text.replace("_", " "), style="dim")
    errors.print(table)


def tell(line: str) -> None:
    """What a command is at, dim, on standard error, if somebody is looking."""
    if errors.is_terminal:
        errors.print(line, style="dim", markup=False)


def show_placement(llm: "LLM", trace: str | None = None) -> None:
    """Says on standard error who computes what, and why, if somebody is looking."""
    placement = llm.engine.placement
    if placement is not None and errors.is_terminal:
        errors.print(placement.reason, style="dim")
        if trace is not None and placement.backend != "cuda":
            errors.print("the trace makes no difference without experts in VRAM", style="dim")


def size(count: int) -> str:
    """Bytes for people."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.{0 if units[0] == 'B' else 1}f} {units[0]}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
