"""Recognises a publisher's pre-tokenizer by what it does, and names it as GGUF files do.

A text with every kind of boundary is cut by the publisher's `tokenizer.json` and by each
pre-tokenizer we have; the one that cuts alike is the one, however its expressions are spelled.
"""

from typing import TYPE_CHECKING

from greenroom.errors import TokenizerError
from greenroom.tokenizer.pretokenizers import pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Names to try, the commonest of those that cut alike first. llama.cpp knows all of them.
# Of two that cut alike, `ignore_merges` decides.
CANDIDATES = (
    "gpt-4o",
    "llama-bpe",
    "dbrx",
    "qwen2",
    "qwen35",
    "tekken",
    "gpt-2",
    "refact",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "default",
)

PROBE = (
    "Hello, World! I'm sure they'LL say it's OK; we've 1 12 123 1234 12345 things.\n"
    "  two spaces,   three   \n\n\ttabs\t\there \r\n  \n   indented\n"
    "camelCase HTTPServer iPhone's XMLhttp x2y3 v1.2.3 3.14159 1,000,000 a/b//c\\d\n/path/\n"
    "Größe ÉCOLE straße naïve Ünïcödé ǅ ʰʷ привет МИР Ελληνικά\u0301 नमस्ते สวัสดี\n"
    "你好，世界。日本語テキスト カタカナ 한국어 ٣٤٥ ½ ² Ⅷ ①\n"
    "!!! ... --- ### $$$ ^^^ ~~~ ||| <<< >>> === +++ `code` \"quoted\" 'single' (a)[b]{c}\n"
    "!word $word (word .word _word \u00a0nbsp 🙂🙂 emoji👍🏽 e\u0301\u0302 \u200d zwj\n"
    "don't DON'T 'tis 'S 'rest you'd've  trailing   "
)


def recognise(tokenizer: "Tokenizer", ignore_merges: bool = False) -> str:
    """The name for `tokenizer.ggml.pre`.

    Args:
        tokenizer: a byte-level BPE tokenizer.
        ignore_merges: whether its words that are tokens are taken as they are.

    Raises:
        TokenizerError: none of ours cuts as this one does.
    """
    wanted = _cuts(tokenizer.pre_tokenizer)
    alike = [name for name in CANDIDATES if _own_cuts(name) == wanted]
    if not alike:
        raise TokenizerError(
            "the tokenizer.json cuts words in a way that has no name in GGUF files; the model "
            f"would get wrong tokens. Known: {', '.join(CANDIDATES)}"
        )
    same = [name for name in alike if pre_tokenizer(name).ignore_merges == ignore_merges]
    return (same or alike)[0]


def _cuts(pre: object) -> list[tuple[int, int]]:
    """Begin and end of the pieces of PROBE, in characters."""
    if pre is None:
        return [(0, len(PROBE))]
    pieces = pre.pre_tokenize_str(PROBE)  # type: ignore[attr-defined]
    return [span for _, span in pieces if span[0] < span[1]]


def _own_cuts(name: str) -> list[tuple[int, int]]:
    from tokenizers import Regex, pre_tokenizers

    splits = [
        pre_tokenizers.Split(Regex(expression), behavior="isolated")
        for expression in pre_tokenizer(name).expressions
    ]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _cuts(pre_tokenizers.Sequence([*splits, alphabet]))
