"""Reads large request bodies, alone in a process of its own; started by `body_reader.py`.

Reading JSON keeps the interpreter lock, and a hostile body may take much memory: here it holds
up nobody, and limits of time and memory end this process instead of the server. A request is a
head, the name of a model and the body; an answer a head and the checked body as a pickle, or
what is wrong with it as JSON.
"""

import json
import pickle
import resource
import signal
import struct
import sys
from typing import Any

from pydantic import ValidationError

from greenroom.server.body_models import REQUESTS
from greenroom.server.errors import ApiError, validation_error

# Most values, most numbers, bytes of the name, bytes of the body.
REQUEST = struct.Struct(">IIII")
ANSWER = struct.Struct(">cI")  # READ or REFUSED, bytes
READ, REFUSED = b"r", b"e"
_MODELS = {model.__name__: model for model in REQUESTS}


def contents(value: Any) -> tuple[int, int]:
    """How many objects, lists and texts a JSON value has, keys not counted; how many numbers."""
    values, numbers, left = 0, 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, int | float):
            numbers += 1
            continue
        values += 1
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list):
            left += item
    return values, numbers


def checked(name: str, raw: bytes, limits: tuple[int, int]) -> Any:
    """The body as its model.

    Raises:
        ApiError: it is not JSON, breaks the model's rules, or has more values than the limits.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None  # the model says what is wrong
    what = ("texts, lists and objects", "numbers")
    for count, limit, kind in zip(contents(value), limits, what, strict=True):
        if count > limit:
            message = f"the body has {count} {kind}, at most {limit}"
            raise ApiError(400, message, code="invalid_value")
    try:
        return _MODELS[name].model_validate_json(raw)
    except ValidationError as error:
        raise validation_error(error, value) from None


def answer(name: str, raw: bytes, limits: tuple[int, int]) -> tuple[bytes, bytes]:
    """Kind and content of the answer."""
    try:
        return READ, pickle.dumps(checked(name, raw, limits), pickle.HIGHEST_PROTOCOL)
    except ApiError as error:
        return REFUSED, json.dumps([error.message, error.field, error.code]).encode()


def main() -> None:
    """Answers requests until standard input ends; arguments: seconds and bytes allowed."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when this ends
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(REQUEST.size):
        values, numbers, name_bytes, body_bytes = REQUEST.unpack(head)
        name, raw = source.read(name_bytes).decode(), source.read(body_bytes)
        # The timer has no handler: its default ends the process, whatever runs in it. It counts
        # this process's own time, so that a busy machine refuses nothing.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        kind, content = answer(name, raw, (values, numbers))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sink.write(ANSWER.pack(kind, len(content)) + content)
        sink.flush()


if __name__ == "__main__":
    main()
