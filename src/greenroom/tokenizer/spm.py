"""SentencePiece encoding (`tokenizer.ggml.model = llama`): a ModelProto rebuilt from GGUF.

The library does the merging; control and user-defined tokens are cut out before it sees the
text, so here they only hold their places. It turns plain text into ids and ids into bytes.
"""

import re
import struct
from collections.abc import Sequence

import sentencepiece

from greenroom.errors import TokenizerError
from greenroom.tokenizer.vocabulary import TokenKind, Vocabulary

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Field numbers and values of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE_PIECE = 1, 2, 3, 5, 6
_BPE = 2


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _block(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _pieces(
    vocabulary: Vocabulary, scores: Sequence[float], unknown: int, has_bytes: bool
) -> bytes:
    kinds = {TokenKind.NORMAL: _NORMAL, TokenKind.UNUSED: _UNUSED}
    if has_bytes:
        kinds[TokenKind.BYTE] = _BYTE_PIECE
    seen: set[str] = set()
    out = bytearray()
    for token, text in enumerate(vocabulary.texts):
        kind = kinds.get(TokenKind(vocabulary.kinds[token]), _CONTROL)
        if token == unknown:
            kind = _UNKNOWN
        if not text or text in seen:  # the library wants every piece once
            text, kind = f"<unreachable {token}>", _CONTROL
        seen.add(text)
        piece = _block(1, text.encode("utf-8", "replace"))
        out += _block(1, piece + _float(2, float(scores[token])) + _number(3, kind))
    return bytes(out)


def _proto(vocabulary: Vocabulary, scores: Sequence[float]) -> bytes:
    unknown = vocabulary.special.get("unknown", 0)
    has_bytes = sum(kind == TokenKind.BYTE for kind in vocabulary.kinds) == 256
    trainer = _number(3, _BPE) + _number(4, len(vocabulary.texts)) + _number(35, has_bytes)
    trainer += _number(40, unknown)
    trainer += b"".join(_number(field, (1 << 64) - 1) for field in (41, 42, 43))  # none: -1
    # No character map, no trimming: the text is taken as it is, spaces made visible.
    normalizer = _block(1, b"identity") + _number(3, vocabulary.add_space_prefix)
    normalizer += _number(4, 0) + _number(5, 1)
    pieces = _pieces(vocabulary, scores, unknown, has_bytes)
    return pieces + _block(2, trainer) + _block(3, normalizer)


class SentencePieceEncoder:
    """Encodes text with the pieces and scores of a GGUF file.

    Args:
        vocabulary: the tokens.
        scores: one per token, higher merges first.
    """

    def __init__(self, vocabulary: Vocabulary, scores: Sequence[float]) -> None:
        if len(scores) != len(vocabulary.texts):
            raise TokenizerError(
                f"tokenizer.ggml.scores has {len(scores)} entries "
                f"for {len(vocabulary.texts)} tokens"
            )
        try:
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=_proto(vocabulary, scores)
            )
        except RuntimeError as error:
            raise TokenizerError(f"the SentencePiece vocabulary cannot be used: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text without special tokens; a space is put before it where the
        model wants one."""
        ids: list[int] = self._processor.encode(text)
        return ids

    @staticmethod
    def piece_bytes(text: str, kind: int) -> bytes:
        """The bytes a vocabulary entry stands for."""
        if kind == TokenKind.BYTE and (match := _BYTE.fullmatch(text)):
            return bytes((int(match[1], 16),))
        return text.replace(SPACE, " ").encode("utf-8", "replace")
