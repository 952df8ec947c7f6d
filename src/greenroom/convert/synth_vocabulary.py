"""Made-up vocabularies of published sizes: every byte, n-grams of letters, the special tokens.

English text becomes tokens of three to four letters, so that `run` and `chat` work and a
header is as heavy as a real one. Pieces mean nothing; random weights would not use them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import numpy as np

from greenroom.errors import UnsupportedModelError

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # by frequency in English


@dataclass(frozen=True, slots=True)
class Kind:
    """A tokenizer as published: `special` maps text to id, the rest is filled with n-grams."""

    model: str
    pre: str
    special: dict[str, int]
    roles: dict[str, str]  # role in the metadata -> text
    add_bos: bool
    merges: int  # published number, at the published size
    template: str


_GPT_OSS_SPECIAL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
_MESSAGES = "{% for message in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}"

KINDS: dict[str, Kind] = {
    "gpt-oss": Kind(
        model="gpt2",
        pre="gpt-4o",
        special=_GPT_OSS_SPECIAL,
        roles={"bos": "<|startoftext|>", "eos": "<|return|>", "padding": "<|endoftext|>"},
        add_bos=False,
        merges=446189,
        template=_MESSAGES
        + "<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>"
        + _END
        + "<|start|>assistant{% endif %}",
    ),
    "qwen": Kind(
        model="gpt2",
        pre="qwen2",
        special={"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
        roles={"bos": "<|endoftext|>", "eos": "<|im_end|>", "padding": "<|endoftext|>"},
        add_bos=False,
        merges=151387,
        template=_MESSAGES
        + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        + _END
        + "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "deepseek": Kind(
        model="gpt2",
        pre="deepseek-llm",
        special={"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001},
        roles={"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"},
        add_bos=True,
        merges=99757,
        template=_MESSAGES
        + "{% if message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}"
        + "{% else %}{{ 'User: ' + message.content + '\\n\\n' }}{% endif %}"
        + _END
        + "{{ 'Assistant:' }}{% endif %}",
    ),
    "phi": Kind(
        model="llama",
        pre="default",
        special={
            "<|endoftext|>": 32000,
            "<|assistant|>": 32001,
            "<|system|>": 32006,
            "<|end|>": 32007,
            "<|user|>": 32010,
        },
        roles={"bos": "<s>", "eos": "<|endoftext|>", "unknown": "<unk>"},
        add_bos=False,
        merges=0,
        template=_MESSAGES
        + "{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}"
        + _END
        + "{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    "llama": Kind(
        model="llama",
        pre="default",
        special={},
        roles={"bos": "<s>", "eos": "</s>", "unknown": "<unk>"},
        add_bos=True,
        merges=0,
        template="{{ bos_token }}"
        + _MESSAGES
        + "{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
        + "{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}",
    ),
}


def tokenizer_metadata(name: str, size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of vocabulary `name` with `size` tokens.

    Below the published size the special tokens move to the end.

    Raises:
        UnsupportedModelError: the size leaves no room for bytes and special tokens.
    """
    kind = KINDS[name]
    special = dict(kind.special)
    if special and max(special.values()) >= size:
        special = {text: size - len(special) + i for i, text in enumerate(special)}
    if size < 300 + len(special):
        raise UnsupportedModelError(f"{size} tokens are too few for bytes and special tokens")
    values = _sentencepiece(size, special) if kind.model == "llama" else _bpe(kind, size, special)
    tokens: list[str] = values["tokens"]
    values |= {f"{role}_token_id": tokens.index(text) for role, text in kind.roles.items()}
    values |= {"model": kind.model, "pre": kind.pre, "add_bos_token": kind.add_bos}
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return keys | {"tokenizer.chat_template": kind.template}


def _grams(space: str) -> Iterator[tuple[str, ...]]:
    """Pieces that grow into each other, the frequent ones first, as tuples of ways to cut
    them: the first is the one that merging uses."""
    two = [a + b for a, b in product(_LETTERS, repeat=2)]
    yield from ((f"{a} {b}",) for a, b in product(_LETTERS, repeat=2))
    yield from ((f"{space} {a}",) for a in _LETTERS)
    yield from ((f"{space} {a}", f"{space}{a[0]} {a[1]}") for a in two)
    for a, b in product(two, _LETTERS):
        yield (f"{a} {b}", f"{a[0]} {a[1]}{b}")
    for a, b in product(two, _LETTERS):
        yield (f"{space}{a} {b}", f"{space} {a}{b}", f"{space}{a[0]} {a[1]}{b}")
    for a, b in product(two, two):
        yield (f"{a} {b}", f"{a}{b[0]} {b[1]}", f"{a[0]} {a[1]}{b}")


def _printable_bytes() -> list[str]:
    """The character by which byte-level BPE writes each byte (GPT-2's table)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _placed(
    size: int, special: dict[str, int], begin: list[str], grams: Iterator[str]
) -> list[str]:
    """All token texts: `begin`, then n-grams around the special tokens, each at its id."""
    names = {token: text for text, token in special.items()}
    last = min(names, default=size)
    tokens = begin + list(islice(grams, last - len(begin)))
    return tokens + [names.get(i, f"<|reserved_{i}|>") for i in range(last, size)]


def _kinds(tokens: list[str], special: dict[str, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    kinds = np.full(len(tokens), NORMAL, np.int32)
    kinds[min(special.values(), default=len(tokens)) :] = CONTROL
    return kinds


def _bpe(kind: Kind, size: int, special: dict[str, int]) -> dict[str, Any]:
    texts = (ways[0].replace(" ", "") for ways in _grams("Ġ"))
    tokens = _placed(size, special, _printable_bytes(), texts)
    ways = list(islice(_grams("Ġ"), min(special.values()) - 256))
    merges = [way[0] for way in ways]
    published = size > max(kind.special.values())
    wanted = max(0, kind.merges - len(merges)) if published else 0
    # A published list has several ways to most tokens; the later ones are never reached.
    merges += islice((way for all in ways for way in all[1:]), wanted)
    return {"tokens": tokens, "token_type": _kinds(tokens, special), "merges": merges}


def _sentencepiece(size: int, special: dict[str, int]) -> dict[str, Any]:
    begin = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    single = ["▁", *(chr(code) for code in range(33, 127))]
    texts = (ways[0].replace(" ", "") for ways in _grams("▁"))
    tokens = _placed(size, special, [*begin, *single], texts)
    kinds = _kinds(tokens, special)
    kinds[0], kinds[1:3], kinds[3:259] = UNKNOWN, CONTROL, BYTE
    scores = -np.arange(size, dtype=np.float32)
    scores[:259] = 0
    # Merging takes the best score first: characters, which nothing merges to, come last.
    scores[259 : 259 + len(single)] = -float(size)
    return {"tokens": tokens, "token_type": kinds, "scores": scores}
