"""Vocabularies for the tests: small ones made here, published ones beside the checkout."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from greenroom.tokenizer import Tokenizer
from greenroom.tokenizer.bpe import _byte_of_character

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
PUBLISHED = Path(__file__).parents[2] / "../shared/data/vocab"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARMONY = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]


def bpe_metadata(
    control: Sequence[str] = CHATML,
    user_defined: Sequence[str] = (),
    merges: Sequence[str] = ("h e", "l l", "he ll", "hell o", "Ġ w"),
    **extra: Any,
) -> dict[str, Any]:
    """A byte-level BPE vocabulary: 256 bytes, a few merges, the given special tokens."""
    alphabet = [c for c, _ in sorted(_byte_of_character().items(), key=lambda item: item[1])]
    words = [merge.replace(" ", "") for merge in merges]
    texts = [*alphabet, *words, *control, *user_defined]
    kinds = [NORMAL] * (256 + len(words))
    kinds += [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
    }
    return metadata | {key.replace("__", "."): value for key, value in extra.items()}


def spm_metadata(control: Sequence[str] = ("<s>", "</s>"), **extra: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk>, control tokens, 256 bytes, a few pieces."""
    pieces = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "▁w"]
    texts = ["<unk>", *control, *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    kinds = [UNKNOWN] + [CONTROL] * len(control) + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * (257 + len(control)) + [-float(len(pieces) - n) for n in range(len(pieces))]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }
    return metadata | {key.replace("__", "."): value for key, value in extra.items()}


def bpe_tokenizer(**arguments: Any) -> Tokenizer:
    return Tokenizer.from_metadata(bpe_metadata(**arguments))


@cache
def published(name: str) -> Tokenizer:
    """The tokenizer of a published vocabulary; skips the test where it is absent."""
    return Tokenizer.from_gguf(published_path(name))


def published_path(name: str) -> Path:
    path = PUBLISHED / f"{name}.gguf"
    if not path.exists():
        pytest.skip(f"the published vocabulary {name} is not beside this checkout")
    return path
