"""What an output parser hands out: pieces of a message, as they become known.

It knows no format.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """A piece of a message.

    Pieces of one kind follow each other: their texts, joined, are the message's content, its
    reasoning, or the JSON arguments of tool call number `index`. The first piece of a tool call
    has its `name`, later ones None.
    """

    kind: Kind
    text: str
    index: int = 0
    name: str | None = None


class OutputParser(Protocol):
    """Splits what a model writes into reasoning, content and tool calls."""

    def push(self, token_id: int, text: str) -> list[ChatDelta]:
        """What this token and its text complete. Text may come later than its token."""

    def finish(self) -> list[ChatDelta]:
        """What was held back; to be called once, when no more tokens come."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call: a name and JSON arguments."""

    name: str
    arguments: str


def call_from_json(value: object) -> ToolCall | None:
    """A call from one of the JSON objects models write, or None if it is none."""
    if not isinstance(value, dict):
        return None
    function: dict[str, object] = value
    if isinstance(value.get("function"), dict):
        function = value["function"]
    name = function.get("name", function.get("function"))
    if not isinstance(name, str) or not name:
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return ToolCall(name, arguments)


def calls_from_json(values: Sequence[object]) -> list[ToolCall] | None:
    """All of them, or None if one is no call or there is none."""
    calls = [call_from_json(value) for value in values]
    complete = [call for call in calls if call is not None]
    return complete if complete and len(complete) == len(calls) else None
