"""Who waits for a GPU, until it is prepared or for a first answer, is told so, and nobody else."""

import io
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from greenroom.commands import console, serve
from greenroom.commands.console import awaited, loaded
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.server.source import ModelSource

LOADING, PREPARING = "loading m.gguf", "preparing the GPU"
FIRST = "preparing the GPU: compiling kernels, the first time takes longer"
GONE = "\x1b[2K"  # erases a line
LINE = "compiling kernels for this GPU (once)"
REAL = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

@triton.jit
def nothing(out):
    tl.store(out, 1)

triton.knobs.compilation.listener = lambda *, cache_hit, **told: print(cache_hit)
for _ in range(2):
    compile(ASTSource(nothing, {"out": "*i32"}, {}), target=GPUTarget("cuda", 90, 32))
"""


@pytest.fixture
def compilation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton's settings, as far as they matter here."""
    found = SimpleNamespace(listener=None)
    monkeypatch.setitem(sys.modules, "triton.knobs", SimpleNamespace(compilation=found))
    return found


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool = True) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=written, force_terminal=terminal))
    return written


def answer(compilation: Any, *compiled: bool, fails: bool = False) -> Iterator[Any]:
    """Three outputs; before the first kernels are needed, some of which are in the cache."""
    for there in compiled:
        if compilation.listener is not None:
            compilation.listener(src=None, metadata={}, times=None, cache_hit=there)
    if fails:
        raise KeyboardInterrupt
    yield from "abc"


def test_it_is_said_once_a_kernel_was_not_in_the_cache(compilation, monkeypatch) -> None:
    written, heard = shown(monkeypatch), []
    compilation.listener = before = lambda **told: heard.append(told["cache_hit"])
    outputs = awaited(answer(compilation, True, False, False))
    assert next(outputs) == "a"
    assert LINE in written.getvalue()
    assert written.getvalue().endswith(GONE)  # the line is gone before the answer comes
    assert compilation.listener is before
    assert heard == [True, False, False]
    assert list(outputs) == ["b", "c"]


@pytest.mark.parametrize(("terminal", "there"), [(True, True), (False, False)])
def test_nothing_is_said_of_kernels_in_the_cache_or_where_nobody_looks(
    compilation, monkeypatch, terminal: bool, there: bool
) -> None:
    written = shown(monkeypatch, terminal)
    assert list(awaited(answer(compilation, there))) == ["a", "b", "c"]
    assert LINE not in written.getvalue()


def test_an_answer_that_is_stopped_leaves_no_line_and_no_listener(compilation, monkeypatch) -> None:
    written = shown(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        list(awaited(answer(compilation, False, fails=True)))
    assert written.getvalue().endswith(GONE)
    assert compilation.listener is None


def test_an_answer_of_nothing_is_one(compilation, monkeypatch) -> None:
    shown(monkeypatch)
    assert list(awaited(iter(()))) == []


class Watched(io.StringIO):
    """Standard error; somebody looks at it, or nobody does."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes standard error a terminal, or a pipe."""

    def made(terminal: bool) -> Watched:
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        written = Watched(terminal)
        monkeypatch.setattr(sys, "stderr", written)
        monkeypatch.setattr(console, "errors", Console(stderr=True))
        return written

    return made


class Loads:
    """`load_engine` on a machine with a GPU.

    Args:
        written: standard error.
        compilation: Triton's settings.
        kernels: of each that is needed, whether it is in the cache.
    """

    def __init__(self, written: Watched, compilation: Any, *kernels: bool) -> None:
        self.written, self.compilation, self.kernels = written, compilation, kernels
        self.seen: list[str] = []  # what is on standard error: reading, then preparing, compiling
        self.closed = self.interrupted = False

    def __call__(self, path: Path, config: Any, progress: Any, *, preparing: Any) -> Any:
        progress(5, 5)
        self._look(LOADING)
        preparing()
        self._look(PREPARING)
        for there in self.kernels:
            if self.compilation.listener is not None:
                self.compilation.listener(cache_hit=there)
        if self.interrupted:
            raise KeyboardInterrupt
        self._look(PREPARING if all(self.kernels) else FIRST)
        return self

    def _look(self, wanted: str) -> None:
        """Waits for what is wanted: lines are drawn some times a second, by another thread."""
        deadline = time.monotonic() + 60
        while self.written.terminal and time.monotonic() < deadline:
            if wanted in self.written.getvalue():
                break
            time.sleep(0.01)
        self.seen.append(self.written.getvalue())

    def close(self) -> None:
        self.closed = True


def test_a_bar_makes_way_for_what_a_gpu_needs(compilation, stderr, monkeypatch) -> None:
    loads = Loads(stderr(True), compilation, True, False)
    monkeypatch.setattr("greenroom.engine.load.load_engine", loads)
    with loaded(Path("m.gguf")) as llm:
        assert llm.engine is loads
        reading, preparing, compiling = loads.seen
        assert LOADING in reading
        assert PREPARING not in reading
        assert PREPARING in preparing
        assert GONE in preparing[preparing.rindex(LOADING) : preparing.index(PREPARING)]
        assert FIRST not in preparing
        assert FIRST in compiling
        assert loads.written.getvalue().endswith(GONE)
        assert compilation.listener is None
    assert loads.closed


def test_kernels_in_the_cache_are_not_spoken_of(compilation, stderr, monkeypatch) -> None:
    loads = Loads(stderr(True), compilation, True, True)
    monkeypatch.setattr("greenroom.engine.load.load_engine", loads)
    with loaded(Path("m.gguf")):
        pass
    assert PREPARING in loads.written.getvalue()
    assert "compiling" not in loads.written.getvalue()


def test_a_server_shows_how_its_first_model_loads(compilation, stderr, monkeypatch) -> None:
    loads = Loads(stderr(True), compilation, False)
    monkeypatch.setattr("greenroom.engine.load.load_engine", loads)
    values: Any = defaultdict(lambda: None, kv_type="f16", max_sequences=1, prefix_ram="0")
    load = serve._loader(values)
    assert serve._preloaded(load, ModelSource("m.gguf", Path("m.gguf"))) is loads
    assert LOADING in loads.seen[0]
    assert FIRST in loads.seen[2]
    assert loads.written.getvalue().endswith(GONE)


def test_a_pipe_stays_quiet(compilation, stderr, monkeypatch) -> None:
    loads = Loads(stderr(False), compilation, False)
    monkeypatch.setattr("greenroom.engine.load.load_engine", loads)
    with loaded(Path("m.gguf")):
        pass
    assert loads.written.getvalue() == ""


def test_control_c_while_a_gpu_is_prepared_leaves_no_line(compilation, stderr, monkeypatch) -> None:
    loads = Loads(stderr(True), compilation, False)
    loads.interrupted = True
    monkeypatch.setattr("greenroom.engine.load.load_engine", loads)
    with pytest.raises(KeyboardInterrupt), loaded(Path("m.gguf")):
        pass
    assert PREPARING in loads.written.getvalue()
    assert loads.written.getvalue().endswith(GONE)
    assert compilation.listener is None


def test_the_cpu_alone_needs_no_preparation(tmp_path, stderr) -> None:
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 1)), tmp_path / "m.gguf")
    written = stderr(True)
    with loaded(tmp_path / "m.gguf", vram=0, threads=1, context_length=64):
        pass
    assert LOADING in written.getvalue()
    assert PREPARING not in written.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_triton_tells_what_it_compiles_and_what_it_finds(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REAL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["False", "True"]
