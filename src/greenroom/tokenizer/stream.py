"""Turning ids back into text, all at once or one by one.

A decoder holds back bytes that do not make a whole character yet, and drops the one space that
a SentencePiece encoder puts before text. It knows bytes per token and nothing of models.
"""

import codecs
from collections.abc import Iterable
from typing import Protocol


class TokenSource(Protocol):
    """What a decoder has to know of a vocabulary."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes the token stands for."""

    def is_special(self, token: int) -> bool:
        """True for control and unknown tokens, which are marks rather than text."""

    def opens_text(self, token: int) -> bool:
        """True where the encoder puts a space before text that follows this token."""


class StreamDecoder:
    """Text of a growing list of tokens; what it returns, joined, is the text of them all.

    Args:
        source: the vocabulary.
        skip_special: leave out control and unknown tokens.
        context: tokens before the first one, e.g. the prompt. With it, text that continues text
            keeps its leading space.
    """

    def __init__(
        self, source: TokenSource, skip_special: bool = False, context: Iterable[int] = ()
    ) -> None:
        self._source = source
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        last = None
        for last in context:  # noqa: B007  the last one is what is wanted
            pass
        self._drops_space = source.opens_text(-1 if last is None else last)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty. Never half a character.

        Raises TokenizerError for an id outside the vocabulary.
        """
        data = self._source.token_bytes(token)
        if self._source.is_special(token):
            data = b"" if self._skip_special else data
        elif self._drops_space:
            data = data.removeprefix(b" ")
        self._drops_space = self._source.opens_text(token)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
