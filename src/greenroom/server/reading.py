"""Reads one choice's tokens as they come: splits text into content, reasoning and tool calls,
keeps each content token's log-probabilities, tells which stop string ended it.

Uses the model family's parser; knows no API's format.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from greenroom.engine.output import TokenOutput
from greenroom.server.grammar import GrammarSpec, json_grammar

Kind = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer.

    Attributes:
        kind: what the text belongs to.
        text: for a tool call, a piece of its JSON arguments.
        call: index of the tool call within the answer.
        name: the tool's name, on the first piece of a call.
    """

    kind: Kind
    text: str
    call: int = 0
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to one choice."""

    choice: int
    deltas: tuple[Delta, ...]
    tokens: tuple[TokenOutput, ...]  # content tokens whose text became part of the content
    output: TokenOutput
    finish_reason: str | None = None  # "stop", "length", "tool_calls" on the last piece
    stopped_by: str | None = None  # the stop string that ended it


class Parser(Protocol):
    """Splits an answer's tokens; one per choice."""

    def push(self, token_id: int, text: str) -> Sequence[Delta]: ...

    def finish(self) -> Sequence[Delta]: ...


class PlainParser:
    """For text completions: all is content."""

    def push(self, token_id: int, text: str) -> Sequence[Delta]:
        return [Delta("content", text)] if text else []

    def finish(self) -> Sequence[Delta]:
        return []


class FamilyParser:
    """The model family's own output parser, its deltas brought into our form.

    Args:
        parser: of the tokenizer room; its deltas have kind, text, index and name.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def push(self, token_id: int, text: str) -> Sequence[Delta]:
        return [_delta(delta) for delta in self._parser.push(token_id, text)]

    def finish(self) -> Sequence[Delta]:
        return [_delta(delta) for delta in self._parser.finish()]


def _delta(delta: Any) -> Delta:
    call = delta.index if delta.kind == "tool_call" else 0
    return Delta(delta.kind, delta.text, call, delta.name or None)


class ForcedToolParser:
    """For a demanded tool call: all content is `{"name": ..., "arguments": {...}}`.

    Args:
        parser: splits off reasoning.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._text = ""

    def push(self, token_id: int, text: str) -> Sequence[Delta]:
        return self._keep(self._parser.push(token_id, text))

    def _keep(self, deltas: Sequence[Delta]) -> list[Delta]:
        self._text += "".join(delta.text for delta in deltas if delta.kind == "content")
        return [delta for delta in deltas if delta.kind == "reasoning"]

    def finish(self) -> Sequence[Delta]:
        rest = self._keep(self._parser.finish())
        try:
            call = json.loads(self._text)
        except ValueError:  # cut short by max_tokens: half a call is no call
            return [*rest, Delta("content", self._text)] if self._text else rest
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        return [*rest, Delta("tool_call", arguments, 0, call["name"])]


def forced_tool_grammar(tools: Sequence[Mapping[str, Any]]) -> GrammarSpec:
    """A grammar whose texts are calls of one of these tools."""
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters") or {"type": "object"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return json_grammar(calls[0] if len(calls) == 1 else {"anyOf": calls}, "tools")


class Reader:
    """One choice from its first token to its last.

    Args:
        choice: its index in the answer.
        parser: splits its text.
        stop: the request's stop strings.
        tokenizer: the model's, to see which stop string was met.
        one_tool: end the answer where a second tool call would begin.
    """

    def __init__(
        self, choice: int, parser: Parser, stop: Sequence[str], tokenizer: Any, one_tool: bool
    ) -> None:
        self.choice, self.parser, self.stop = choice, parser, stop
        self.tokenizer, self.one_tool = tokenizer, one_tool
        self._ids: list[int] = []
        self._pending: list[TokenOutput] = []
        self._called = False

    def read(self, output: TokenOutput) -> Piece:
        """The piece that a token makes."""
        deltas = list(self.parser.push(output.token_id, output.text))
        if output.finish_reason:
            deltas += self.parser.finish()
        reason = output.finish_reason
        if self.one_tool and any(d.kind == "tool_call" and d.call > 0 for d in deltas):
            deltas = [d for d in deltas if d.call == 0]
            reason = "stop"
        self._called = self._called or any(d.kind == "tool_call" for d in deltas)
        stopped_by = self._stopped_by(output)
        if reason == "stop" and self._called:
            reason = "tool_calls"
        tokens = self._content_tokens(output, deltas)
        return Piece(self.choice, tuple(deltas), tokens, output, reason, stopped_by)

    def _content_tokens(
        self, output: TokenOutput, deltas: Sequence[Delta]
    ) -> tuple[TokenOutput, ...]:
        """Tokens whose text is known to be content now; those of markup are dropped.

        Of the tokens since the last text, those at the end belong to the content: as many
        as have its bytes together.
        """
        if output.logprob is None:
            return ()
        self._pending.append(output)
        if not deltas:
            return ()
        pending, self._pending = self._pending, []
        left = sum(len(d.text.encode()) for d in deltas if d.kind == "content")
        found: list[TokenOutput] = []
        while left > 0 and pending:
            found.append(pending.pop())
            left -= len(self.tokenizer.token_bytes(found[-1].token_id))
        return tuple(reversed(found))

    def _stopped_by(self, output: TokenOutput) -> str | None:
        """The stop string that the last tokens contain, if one ended the answer."""
        if not self.stop:
            return None
        longest = max(len(text.encode()) for text in self.stop)
        self._ids = [*self._ids, output.token_id][-longest - 1 :]  # a token is a byte at least
        if output.finish_reason != "stop" or output.token_id in self.tokenizer.eog_ids:
            return None
        tail = self.tokenizer.decode(self._ids)
        found = [(tail.find(text), text) for text in self.stop if text in tail]
        return min(found)[1] if found else None
