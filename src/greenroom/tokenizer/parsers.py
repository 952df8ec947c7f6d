"""The streaming parser for text formats: reasoning between tags, tool calls between marks.

Text that may turn out to be the beginning of a mark is held back until that is decided; nothing
but the marks themselves and white space beside them is ever dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from greenroom.tokenizer.deltas import ChatDelta, Kind, ToolCall
from greenroom.tokenizer.tokenizer import Tokenizer
from greenroom.tokenizer.tool_formats import ToolFormat, Tools


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What a model's output may hold: a pair of tags around reasoning, ways to call tools."""

    reasoning: tuple[str, str] | None = None
    tools: tuple[ToolFormat, ...] = ()

    @property
    def marks(self) -> frozenset[str]:
        """All texts that mean something, whether or not they are control tokens."""
        found = set(self.reasoning or ())
        for form in self.tools:
            found |= {form.opens, *form.marks} | ({form.closes} if form.closes else set())
        return frozenset(found)


class TextParser:
    """Parses the output of one generation.

    Args:
        tokenizer: tells which tokens are control tokens, whose text engines leave out.
        form: what to look for.
        thinking: the prompt has opened the reasoning already.
        tools: tool definitions of the request; None if not known, empty: no calls are looked
            for.
    """

    def __init__(
        self, tokenizer: Tokenizer, form: TextFormat, thinking: bool, tools: Tools | None
    ) -> None:
        self._tokenizer = tokenizer
        self._tools: Tools = tools or ()
        self._marks = form.marks
        self._think_open, self._think_close = form.reasoning or ("", "")
        formats = () if tools is not None and not tools else form.tools
        self._formats = tuple(f for f in formats if self._tools or not f.asked)
        self._thinking = thinking and bool(form.reasoning)
        self._body: ToolFormat | None = None
        self._buffer = ""
        self._started = False  # something other than white space was handed out as content
        self._strips = self._thinking  # white space after a tag is not part of the text
        self._drops_space = tokenizer.vocabulary.add_space_prefix
        self._calls = 0

    def push(self, token_id: int, text: str) -> list[ChatDelta]:
        """See OutputParser."""
        if self._drops_space and text:  # SentencePiece's space before the first word
            text, self._drops_space = text.removeprefix(" "), False
        self._buffer += text + self._mark(token_id, text)
        return self._advance(final=False)

    def finish(self) -> list[ChatDelta]:
        """See OutputParser."""
        return self._advance(final=True)

    def _mark(self, token: int, text: str) -> str:
        """The text of a control token that means something, if the engine left it out."""
        if not 0 <= token < self._tokenizer.vocabulary_size:
            return ""
        if not self._tokenizer.is_special(token):
            return ""
        mark = self._tokenizer.vocabulary.texts[token]
        return mark if mark in self._marks and not text.endswith(mark) else ""

    def _advance(self, final: bool) -> list[ChatDelta]:
        deltas: list[ChatDelta] = []
        goes_on = True
        while goes_on:
            if self._thinking:
                goes_on = self._reason(deltas, final)
            elif self._body:
                goes_on = self._collect(deltas, final)
            else:
                goes_on = self._speak(deltas, final)
        return deltas

    def _reason(self, deltas: list[ChatDelta], final: bool) -> bool:
        at = self._buffer.find(self._think_close)
        if at < 0:
            self._emit(deltas, "reasoning", final, [self._think_close])
            return False
        self._put(deltas, "reasoning", self._buffer[:at].rstrip())
        self._buffer = self._buffer[at + len(self._think_close) :]
        self._thinking, self._strips = False, True
        return True

    def _collect(self, deltas: list[ChatDelta], final: bool) -> bool:
        """Waits for the whole body of a tool call."""
        form = self._body
        assert form is not None
        at = self._buffer.find(form.closes) if form.closes else -1
        if at < 0 and not final:
            return False
        end = len(self._buffer) if at < 0 else at
        body, rest = self._buffer[:end], self._buffer[end:]
        closing = form.closes or "" if at >= 0 else ""
        calls = form.parse(body, self._tools)
        self._body, self._buffer = None, rest[len(closing) :]
        if calls is None:
            self._strips = False
            self._put(deltas, "content", form.opens[: len(form.opens) - form.keeps])
            self._put(deltas, "content", body + closing)
        else:
            self._strips = True
            self._call(deltas, calls)
        return bool(self._buffer)

    def _speak(self, deltas: list[ChatDelta], final: bool) -> bool:
        found = [(at, mark, form) for mark, form in self._openings() if (at := self._at(mark)) >= 0]
        # Of marks at the same place the longest counts.
        found = [item for item in found if self._allowed(item[0], item[1], item[2])]
        if not found:
            self._emit(deltas, "content", final, [mark for mark, _ in self._openings()])
            return False
        at, mark, form = min(found, key=lambda item: (item[0], -len(item[1])))
        self._put(deltas, "content", self._buffer[:at].rstrip())
        keeps = form.keeps if form else 0
        self._buffer = self._buffer[at + len(mark) - keeps :]
        self._thinking, self._body = form is None, form
        self._strips = form is None
        return True

    def _openings(self) -> list[tuple[str, ToolFormat | None]]:
        openings: list[tuple[str, ToolFormat | None]] = [
            (form.opens, form) for form in self._formats if not (form.at_start and self._started)
        ]
        if self._think_open and not self._started:
            openings.append((self._think_open, None))
        return openings

    def _at(self, mark: str) -> int:
        return self._buffer.find(mark)

    def _allowed(self, at: int, mark: str, form: ToolFormat | None) -> bool:
        """Reasoning, and calls without a mark of their own, only begin a message."""
        first = not self._started and not self._buffer[:at].strip()
        return first or (form is not None and not form.at_start)

    def _emit(self, deltas: list[ChatDelta], kind: Kind, final: bool, marks: Sequence[str]) -> None:
        """Hands out the buffer but for an end that may be the beginning of a mark."""
        keep = 0 if final else _held(self._buffer, marks)
        text = self._buffer[: len(self._buffer) - keep]
        if not final and marks:  # white space before a mark would go with it
            text = text.rstrip()
        self._buffer = self._buffer[len(text) :]
        self._put(deltas, kind, text)

    def _put(self, deltas: list[ChatDelta], kind: Kind, text: str) -> None:
        if self._strips:
            text = text.lstrip()
        if not text:
            return
        self._strips = False
        if kind == "content":
            self._started = self._started or bool(text.strip())
        deltas.append(ChatDelta(kind, text))

    def _call(self, deltas: list[ChatDelta], calls: Sequence[ToolCall]) -> None:
        for call in calls:
            deltas.append(ChatDelta("tool_call", call.arguments, self._calls, call.name))
            self._calls += 1


def _held(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of a text with which one of the marks begins."""
    longest = min(len(text), max((len(mark) for mark in marks), default=1) - 1)
    for length in range(longest, 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
