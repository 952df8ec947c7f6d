"""What a GGUF file's metadata says about its tokens: texts, kinds, special ids, end tokens.

It reads `tokenizer.ggml.*` and checks every id against the vocabulary. It does not encode.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

from greenroom.errors import TokenizerError
from greenroom.tokenizer.pretokenizers import pre_tokenizer


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts by which a token that ends a turn is recognised whatever the file says of it; the list
# is that of llama.cpp, which files are tested with.
END_TEXTS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
# Fill-in-the-middle padding and repository marks: after them comes another document.
_DOCUMENT_ENDS = frozenset(
    [
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<reponame>",
        "<|file_sep|>",
    ]
)
# Also ordinary text (HTML, placeholders): believed only of tokens the file sets apart.
_AMBIGUOUS = frozenset(["</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "[e~[", "<reponame>"])
# Our converter's key: "NFC", or "" for a byte-level tokenizer that takes text as it is.
NORMALIZER = "greenroom.tokenizer.normalizer"
_END_KEYS = ("eos", "eot", "eom")
_SPM_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a model; `texts[id]` and `kinds[id]` are as the file has them.

    Ids that the file does not set are None. `end_ids` are the tokens after which generation
    stops. `strip_after` holds control tokens that swallow the white space behind them.
    """

    model: str  # "gpt2" or "llama"
    pre: str
    texts: Sequence[str]
    kinds: Sequence[int]
    special: Mapping[str, int]  # role ("bos", "eos", "unknown", "padding", ...) -> id
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    end_ids: frozenset[int]
    strip_after: frozenset[int]
    composes: bool = False  # text is brought into Unicode's form NFC before it is cut

    @cached_property
    def marked(self) -> list[tuple[str, int, TokenKind]]:
        """(text, id, kind) of the tokens that are not made by merges, longest text first."""
        kinds = (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.USER_DEFINED)
        found = [
            (self.texts[i], i, TokenKind(kind))
            for i, kind in enumerate(self.kinds)
            if kind in kinds and self.texts[i]
        ]
        # llama.cpp sorts by bytes; equal lengths cannot be told apart by order.
        return sorted(found, key=lambda item: len(item[0].encode()), reverse=True)

    def id_of(self, text: str) -> int | None:
        """The id of a control or user-defined token with this text."""
        return self._marked_ids.get(text)

    @cached_property
    def _marked_ids(self) -> dict[str, int]:
        return {text: token for text, token, _ in self.marked}


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Build a Vocabulary from a GGUF file's metadata.

    Raises TokenizerError where the tokenizer is of a kind not supported or the entries
    contradict each other.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise TokenizerError(
            f"tokenizer.ggml.model is {model!r}; supported: 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece)"
        )
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise TokenizerError("the file has no vocabulary: tokenizer.ggml.tokens is missing")
    pre = str(metadata.get("tokenizer.ggml.pre") or "default")
    spm = model == "llama"
    adds_bos = spm or pre_tokenizer(pre).add_bos
    special = _special_ids(metadata, len(texts), _SPM_DEFAULTS if spm else {})
    kinds = _kinds(metadata, texts)
    flags = {
        name: bool(metadata.get(f"tokenizer.ggml.add_{name}_token", default))
        for name, default in (("bos", adds_bos), ("eos", False))
    }
    return Vocabulary(
        model=model,
        pre=pre,
        texts=texts,
        kinds=kinds,
        special=special,
        add_bos=flags["bos"] and "bos" in special,
        add_eos=flags["eos"] and "eos" in special,
        add_space_prefix=spm and bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        end_ids=_end_ids(texts, kinds, special),
        strip_after=_strip_after(metadata, texts, kinds) if spm else frozenset(),
        composes=not spm and _composes(metadata, pre),
    )


def _composes(metadata: Mapping[str, Any], pre: str) -> bool:
    """Whether the publisher's tokenizer normalises to NFC, which GGUF has no key for: our
    converter writes one; the tokenizers of Qwen and OLMoE are known to do it."""
    written = metadata.get(NORMALIZER)
    if written is not None:
        return bool(written == "NFC")
    architecture = str(metadata.get("general.architecture", ""))
    return (pre == "qwen2" and architecture.startswith("qwen")) or architecture == "olmoe"


def _special_ids(
    metadata: Mapping[str, Any], size: int, defaults: Mapping[str, int]
) -> dict[str, int]:
    """Ids by role; a role is what stands between `tokenizer.ggml.` and `_token_id`."""
    found = {role: token for role, token in defaults.items() if token < size}
    for key in metadata:
        if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
            continue
        value = metadata[key]
        role = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
        if 0 <= int(value) < size:
            found[role] = int(value)
        elif role in ("bos", "eos"):
            raise TokenizerError(f"{key} is {value}, outside the vocabulary of {size} tokens")
    return found


def _kinds(metadata: Mapping[str, Any], texts: Sequence[str]) -> list[int]:
    """Kinds as the file gives them; what reads like an end of turn becomes a control token."""
    given = metadata.get("tokenizer.ggml.token_type")
    kinds = [int(TokenKind.NORMAL)] * len(texts) if given is None else [int(k) for k in given]
    if len(kinds) != len(texts):
        raise TokenizerError(
            f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(texts)} tokens"
        )
    ends = END_TEXTS | _DOCUMENT_ENDS
    for token, text in enumerate(texts):
        if text not in ends or kinds[token] == TokenKind.UNKNOWN:
            continue
        if kinds[token] != TokenKind.NORMAL or text not in _AMBIGUOUS:
            kinds[token] = int(TokenKind.CONTROL)
    return kinds


def _end_ids(
    texts: Sequence[str], kinds: Sequence[int], special: Mapping[str, int]
) -> frozenset[int]:
    """Tokens that end generation, by text as well as by id.

    Where `<|return|>` and `<|call|>` exist (gpt-oss; `<|calls|>` and `<|flush|>` elsewhere),
    `<|end|>` only closes a message: were it an end, the model would stop after its analysis.
    """
    ends_by_text = END_TEXTS | _DOCUMENT_ENDS
    by_text = {
        text: token
        for token, text in enumerate(texts)
        if text in ends_by_text and kinds[token] == TokenKind.CONTROL
    }
    ends = set(by_text.values()) | {special[role] for role in _END_KEYS if role in special}
    messages_end_otherwise = {"<|return|>", "<|call|>"} <= by_text.keys() or (
        "<|flush|>" in by_text and not by_text.keys().isdisjoint({"<|call|>", "<|calls|>"})
    )
    if messages_end_otherwise:
        ends.discard(by_text.get("<|end|>", -1))
    if "<|tool_response>" in by_text:  # there `</s>` is an HTML tag, not an end
        ends.discard(by_text.get("</s>", -1))
    return frozenset(ends)


def _strip_after(
    metadata: Mapping[str, Any], texts: Sequence[str], kinds: Sequence[int]
) -> frozenset[int]:
    """Phi-3's added tokens swallow white space behind them (`rstrip` in the publisher's
    tokenizer, which GGUF has no key for); llama.cpp knows them by the model's name."""
    name = str(metadata.get("general.name", "")).lower()
    family = metadata.get("general.architecture") in ("phi3", "phimoe")
    if not (family or "phi-3" in name or "phi3" in name):
        return frozenset()
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    marked = (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.USER_DEFINED)
    return frozenset(i for i, text in enumerate(texts) if kinds[i] in marked and text not in keeps)
