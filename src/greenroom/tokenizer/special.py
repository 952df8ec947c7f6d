"""Cutting text at special tokens before the rest is tokenised.

The order is llama.cpp's: one special token after the other, longest text first, each over all
pieces that are still text. It knows token texts and ids, not what they mean.
"""

import string
from collections.abc import Iterable

from greenroom.tokenizer.portions import find
from greenroom.tokenizer.vocabulary import TokenKind, Vocabulary

_SPACE = string.whitespace  # C isspace(), which llama.cpp strips by
_PREFIX = 3


class SpecialTokens:
    """Finds the special tokens of one vocabulary in text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._strip_after = vocabulary.strip_after
        # Thousands of reserved tokens share a beginning: one look for it rules all of them out.
        self._groups: dict[str, list[tuple[int, str, int, TokenKind]]] = {}
        for order, (text, token, kind) in enumerate(vocabulary.marked):
            group = self._groups.setdefault(text[:_PREFIX], [])
            group.append((order, text, token, kind))

    def partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Pieces of text and ids of special tokens, in order.

        With `parse_special=False` control and unknown tokens stay text; user-defined ones
        (runs of spaces, tags the model was taught) are found either way.
        """
        pieces: list[str | int] = [text] if text else []
        for special, token in self._present(text, parse_special):
            pieces = [part for piece in pieces for part in self._cut(piece, special, token)]
        return pieces

    def _present(self, text: str, parse_special: bool) -> list[tuple[str, int]]:
        found = []
        for prefix, group in self._groups.items():
            if find(text, prefix) >= 0:
                found += [item for item in group if find(text, item[1]) >= 0]
        return [
            (special, token)
            for _, special, token, kind in sorted(found)
            if parse_special or kind == TokenKind.USER_DEFINED
        ]

    def _cut(self, piece: str | int, special: str, token: int) -> Iterable[str | int]:
        if isinstance(piece, int) or find(piece, special) < 0:
            yield piece
            return
        strips = token in self._strip_after
        begin = 0
        while True:  # not split(), which would make all parts of a long text in one call
            found = find(piece, special, begin)
            part = piece[begin : found if found >= 0 else None]
            part = part.lstrip(_SPACE) if strips and begin else part
            if part:
                yield part
            if found < 0:
                return
            yield token
            begin = found + len(special)
