"""Keeps what people wrote from being read as special tokens.

A character that occurs nowhere else is put inside everything that could become part of a special
token's text; after the prompt was cut at special tokens, it is taken out again. The words around
it are then tokenised together, as they would be without it. It knows token texts, no templates.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from greenroom.errors import ChatTemplateError
from greenroom.tokenizer.portions import PORTION, find, portions
from greenroom.tokenizer.vocabulary import TokenKind, Vocabulary

# A user-defined token that looks like markup is one the model takes instructions from; others
# (runs of spaces, joined words) are only a shorter spelling.
_MARKUP = re.compile(r"[<\[{|｜].+[>\]}|｜]", re.DOTALL)
_PLAIN = re.compile(r"\w*")
_FIRST_SENTINEL, _SENTINELS = 0xE000, 0x1900  # private use: no text means anything by it


class _Breaks:
    """Where a text has to be broken so that none of some special tokens can come of it.

    A token's text needs its first two and its last two characters. Neither pair may come from
    one text, and neither may be completed by what stands before or behind that text.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        texts = [text for text in texts if len(text) > 1]
        pairs = {text[:2] for text in texts} | {text[-2:] for text in texts}
        inside = [f"(?<={re.escape(p[0])})(?={re.escape(p[1])})" for p in sorted(pairs)]
        firsts = sorted({re.escape(text[0]) for text in texts})
        lasts = "|".join(sorted({re.escape(text[-1]) for text in texts}))
        # A template may trim white space off, so what counts as the edge is behind it.
        edges = [rf"(?<={first})(?=\s*\Z)" for first in firsts]
        self._inside = re.compile("|".join(inside)) if texts else None
        self._breaks = re.compile("|".join([*inside, *edges])) if texts else None
        self._start = re.compile(rf"\A\s*(?=(?:{lasts}))") if texts else None

    def apply(self, text: str, sentinel: str) -> str:
        if self._breaks is None or self._inside is None or self._start is None:
            return text
        end = max(0, len(text.rstrip()) - 1)  # only from here on can it be an edge
        cuts = [*range(0, end, PORTION), *range(end, len(text), PORTION), len(text)]
        done = []
        for begin, stop in pairwise(cuts):
            before = text[begin - 1 : begin] if begin else ""
            breaks = self._breaks if begin == end else self._inside
            done.append(breaks.sub(sentinel, before + text[begin:stop])[len(before) :])
        text = "".join(done)
        spaces = max(0, len(text) - len(text.lstrip()) - PORTION)
        return text[:spaces] + self._start.sub(lambda m: m[0] + sentinel, text[spaces:])


class Shield:
    """Breaks up special tokens in text for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        marks = [(t, kind) for t, _, kind in vocabulary.marked]
        control = [text for text, kind in marks if kind != TokenKind.USER_DEFINED]
        markup = [
            text
            for text, kind in marks
            if kind == TokenKind.USER_DEFINED and _MARKUP.fullmatch(text)
        ]
        self._strict = _Breaks([*control, *markup])
        self._control_only = _Breaks(control)

    def sentinel_for(self, *values: object) -> str:
        """A character that no string in the values has, neither itself nor escaped."""
        texts = [text for value in values for text in _strings(value)]
        used: set[str] = set()
        for text in texts:
            for part in portions(text):
                used.update(part)
        for code in range(_FIRST_SENTINEL, _FIRST_SENTINEL + _SENTINELS):
            spelled = escaped(chr(code))
            if chr(code) not in used and all(find(text, spelled) < 0 for text in texts):
                return chr(code)
        raise ChatTemplateError("the messages use all characters of the private use area")

    def protect(self, value: Any, sentinel: str) -> Any:
        """A copy of a JSON value in which no string, keys included, holds a special token."""
        return _map(value, lambda text: self._strict.apply(text, sentinel))

    def protect_message(self, message: Mapping[str, Any], sentinel: str) -> dict[str, Any]:
        """A copy of a message, protected. Tags that are ordinary output of a model (`<think>`)
        stay in what the assistant said, so that templates find them."""
        strict = message["role"] != "assistant"
        breaks = self._strict if strict else self._control_only
        shielded = {
            key: _map(value, lambda text: breaks.apply(text, sentinel))
            for key, value in message.items()
            if key not in ("role", "tool_calls")
        }
        if "tool_calls" in message:
            shielded["tool_calls"] = self.protect(message["tool_calls"], sentinel)
        return {"role": message["role"], **shielded}


def without(text: str, sentinel: str) -> str:
    """The text as it was before it was protected."""
    return "".join([part.replace(sentinel, "") for part in portions(text)])


def escaped(sentinel: str) -> str:
    """What JSON in ASCII makes of the character."""
    return f"\\u{ord(sentinel):04x}"


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        # Plain names stay as they are: templates look fields up by them.
        return {
            key if _PLAIN.fullmatch(str(key)) else change(str(key)): _map(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map(item, change) for item in value]
    return value
