"""Renders Jinja chat templates in a worker process that may be killed.

Starts the worker when it is first needed, keeps it, and starts another when one died. It knows
how to ask and what the answers mean, not what is in a template.
"""

import atexit
import json
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from greenroom.errors import ChatTemplateError
from greenroom.tokenizer.portions import PORTION, decoded, encoded

_WORKER = Path(__file__).with_name("template_worker.py")
_LENGTH_BYTES = 4

_SAYS = {
    "refused": "the chat template refuses these messages: ",
    "syntax": "the chat template has a syntax error: ",
    "forbidden": "the chat template asks for something that is forbidden: ",
    "type": "the chat template failed: ",
    "failed": "the chat template failed: ",
}


class TemplateTypeError(ChatTemplateError):
    """The template treats a value as another type than it has, e.g. arguments as a string."""


class TemplateRenderer:
    """Renders templates one at a time. Safe to use from several threads.

    Args:
        seconds: the longest one rendering may take.
        memory: address space of the worker in bytes.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 1 << 30) -> None:
        self._seconds = seconds
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text a template makes of variables, which must be JSON values.

        Raises ChatTemplateError where the template is wrong, refuses, asks for what the sandbox
        forbids, or needs more time or memory than it may have.
        """
        try:
            request = marshal.dumps((template, _plain(variables)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(
                f"the messages cannot be given to the chat template: {_line(error)}"
            ) from None
        with self._lock:
            answer = self._ask(request)
            if answer.get("kind") == "memory":
                self.close()
        if "text" in answer:
            return str(answer["text"])
        if answer["kind"] == "memory":
            raise ChatTemplateError(
                f"the chat template needs more than {self._memory >> 20} MiB and was stopped"
            )
        kind = TemplateTypeError if answer["kind"] == "type" else ChatTemplateError
        raise kind(_SAYS[answer["kind"]] + _line(answer["error"]))

    def close(self) -> None:
        """Ends the worker; the next rendering starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(len(request).to_bytes(_LENGTH_BYTES, "big"))
            process.stdin.write(request)
            process.stdin.flush()
            header = process.stdout.read(1 + _LENGTH_BYTES)
            answer = process.stdout.read(int.from_bytes(header[1:], "big"))
        except OSError:
            header = answer = b""
        if not header:
            self._explain_death(process)
        if header[:1] == b"t":
            return {"text": decoded(answer)}
        found: dict[str, str] = json.loads(answer)
        return found

    def _explain_death(self, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        self.close()
        if status == -signal.SIGALRM:
            raise ChatTemplateError(
                f"the chat template took longer than {self._seconds:g} s and was stopped"
            )
        raise ChatTemplateError(f"the chat template's process ended unexpectedly ({status})")

    def _running(self) -> subprocess.Popen[bytes]:
        """The worker; a new one if there is none, it died or it belongs to a parent process."""
        alive = self._process is not None and self._process.poll() is None
        if self._process is None or not alive or self._owner != os.getpid():
            self._process = self._start()
            self._owner = os.getpid()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        # -S, -P and a plain environment: nothing is imported that the worker does not need, and
        # the modules beside it cannot hide the standard library's.
        command = [sys.executable, "-S", "-P", str(_WORKER), str(self._seconds), str(self._memory)]
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        for name in ("TZ", "LD_LIBRARY_PATH", "PYTHONHOME"):
            if name in os.environ:
                environment[name] = os.environ[name]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise ChatTemplateError(f"cannot start a process for the template: {error}") from None


def _plain(value: Any) -> Any:
    """A copy of a JSON value in which long texts are bytes. It travels in Python's own form,
    since JSON takes several times as long, with the interpreter lock held.

    Raises TypeError for anything else.
    """
    if isinstance(value, str):
        return encoded(value) if len(value) > PORTION else value
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} is no JSON value")


@cache
def shared_renderer() -> TemplateRenderer:
    """The one renderer of this process; ended when it exits."""
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
