"""The regular expressions that cut text into words before byte-pair merges, by GGUF name.

Each entry is a list applied one after the other: every match becomes a piece of its own, what
lies between matches stays a piece, and the next expression works inside the pieces. It knows
nothing of vocabularies. The facts are those of the publishers' `tokenizer.json` files and, where
a publisher's tokenizer cannot be named (`default`), of llama.cpp's `llama-vocab.cpp`.
"""

from dataclasses import dataclass

from greenroom.errors import TokenizerError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _words(digits: str, letters: str = r"\p{L}", not_symbol: str = r"\p{L}\p{N}") -> str:
    """The family of llama-3 and qwen2; they differ in digits per piece and in what a letter is."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}"
        rf"| ?[^\s{not_symbol}]+[\r\n]*|{_SPACES}"
    )


def _cased(digits: str, contraction: str) -> str:
    """The family of o200k: a word is upper case, then lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


# Letters of scripts with case, as the publisher wrote the list (it misses some: Armenian lower
# case, Georgian), so it cannot be replaced by a Unicode property.
_DEEPSEEK_CASED = (
    (
        r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
        r"\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
        r"\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
        r"\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
        r"\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
        r"\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
        r"\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
        r"\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
        r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
        r"\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
        r"\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
        r"\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
        r"\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    )
    .encode("ascii")
    .decode("unicode_escape")
)
# The ranges `:-~` (which takes in the ASCII letters) and up to U+4E00 are the publisher's too.
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "refact": (r"\p{N}", _GPT2),
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "qwen35": (_words(r"\p{N}", r"\p{L}\p{M}", r"\p{L}\p{M}\p{N}"),),
    "gpt-4o": (_cased(r"\p{N}{1,3}", rf"{_CONTRACTION}?"),),
    "tekken": (_cased(r"\p{N}", ""),),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_CASED}]+",
        rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
        r"(?<!\s)\s+$",  # published without the look-behind: the same, in quadratic time
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _DEEPSEEK_V3_WORDS,
    ),
}

# fmt: off
_SAME_AS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (
        "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx",
        "smaug-bpe", "glm4", "chatglm-bpe",
    ),
    "gpt-2": (
        "olmo", "phi-2", "mpt", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0",
        "mellum", "modern-bert", "exaone4", "jina-es", "jina-de",
    ),
    "refact": (
        "smollm", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    ),
    "qwen2": (
        "hunyuan", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "solar-open",
        "grok-2",
    ),
    "gpt-4o": ("llama4", "minimax-m2", "kanana2", "talkie"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
}
# fmt: on
_ALIASES = {alias: name for name, aliases in _SAME_AS.items() for alias in aliases}

# A word that is a token as it stands is not rebuilt by merges (tiktoken's rule); only some
# publishers' converters keep vocabularies in which that makes a difference.
_WHOLE_WORDS = frozenset({"llama-bpe", "tekken"})
_LIKE_LLAMA3_ONLY_IN_SPLITS = frozenset({"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"})


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before the merges.

    `expressions` in order of use; `ignore_merges`: whole words that are tokens are taken as
    they are; `add_bos`: what holds where the file does not say whether a BOS token is added.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool
    add_bos: bool


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer a GGUF file names in `tokenizer.ggml.pre`; TokenizerError if unknown."""
    base = _ALIASES.get(name, name)
    if base not in _EXPRESSIONS:
        raise TokenizerError(
            f"pre-tokenizer {name!r} is not supported, and guessing would give wrong tokens; "
            f"supported: {', '.join(sorted(_EXPRESSIONS | _ALIASES))}"
        )
    whole = base in _WHOLE_WORDS and name not in _LIKE_LLAMA3_ONLY_IN_SPLITS
    return PreTokenizer(_EXPRESSIONS[base], ignore_merges=whole, add_bos=whole)
