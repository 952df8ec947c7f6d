"""A checkpoint's tokenizer as GGUF metadata: tokens, kinds, merges or scores, special ids,
chat templates.

Byte-level BPE comes from `tokenizer.json`; SentencePiece from `tokenizer.model`, or from a
`tokenizer.json` with byte fallback. Knows no model.
"""

from pathlib import Path
from typing import Any

from greenroom.convert.config import Config, read_json
from greenroom.convert.pre_tokenizers import recognise
from greenroom.errors import TokenizerError
from greenroom.gguf import Typed, ValueType
from greenroom.tokenizer.vocabulary import NORMALIZER, TokenKind

_ADDED_SCORE = -1000.0  # as llama.cpp's converters give tokens that no merge makes
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class TokenTable:
    """Tokens by id, to be filled in any order; ids without a token become unused padding.

    Args:
        size: rows of the model's embedding.
    """

    def __init__(self, size: int) -> None:
        self.texts = [f"[PAD{i}]" for i in range(size)]
        self.scores = [_ADDED_SCORE] * size
        self.kinds = [int(TokenKind.UNUSED)] * size

    def put(self, token: int, text: str, kind: TokenKind, score: float = _ADDED_SCORE) -> None:
        """Sets a token; TokenizerError if the model's embedding has no row for it."""
        if not 0 <= token < len(self.texts):
            raise TokenizerError(
                f"token {text!r:.40} has id {token}, but the model has {len(self.texts)} rows"
            )
        self.texts[token], self.kinds[token], self.scores[token] = text, int(kind), score


def tokenizer_metadata(folder: Path, config: Config) -> dict[str, Any]:
    """All `tokenizer.*` keys; empty where the folder has no tokenizer.

    Raises:
        TokenizerError: it is of a kind that GGUF files cannot hold, not known, or damaged.
    """
    try:
        return _metadata(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TokenizerError(
            f"{folder}: the tokenizer's files are damaged ({reason:.100}); download them again"
        ) from None


def _metadata(folder: Path, config: Config) -> dict[str, Any]:
    description = read_json(folder / "tokenizer.json") if has(folder, "tokenizer.json") else {}
    table = TokenTable(config.count("vocab_size"))
    if has(folder, "tokenizer.model"):
        keys = _sentencepiece(folder / "tokenizer.model", table)
        _put_added(table, _added_tokens(folder, description))
        keys |= _listed(table, scores=True)
    elif description.get("model", {}).get("type") == "BPE":
        _put_vocabulary(table, description)
        if description["model"].get("byte_fallback"):
            keys = _byte_fallback(table, description)
        else:
            keys = _byte_level(folder, table, description)
    elif description:
        kind = description.get("model", {}).get("type")
        raise TokenizerError(f"{folder}: a tokenizer of kind {kind!r} is not supported; BPE is")
    else:
        return {}
    keys |= _special_ids(folder, config, table.texts, description)
    return keys | chat_templates(folder)


def has(folder: Path, name: str) -> bool:
    """Whether the folder has this file."""
    return (folder / name).is_file()


def _listed(table: TokenTable, scores: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": table.texts}
    if scores:
        keys["tokenizer.ggml.scores"] = Typed(ValueType.F32, table.scores)
    keys["tokenizer.ggml.token_type"] = Typed(ValueType.I32, table.kinds)
    return keys


def _added_tokens(folder: Path, description: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(id, text, special) of tokens beside the vocabulary, from wherever they are listed."""
    found = {
        int(item["id"]): (item["content"], bool(item.get("special")))
        for item in description.get("added_tokens") or []
    }
    if has(folder, "tokenizer_config.json"):
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for token, item in decoder.items():
            found.setdefault(int(token), (item["content"], bool(item.get("special"))))
    if has(folder, "added_tokens.json"):
        for text, token in read_json(folder / "added_tokens.json").items():
            found.setdefault(int(token), (text, True))
    return [(token, *found[token]) for token in sorted(found)]


def _put_added(table: TokenTable, added: list[tuple[int, str, bool]]) -> None:
    for token, text, special in added:
        known = 0 <= token < len(table.texts) and table.texts[token] == text
        if known and table.kinds[token] in (TokenKind.UNKNOWN, TokenKind.CONTROL):
            continue
        table.put(token, text, TokenKind.CONTROL if special else TokenKind.USER_DEFINED)


def _sentencepiece(path: Path, table: TokenTable) -> dict[str, Any]:
    """Tokens and scores of a SentencePiece model; the flags its normaliser has."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    kinds = {
        TokenKind.UNKNOWN: pieces.IsUnknown,
        TokenKind.CONTROL: pieces.IsControl,
        TokenKind.UNUSED: pieces.IsUnused,
        TokenKind.BYTE: pieces.IsByte,
    }
    for token in range(pieces.GetPieceSize()):
        kind = next((k for k, holds in kinds.items() if holds(token)), TokenKind.NORMAL)
        table.put(token, pieces.IdToPiece(token), kind, pieces.GetScore(token))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": _adds_space(pieces),
    }


def _adds_space(pieces: Any) -> bool:
    """Whether a text gets a space in front of it."""
    return "".join(pieces.EncodeAsPieces("a")).startswith("▁")


def _put_vocabulary(table: TokenTable, description: dict[str, Any]) -> None:
    for text, token in description["model"]["vocab"].items():
        table.put(token, text, TokenKind.NORMAL)
    added = [
        (int(item["id"]), item["content"], bool(item.get("special")))
        for item in description.get("added_tokens") or []
    ]
    _put_added(table, added)


def _merges(description: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = description["model"].get("merges") or []
    return [tuple(p) if isinstance(p, list) else tuple(p.split(" ", 1)) for p in pairs]


def _byte_level(folder: Path, table: TokenTable, description: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's kind: merges, and the name of the pre-tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ignore_merges = bool(description["model"].get("ignore_merges"))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": recognise(tokenizer, ignore_merges),
        NORMALIZER: _normaliser(folder, description.get("normalizer")),
        **_listed(table, scores=False),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in _merges(description)],
    }


def _normaliser(folder: Path, description: dict[str, Any] | None) -> str:
    """ "NFC", or "" for none; TokenizerError for others: the model would get wrong tokens."""
    steps = [description] if description else []
    if description and description.get("type") == "Sequence":
        steps = description.get("normalizers") or []
    kinds = {str(step.get("type")) for step in steps}
    if kinds - {"NFC"}:
        raise TokenizerError(
            f"{folder}: its tokenizer normalises text by {', '.join(sorted(kinds))}, which is not "
            "supported; NFC is"
        )
    return "NFC" if kinds else ""


def _byte_fallback(table: TokenTable, description: dict[str, Any]) -> dict[str, Any]:
    """A SentencePiece model somebody turned into merges: the earlier a merge, the better its
    token's score. Bytes are spelled <0x00>; the first piece of a text may get a space."""
    for rank, (left, right) in reversed(list(enumerate(_merges(description)))):
        token = description["model"]["vocab"].get(left + right)
        if token is not None and table.kinds[token] == TokenKind.NORMAL:
            table.scores[token] = -float(rank)
    for token, text in enumerate(table.texts):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            table.put(token, text, TokenKind.BYTE)
        elif text == description["model"].get("unk_token"):
            table.put(token, text, TokenKind.UNKNOWN)
    spelled = str(description.get("normalizer")) + str(description.get("pre_tokenizer"))
    prefix = "'Prepend'" in spelled or "'prepend_scheme': 'first'" in spelled
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix or "'prepend_scheme': 'always'" in spelled,
        **_listed(table, scores=True),
    }


def _special_ids(
    folder: Path, config: Config, texts: list[str], description: dict[str, Any]
) -> dict[str, Any]:
    """Ids by role, and whether a text begins with BOS or ends with EOS."""
    ids = {text: token for token, text in enumerate(texts)}
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if has(folder, name):
            named |= {k: v for k, v in read_json(folder / name).items() if v is not None}
    keys: dict[str, Any] = {}
    for role, key in _ROLES.items():
        text = named.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        token = ids.get(text) if isinstance(text, str) else _first(config.get(f"{role}_token_id"))
        if token is not None and 0 <= token < len(texts):
            keys[f"tokenizer.ggml.{key}_token_id"] = token
    added = _added_by_template(description)
    for role in ("bos", "eos"):
        flag = named.get(f"add_{role}_token", added.get(role))
        if flag is not None:
            keys[f"tokenizer.ggml.add_{role}_token"] = bool(flag)
        elif role == "bos" and "tokenizer.ggml.bos_token_id" in keys and description:
            keys["tokenizer.ggml.add_bos_token"] = False
    return keys


def _first(value: Any) -> int | None:
    """A config's id, or the first of several."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _added_by_template(description: dict[str, Any]) -> dict[str, bool]:
    """What the post-processor of a tokenizer.json puts around a text."""
    post = description.get("post_processor") or {}
    steps = post.get("processors", [post])
    template = next((s["single"] for s in steps if s.get("type") == "TemplateProcessing"), None)
    if not template:
        return {}
    return {"bos": "SpecialToken" in template[0], "eos": "SpecialToken" in template[-1]}


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat template, and others by their names."""
    if has(folder, "chat_template.jinja"):
        return {"tokenizer.chat_template": (folder / "chat_template.jinja").read_text("utf-8")}
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if has(folder, name) else None
        if isinstance(found, str):
            return {"tokenizer.chat_template": found}
        if isinstance(found, list):
            named = {item["name"]: item["template"] for item in found}
            prefix = "tokenizer.chat_template"
            return {
                prefix if name == "default" else f"{prefix}.{name}": text
                for name, text in named.items()
            }
    return {}
