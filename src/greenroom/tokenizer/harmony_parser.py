"""Reads Harmony output token by token: thoughts, answer and tool calls of gpt-oss.

Structure comes from token ids alone, never from text, so an answer that talks about Harmony
cannot break out of its message. Headers that models get wrong are read as well as can be.
"""

import re
from enum import Enum, auto

from greenroom.tokenizer.deltas import ChatDelta, Kind
from greenroom.tokenizer.tokenizer import Tokenizer

_RECIPIENT = re.compile(r"\bto\s*=\s*([\w.\-/:]+)")
_CHANNEL = re.compile(r"\x00\s*([A-Za-z_]+)")
_ROLE = re.compile(r"\s*assistant\b")
_MARK = "\x00"  # stands for <|channel|> in a header; a header holds no control characters
_LONGEST_HEADER = 200  # characters; beyond it the model forgot the header and writes its answer


class _State(Enum):
    HEADER = auto()
    CONTENT = auto()
    BETWEEN = auto()


class HarmonyParser:
    """Parses the output of one generation, which begins behind `<|start|>assistant`.

    Args:
        tokenizer: tells the ids of Harmony's tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        find = tokenizer.vocabulary.id_of
        self._start, self._channel, self._message = map(
            find, ("<|start|>", "<|channel|>", "<|message|>")
        )
        self._constrain = find("<|constrain|>")
        self._ends = {find("<|end|>"), find("<|return|>"), find("<|call|>")} - {None}
        self._tokenizer = tokenizer
        self._state = _State.HEADER
        self._header = ""
        self._kind: Kind = "content"
        self._calls = 0

    def push(self, token_id: int, text: str) -> list[ChatDelta]:
        """See OutputParser. Text that comes with a structural token belongs before it."""
        if not self._structural(token_id):
            return self._text(text)
        own = self._tokenizer.vocabulary.texts[token_id]
        deltas = self._text(text.removesuffix(own))
        if token_id == self._message:
            deltas += self._open()
        elif token_id == self._start:
            deltas += self._close(_State.HEADER)
        elif token_id == self._channel:
            if self._state is _State.CONTENT:  # a new message without <|end|><|start|>
                deltas += self._close(_State.HEADER)
            self._state = _State.HEADER
            self._header += _MARK
        elif token_id == self._constrain:
            self._header += " "
        else:
            deltas += self._close(_State.BETWEEN)
        return deltas

    def finish(self) -> list[ChatDelta]:
        """See OutputParser."""
        return self._close(_State.BETWEEN)

    def _structural(self, token: int) -> bool:
        marks = (self._start, self._channel, self._message, self._constrain)
        return token in marks or token in self._ends

    def _text(self, text: str) -> list[ChatDelta]:
        if not text:
            return []
        if self._state is _State.CONTENT:
            return [ChatDelta(self._kind, text, self._index())]
        self._header += text
        if self._state is _State.HEADER and len(self._header) > _LONGEST_HEADER:
            return self._headless()
        return []

    def _index(self) -> int:
        return self._calls - 1 if self._kind == "tool_call" else 0

    def _open(self) -> list[ChatDelta]:
        """Reads the header and begins the message's content."""
        if self._state is _State.CONTENT:  # <|message|> twice
            return []
        header, self._header = self._header, ""
        self._state = _State.CONTENT
        recipient = _RECIPIENT.search(header)
        if recipient and recipient[1] not in ("assistant", "user", "all"):
            self._kind = "tool_call"
            self._calls += 1
            name = recipient[1].removeprefix("functions.")
            return [ChatDelta("tool_call", "", self._index(), name)]
        channels = _CHANNEL.findall(header)
        self._kind = _kind(channels[-1] if channels else "")
        return []

    def _close(self, state: _State) -> list[ChatDelta]:
        """Ends a message; a header that never got its content was perhaps the answer."""
        deltas = self._headless() if self._header and self._state is not _State.CONTENT else []
        self._state, self._header = state, ""
        return deltas

    def _headless(self) -> list[ChatDelta]:
        """Text where a header should be: all but what is a header's goes to the answer."""
        header, self._header = self._header, ""
        if _MARK in header:
            header, _, rest = header.rpartition(_MARK)
            known, _, rest = rest.partition("\n") if "\n" in rest else (rest, "", "")
            text = rest if _known(known) else f"{known}\n{rest}".strip("\n")
        else:
            text = _RECIPIENT.sub("", _ROLE.sub("", header, count=1))
        text = text.replace(_MARK, "")
        if not text.strip():
            return []
        self._kind, self._state = "content", _State.CONTENT
        return [ChatDelta("content", text.lstrip())]


def _known(header: str) -> bool:
    return _kind_or_none(header.split()[0] if header.split() else "") is not None


def _kind_or_none(channel: str) -> Kind | None:
    if channel.startswith("final"):
        return "content"
    if channel.startswith(("analysis", "comment")):
        return "reasoning"
    return None


def _kind(channel: str) -> Kind:
    """Only `final` is for users; commentary to nobody is a plan, shown with the thoughts. A
    channel nobody knows is shown: better too much than an answer lost."""
    return _kind_or_none(channel) or "content"
