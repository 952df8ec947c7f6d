"""A model's tokenizer, built from its GGUF metadata alone: text to ids and back.

It joins the vocabulary, the cutting at special tokens and one of the two encoders. It does not
know chat formats.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from greenroom.errors import TokenizerError
from greenroom.tokenizer.bpe import BytePairEncoder
from greenroom.tokenizer.portions import portions
from greenroom.tokenizer.special import SpecialTokens
from greenroom.tokenizer.spm import SentencePieceEncoder
from greenroom.tokenizer.stream import StreamDecoder
from greenroom.tokenizer.vocabulary import TokenKind, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from greenroom.gguf import GGUFFile


class Tokenizer:
    """Encodes and decodes with a model's vocabulary. Safe to use from several threads.

    Attributes:
        vocabulary: the tokens as the file has them.
        bos_id, eos_id: or None where the model has none.
        eog_ids: tokens after which generation stops.
    """

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        self.vocabulary = vocabulary
        self.bos_id = vocabulary.special.get("bos")
        self.eos_id = vocabulary.special.get("eos")
        self.eog_ids = vocabulary.end_ids
        self._special = SpecialTokens(vocabulary)
        self._bytes: dict[int, bytes] = {}
        self._encoder = _encoder(vocabulary, metadata)

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | GGUFFile) -> Tokenizer:
        """The tokenizer of a GGUF file, given open or as a path.

        Raises TokenizerError where its kind or pre-tokenizer is not supported, ModelFileError
        where the file cannot be read.
        """
        if isinstance(source, str | os.PathLike):
            from greenroom.gguf import GGUFFile

            with GGUFFile(source) as file:
                return cls.from_metadata(file.metadata)
        return cls.from_metadata(source.metadata)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The same from metadata that was read already."""
        return cls(read_vocabulary(metadata), metadata)

    def refuse_beyond(self, tokens: int) -> None:
        """From now on long texts of more tokens raise ContextLengthError, where the encoder can
        tell before it has made the ids."""
        if isinstance(self._encoder, BytePairEncoder):
            self._encoder.limit = tokens

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens in the vocabulary; the model's output may be padded beyond it."""
        return len(self.vocabulary.texts)

    def encode(
        self, text: str, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: anything; lone surrogates become U+FFFD.
            add_special: add BOS and EOS where the model wants them.
            parse_special: read the texts of control tokens as those tokens. Leave it off for
                text that a user wrote.
        """
        return self.encode_pieces(self.partition(text, parse_special), add_special)

    def partition(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at special tokens: pieces of text and ids, in order."""
        return self._special.partition(_without_surrogates(text), parse_special)

    def encode_pieces(self, pieces: Iterable[str | int], add_special: bool = False) -> list[int]:
        """Ids of text that is cut already; pieces of text are not looked at for tokens again."""
        ids: list[int] = []
        if add_special and self.vocabulary.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encoder.encode(piece)
        if add_special and self.vocabulary.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """
        stream = self.stream(skip_special)
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def stream(self, skip_special: bool = False, context: Iterable[int] = ()) -> StreamDecoder:
        """A decoder for ids that come one by one; see StreamDecoder."""
        return StreamDecoder(self, skip_special, context)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; TokenizerError for an id outside the vocabulary."""
        cached = self._bytes.get(token)
        if cached is not None:
            return cached
        self._check(token)
        text, kind = self.vocabulary.texts[token], self.vocabulary.kinds[token]
        if self.is_special(token) or kind == TokenKind.USER_DEFINED:
            data = text.encode("utf-8", "replace")
        elif self.vocabulary.model == "llama" or kind == TokenKind.BYTE:
            data = SentencePieceEncoder.piece_bytes(text, kind)
        else:
            data = BytePairEncoder.piece_bytes(text)
        self._bytes[token] = data
        return data

    def is_special(self, token: int) -> bool:
        """True for control and unknown tokens: marks, not text."""
        self._check(token)
        return self.vocabulary.kinds[token] in (TokenKind.CONTROL, TokenKind.UNKNOWN)

    def opens_text(self, token: int) -> bool:
        """True where the encoder puts a space before text after this token (-1: the start)."""
        if not self.vocabulary.add_space_prefix:
            return False
        if token == -1 or self.is_special(token):
            return True
        return self.vocabulary.kinds[token] == TokenKind.USER_DEFINED

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self.vocabulary.texts):
            raise TokenizerError(
                f"token id {token} is outside the vocabulary of {self.vocabulary_size} tokens"
            )


def _encoder(
    vocabulary: Vocabulary, metadata: Mapping[str, Any]
) -> BytePairEncoder | SentencePieceEncoder:
    if vocabulary.model == "llama":
        scores = metadata.get("tokenizer.ggml.scores")
        if scores is None:
            raise TokenizerError("the file has no tokenizer.ggml.scores, which 'llama' needs")
        return SentencePieceEncoder(vocabulary, scores)
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise TokenizerError("the file has no tokenizer.ggml.merges, which 'gpt2' needs")
    marks = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
    pairs = zip(vocabulary.texts, vocabulary.kinds, strict=True)
    vocab = {text: token for token, (text, kind) in enumerate(pairs) if kind not in marks}
    return BytePairEncoder(vocab, merges, vocabulary.pre, vocabulary.composes)


def _without_surrogates(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        for part in portions(text):
            part.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
