"""Byte-level byte-pair encoding (`tokenizer.ggml.model = gpt2`) on top of HF `tokenizers`.

It turns pieces of plain text into ids and ids into bytes. It does not know special tokens.
"""

import gc
from collections.abc import Sequence
from functools import cache

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from greenroom.errors import ContextLengthError, TokenizerError
from greenroom.tokenizer.pretokenizers import pre_tokenizer

_LONG = 512  # characters
_PART = 1 << 14  # characters; what comes of them is freed with the interpreter lock held
_CUT = 64  # more tokens than a cut through a text can make of it


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others for
    U+0100 upwards in order."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printing}
    hidden = (byte for byte in range(256) if byte not in printing)
    table |= {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
    return table


class BytePairEncoder:
    """Encodes text with the merges of a GGUF file.

    Args:
        vocab: ids of the tokens that text may become, in the printable byte alphabet. Special
            tokens are not among them: however the text reads, it cannot become one.
        merges: "left right" pairs, best first.
        pre: the name of the pre-tokenizer.
        composes: whether text is brought into Unicode's form NFC first.
    """

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[str], pre: str, composes: bool = False
    ) -> None:
        rules = pre_tokenizer(pre)
        model = _model(vocab, merges, rules.ignore_merges)
        self._tokenizer = Tokenizer(model)
        self.limit: int | None = None  # ids of one text
        if composes:
            # Not Python's: publishers' files mean this library's tables, of another Unicode.
            self._tokenizer.normalizer = normalizers.NFC()
        splits = [
            pre_tokenizers.Split(Regex(expression), behavior="isolated")
            for expression in rules.expressions
        ]
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, alphabet])

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text without special tokens.

        Raises ContextLengthError for clearly more than `limit`: to free what the library makes
        of millions keeps the interpreter lock, which no server can have for a text that is
        refused anyway.
        """
        if len(text) < _LONG:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        # `encode` keeps the interpreter lock, seconds for a long text; a batch gives it up.
        self._refuse_long(text)
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(found.ids)

    def _refuse_long(self, text: str) -> None:
        """Counts the tokens of parts, each by itself."""
        if self.limit is None or len(text) <= _PART:
            return
        count = 0
        for at in range(0, len(text), _PART):
            part = [text[at : at + _PART]]
            (found,) = self._tokenizer.encode_batch_fast(part, add_special_tokens=False)
            count += len(found) - _CUT
            if count > self.limit:
                message = f"a text of more than {count} tokens, at most {self.limit}"
                raise ContextLengthError(message)

    @staticmethod
    def piece_bytes(text: str) -> bytes:
        """The bytes a vocabulary entry stands for."""
        table = _byte_of_character()
        return b"".join(
            bytes((table[c],)) if c in table else c.encode("utf-8", "replace") for c in text
        )


def _model(vocab: dict[str, int], merges: Sequence[str], ignore_merges: bool) -> models.BPE:
    # Hundreds of thousands of small tuples wake the garbage collector again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        # A token may hold a space only as its first character.
        pairs = [(m[: (at := m.find(" ", 1))], m[at + 1 :]) for m in merges]
        try:
            return models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges)
        except Exception:  # the library raises plain Exception for a merge it cannot place
            known = [(a, b) for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
            if len(known) == len(pairs):
                raise TokenizerError("the merges of the vocabulary cannot be used") from None
            return models.BPE(vocab=vocab, merges=known, ignore_merges=ignore_merges)
    finally:
        if collecting:
            gc.enable()
