"""Who waits for a first answer is told that kernels are compiled, and nobody else."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from greenroom.commands import console
from greenroom.commands.console import awaited

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
    assert written.getvalue().endswith("\x1b[2K")  # the line is gone before the answer comes
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
    assert written.getvalue().endswith("\x1b[2K")
    assert compilation.listener is None


def test_an_answer_of_nothing_is_one(compilation, monkeypatch) -> None:
    shown(monkeypatch)
    assert list(awaited(iter(()))) == []


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
