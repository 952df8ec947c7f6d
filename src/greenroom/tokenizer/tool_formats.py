"""How model families write tool calls: the marks around them and what stands between.

Each format is data and one pure function from the body to calls (None: not a call after all).
It knows nothing of streaming.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from greenroom.tokenizer.deltas import ToolCall, calls_from_json

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls.

    `opens` starts a body that ends at `closes`, or with the output where that is None. Of
    `keeps` characters of `opens` belong to the body. `at_start`: only as the first thing of a
    message; `asked`: only where the request named its tools. `marks`: further texts that a
    body may hold and that may be control tokens.
    """

    opens: str
    closes: str | None
    parse: Callable[[str, Tools], list[ToolCall] | None]
    keeps: int = 0
    at_start: bool = False
    asked: bool = False
    marks: tuple[str, ...] = ()


def _json_values(body: str) -> list[object] | None:
    """The JSON values in a text, one after the other or parted by ';' or ','; lists opened."""
    decoder = json.JSONDecoder(strict=False)
    values: list[object] = []
    at = 0
    try:
        while body := body[at:].lstrip(" \t\r\n;,"):
            value, at = decoder.raw_decode(body)
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return None
    return values


def _json_calls(body: str, tools: Tools) -> list[ToolCall] | None:
    values = _json_values(body)
    return calls_from_json(values) if values else None


def _known_json_calls(body: str, tools: Tools) -> list[ToolCall] | None:
    """JSON without any mark is a call only if it names a tool of the request."""
    calls = _json_calls(body, tools)
    return calls if calls and all(call.name in _names(tools) for call in calls) else None


def _names(tools: Tools) -> set[object]:
    return {tool.get("function", {}).get("name") for tool in tools}


def _tagged_calls(body: str, tools: Tools) -> list[ToolCall] | None:
    """Between `<tool_call>` tags: JSON (Hermes, Qwen), or tags per argument (Qwen-Coder, GLM)."""
    if "<function=" in body:
        return _function_tags(body, tools)
    # A call without arguments is a bare name; only the request tells it from a word.
    if "<arg_key>" in body or body.strip() in _names(tools):
        return _argument_tags(body, tools)
    return _json_calls(body, tools)


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL)


def _function_tags(body: str, tools: Tools) -> list[ToolCall] | None:
    calls = []
    for name, inner in _FUNCTION.findall(body):
        found = {key.strip(): value for key, value in _PARAMETER.findall(inner)}
        calls.append(_call(name.strip(), found, tools))
    return calls or None


def _argument_tags(body: str, tools: Tools) -> list[ToolCall] | None:
    name = body.split("<arg_key>", 1)[0].strip()
    found = {key.strip(): value for key, value in _ARGUMENT.findall(body)}
    return [_call(name, found, tools)] if re.fullmatch(r"[\w.\-]+", name) else None


def _call(name: str, written: Mapping[str, str], tools: Tools) -> ToolCall:
    """A call from arguments written as bare text, which the tool's schema gives types."""
    functions = [tool.get("function", {}) for tool in tools]
    schema = next((f.get("parameters") or {} for f in functions if f.get("name") == name), {})
    properties = schema.get("properties") or {}
    values = {key: _typed(text, properties.get(key)) for key, text in written.items()}
    return ToolCall(name, json.dumps(values, ensure_ascii=False))


def _typed(text: str, schema: object) -> object:
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_MISTRAL_MARKS = ("[CALL_ID]", "[ARGS]")


def _mistral_calls(body: str, tools: Tools) -> list[ToolCall] | None:
    """A JSON list, or `name[ARGS]{...}` once per `[TOOL_CALLS]`."""
    if "[ARGS]" not in body:
        return _json_calls(body.replace("[TOOL_CALLS]", " "), tools)
    calls = []
    for part in filter(str.strip, body.split("[TOOL_CALLS]")):
        name, _, arguments = part.partition("[ARGS]")
        name = name.split("[CALL_ID]")[0].strip()
        if not name:
            return None
        calls.append(ToolCall(name, arguments.strip() or "{}"))
    return calls or None


_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _deepseek_calls(body: str, tools: Tools) -> list[ToolCall] | None:
    """`function SEP name` and a fenced block (V3, R1), or `name SEP {...}` (V3.1)."""
    begin, separator, end = _DEEPSEEK_CALL
    calls = []
    for part in filter(str.strip, body.split(begin)):
        head, _, rest = part.split(end)[0].partition(separator)
        fenced = re.fullmatch(r"([^\n]*)\n```(?:json)?\n(.*?)\n?```\s*", rest, re.DOTALL)
        name, arguments = fenced.groups() if fenced else (head, rest)
        if not name.strip():
            return None
        calls.append(ToolCall(name.strip(), arguments.strip() or "{}"))
    return calls or None


HERMES = ToolFormat("<tool_call>", "</tool_call>", _tagged_calls)
MISTRAL = ToolFormat("[TOOL_CALLS]", None, _mistral_calls, marks=_MISTRAL_MARKS)
DEEPSEEK = ToolFormat(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _deepseek_calls, marks=_DEEPSEEK_CALL
)
PHI = ToolFormat("<|tool_call|>", "<|/tool_call|>", _json_calls)
FUNCTOOLS = ToolFormat("functools[", None, _json_calls, keeps=1, at_start=True)
PYTHON_TAG = ToolFormat("<|python_tag|>", None, _json_calls)
BARE_JSON = ToolFormat("{", None, _known_json_calls, keeps=1, at_start=True, asked=True)
BARE_LIST = ToolFormat("[{", None, _known_json_calls, keeps=2, at_start=True, asked=True)
