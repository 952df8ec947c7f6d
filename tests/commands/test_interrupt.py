"""Ctrl-C comes at once, but never in the middle of an import."""

import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from greenroom.commands.interrupt import after_imports

SLOW = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.2)
finished = True
"""


def test_an_import_is_finished_before_control_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)

    def import_it() -> None:
        import_module("slow_to_import")
        time.sleep(30)

    with pytest.raises(KeyboardInterrupt), after_imports():
        import_it()
    assert sys.modules.pop("slow_to_import").finished


def test_control_c_comes_at_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), after_imports():
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before


def test_the_handler_of_somebody_else_stays() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        with after_imports():
            os.kill(os.getpid(), signal.SIGINT)
        assert heard == [True]
    finally:
        signal.signal(signal.SIGINT, before)
