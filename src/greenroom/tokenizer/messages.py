"""OpenAI-style message dicts, checked and brought into the one form that templates expect.

It knows the shape of messages, not how a model wants them written.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from greenroom.errors import RequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_REASONING = ("reasoning_content", "reasoning", "thinking")

Message = dict[str, Any]


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copies of the messages with `content` a string and roles and names checked.

    Text parts are joined by newlines; a missing content becomes ""; reasoning is found under
    `reasoning_content` whichever of the usual names it came by; a tool message gets the name of
    the call it answers. Raises RequestError naming the field that is wrong.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a list with at least one message", "messages")
    names: dict[str, str] = {}
    return [_message(message, f"messages[{n}]", names) for n, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str, names: dict[str, str]) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content", where)
    role = message.get("role")
    if role not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise RequestError(f"{where}.role is {role!r}; known roles: {known}", f"{where}.role")
    out = dict(message)
    out["role"] = "tool" if role == "function" else role
    out["content"] = _content(message.get("content"), f"{where}.content")
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        out["reasoning_content"] = _content(reasoning, f"{where}.reasoning_content")
    if message.get("tool_calls"):
        out["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls", names)
    else:
        out.pop("tool_calls", None)
    if out["role"] == "tool" and not out.get("name"):
        out["name"] = names.get(str(message.get("tool_call_id")), "")
    if out.get("name"):
        _check_name(out["name"], f"{where}.name")
    else:
        out.pop("name", None)
    return out


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} must be a string or a list of text parts", where)
    texts = []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text"):
            field = f"{where}[{n}].type"
            raise RequestError(f"{field} is {kind!r}; this model reads text only", field)
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{n}].text must be a string", f"{where}[{n}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: object, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where} must be a list", where)
    out = []
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}[{n}].function must be an object", f"{where}[{n}].function")
        name = _check_name(function.get("name"), f"{where}[{n}].function.name")
        arguments = function.get("arguments")
        if arguments is None:
            arguments = "{}"
        if not isinstance(arguments, str | Mapping):
            field = f"{where}[{n}].function.arguments"
            raise RequestError(f"{field} must be a JSON string or an object", field)
        if call.get("id"):
            names[str(call["id"])] = name
        function = {**function, "name": name, "arguments": arguments}
        out.append({**call, "type": "function", "function": function})
    return out


def _check_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where} must be up to 128 letters, digits, '_', '-' or '.'; got {name!r:.60}", where
        )
    return name


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The tool definitions as a list, names checked; RequestError names what is wrong."""
    out = []
    for n, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"tools[{n}].function must be an object", f"tools[{n}].function")
        _check_name(function.get("name"), f"tools[{n}].function.name")
        out.append(dict(tool))
    return out


def with_parsed_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with tool call arguments as objects, as most templates expect them."""
    out = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = _parsed(function["arguments"])
            calls.append({**call, "function": {**function, "arguments": arguments}})
        out.append({**message, "tool_calls": calls} if calls else message)
    return out


def with_written_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with tool call arguments as JSON strings."""
    out = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = function["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {**function, "arguments": arguments}})
        out.append({**message, "tool_calls": calls} if calls else message)
    return out


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
