"""Ctrl-C, which must wait while modules are imported: an exception that passes through the
C++ initialisers of a library, PyTorch's for one, ends the process without a word.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 0.05  # seconds until it is looked again
_IMPORT = "<frozen importlib._bootstrap>"


@contextmanager
def after_imports() -> Iterator[None]:
    """Within the block Ctrl-C raises KeyboardInterrupt when no import is under way.

    Does nothing where somebody else handles Ctrl-C, or in another thread than the first.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or not hasattr(signal, "setitimer"):
        yield
        return
    try:
        signal.signal(signal.SIGINT, _interrupt)
    except ValueError:  # not the first thread
        yield
        return
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            return
        frame = frame.f_back
    raise KeyboardInterrupt
