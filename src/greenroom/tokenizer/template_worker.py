"""Renders chat templates, alone in a process of its own; started by `template.py`.

A template comes with a downloaded model, so it is untrusted code: it runs in Jinja's immutable
sandbox, under a limit of memory and an alarm that kills this process. The environment is the one
transformers' `apply_chat_template` defines. A request is marshalled template and variables, long
texts as bytes, behind a four-byte length; an answer a byte, a length, and the text or an error
as JSON. It imports nothing of ours, so that it starts fast and has little to reach for.
"""

import json
import marshal
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LENGTH = struct.Struct(">I")
TEXT, ERROR = b"t", b"e"


class GenerationTag(Extension):
    """`{% generation %}` marks what the model wrote, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Refusal(jinja2.TemplateError):
    """The template itself called raise_exception."""


class PlainNamespace(Namespace):
    """`namespace(...)` that cannot hold names Python uses for its internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


class _Dict:
    """`dict(...)` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise Refusal(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    environment.globals.update(
        raise_exception=_refuse, strftime_now=_now, dict=_Dict(), namespace=PlainNamespace
    )
    environment.filters["tojson"] = _to_json
    return environment


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _render(template: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """`{"text": ...}`, or `{"error": ..., "kind": ...}`."""
    try:
        return {"text": _compiled(template).render(variables)}
    except Refusal as error:
        return {"kind": "refused", "error": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"{error.message} (line {error.lineno})"}
    except SecurityError as error:
        return {"kind": "forbidden", "error": str(error)}
    except MemoryError:
        return {"kind": "memory", "error": ""}
    except TypeError as error:
        return {"kind": "type", "error": str(error)}
    except Exception as error:
        # Whatever a template provokes is the template's fault and is reported as such.
        return {"kind": "failed", "error": f"{type(error).__name__}: {error}"}


def _texts(value: Any) -> Any:
    """The variables as the template sees them: long texts came as bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogatepass")
    if isinstance(value, dict):
        return {_texts(key): _texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value


def _answer(template: str, variables: Mapping[str, Any]) -> tuple[bytes, bytes]:
    try:
        found = _render(template, _texts(variables))
        if "text" in found:
            return TEXT, found["text"].encode("utf-8", "surrogatepass")
        return ERROR, json.dumps(found).encode()
    except MemoryError:  # the text fitted, its bytes did not
        return ERROR, b'{"kind": "memory", "error": ""}'


def main() -> None:
    """Answers requests until standard input ends; arguments: seconds and bytes allowed."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while header := source.read(LENGTH.size):
        request = marshal.loads(source.read(*LENGTH.unpack(header)))
        # The alarm has no handler: its default ends the process, whatever runs in it.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        kind, answer = _answer(*request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sink.write(kind + LENGTH.pack(len(answer)))
        sink.write(answer)
        sink.flush()


if __name__ == "__main__":
    main()
