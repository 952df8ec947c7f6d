"""Holds a grammar back while a model reasons: reasoning is free, the answer keeps to the form.

Knows the two ways models mark reasoning: tags (`<think>`), and Harmony's channels.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_TAIL = 16  # tokens looked back at; a mark may be spelled out in several
_HARMONY = ("<|channel|>", "<|message|>", "<|return|>")


class Grammar(Protocol):
    """The engine's Constraint."""

    def mask(self) -> NDArray[np.bool_]: ...

    def accept(self, token_id: int) -> None: ...

    def finished(self) -> bool: ...


class Deferred:
    """A constraint that begins to hold when the reasoning is over.

    Args:
        inner: the grammar of what follows.
        closes: whether the tokens so far end the reasoning.
        never: tokens that may not come before that; they would end the answer.
        opens: a token that begins the reasoning, if it has not begun; else None.
    """

    def __init__(
        self, inner: Grammar, closes: Any, never: frozenset[int], opens: int | None = None
    ) -> None:
        self._inner, self._closes, self._opens = inner, closes, opens
        self._never = np.fromiter(never, dtype=np.int64)
        self._ids: list[int] = []
        self._holds = opens is not None

    def mask(self) -> NDArray[np.bool_]:
        """(vocabulary,) bool, True where the token is allowed now."""
        allowed = self._inner.mask()
        if self._holds:
            if self._opens is not None:
                allowed[self._opens] = True
            return allowed
        allowed[:] = True
        allowed[self._never] = False
        return allowed

    def accept(self, token_id: int) -> None:
        """Moves on by one token."""
        opens, self._opens = self._opens, None
        if opens is not None and token_id == opens:
            self._holds = False
        elif self._holds:
            self._inner.accept(token_id)
        else:
            self._ids = [*self._ids, token_id][-_TAIL:]
            self._holds = self._closes(self._ids)

    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self._holds and self._inner.finished()


def after_reasoning(inner: Grammar, tokenizer: Any, prompt: list[int]) -> Grammar:
    """The grammar, held back while the model reasons after this prompt."""
    vocabulary = getattr(tokenizer, "vocabulary", None)
    if vocabulary is None:
        return inner
    channel, message, ends = (vocabulary.id_of(mark) for mark in _HARMONY)
    if channel is not None and message is not None and ends is not None:

        def to_final(ids: list[int]) -> bool:
            if ids[-1] != message or channel not in ids:
                return False
            begin = len(ids) - ids[::-1].index(channel)
            return str(tokenizer.decode(ids[begin:-1])).strip().startswith("final")

        return Deferred(inner, to_final, frozenset({ends}))
    tail = tokenizer.decode(prompt[-_TAIL:]).rstrip()
    for opening, closing in _TAGS:
        token = vocabulary.id_of(opening)

        def closed(ids: list[int], mark: str = closing) -> bool:
            return mark in tokenizer.decode(ids)

        if tail.endswith(opening):
            return Deferred(inner, closed, tokenizer.eog_ids)
        if token is not None and not tail.endswith(closing):
            return Deferred(inner, closed, tokenizer.eog_ids, token)
    return inner
