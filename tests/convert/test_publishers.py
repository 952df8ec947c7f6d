"""Every class with HF's own tokenizer files: text to ids, chats to ids and ids to logits here are
those of transformers on the same folder."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from greenroom.convert.config import Config
from greenroom.convert.convert import Conversion, convert
from greenroom.convert.vocabulary import tokenizer_metadata
from greenroom.errors import TokenizerError
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model
from greenroom.tokenizer import ChatFormat, Tokenizer
from greenroom.tokenizer.vocabulary import NORMALIZER, read_vocabulary

from ..models import hf_export
from ..models.sessions import one_pass, relative_error
from .checkpoints import LINES
from .publishers import OF_CLASS, PUBLISHERS, SIZE
from .test_convert import CLASSES, OPTIONS

logging.getLogger("transformers").setLevel(logging.ERROR)

TEXTS = [
    *LINES[:4],
    *("", " ", "\n", "x", "  two  spaces\n\n and\ttabs 🙂 e\u0301", "a  b   c    d\r\n\r\n  e"),
    *(
        "   lead",
        "trail   ",
        "A\u030a Ω \u2126 \ufb01 \u1e9b\u0323",
        "|||IP_ADDRESS||| is",
        "12345.6",
    ),
    *(
        "I'LL they're 'S don't",
        "\u200d\ufeff\u00a0\u3000x",
        "\x00\x01\x7f",
        "नमस्ते สวัสดี 한국어 مرحبا",
    ),
]
CHATS = [
    [{"role": "user", "content": "Hello <b>&amp; é"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?\nAnd  3+3?"},
        {"role": "assistant", "content": "4 and 6"},
        {"role": "user", "content": "Sure? 🙂 e\u0301"},
    ],
]


def random_text(rng: random.Random) -> str:
    """ASCII, white space, the first planes' scripts, and any other character."""
    kinds = (
        lambda: rng.randrange(32, 127),
        lambda: ord(rng.choice(" \n\t\r")),
        lambda: rng.randrange(0xA0, 0x3000),
        lambda: rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x30000)]),
    )
    weights = (4, 2, 2, 2)
    count = rng.randrange(1, 30)
    return "".join(chr(kind()) for kind in rng.choices(kinds, weights, k=count))


def publishers_tokenizer(folder: Path, name: str) -> Any:
    """What transformers makes of the folder.

    Of these two classes version 5 does not read tokenizer.json as it is: it builds Llama's
    tokenizer anew, in which a text that begins with a space does not get another one, as it does
    in SentencePiece and in the publishers' files.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rebuilt = name in ("GRIN-MoE", "Llama plain")
    return (PreTrainedTokenizerFast if rebuilt else AutoTokenizer).from_pretrained(folder)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", OF_CLASS)
def test_a_class_with_its_publishers_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    monkeypatch.setattr(hf_export, "VOCABULARY", SIZE + 8)
    tiny, folder = CLASSES[name](seed, tmp_path / "checkpoint")
    publisher = PUBLISHERS[OF_CLASS[name]]
    publisher.write(folder)
    convert(Conversion(folder), tmp_path / "out.gguf")
    theirs = publishers_tokenizer(folder, name)
    with GGUFFile(tmp_path / "out.gguf") as file:
        ours = Tokenizer.from_gguf(file)
        rng = random.Random(f"{name} {seed}")
        texts = TEXTS + [random_text(rng) for _ in range(100)]
        marks = [*publisher.special, *(text for text, *_ in publisher.added), "</s>"]
        texts += [a + rng.choice(marks) + b for a, b in zip(texts[::2], texts[1::2], strict=False)]
        for text in texts:
            plain = ours.encode(text, parse_special=True)
            assert plain == theirs.encode(text, add_special_tokens=False), repr(text)
            assert ours.encode(text, True, True) == theirs.encode(text), repr(text)
        check_chats(ChatFormat.from_gguf(file, ours), theirs)
        model = load_model(file, LoadOptions(backend="reference", **OPTIONS.get(name, {})))
        tokens = ours.encode(LINES[2] + LINES[3], add_special=True)[:40]
        assert relative_error(one_pass(model, tokens), tiny.logits(tokens)) < 1e-4


def check_chats(chat: ChatFormat, theirs: Any) -> None:
    for messages in CHATS:
        variables = {"current_date": "2026-01-02"} if chat.source == "harmony" else {}
        rendered = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, **variables
        )
        assert chat.render(messages, **variables) == rendered["input_ids"]
        text = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **variables
        )
        assert chat.render_text(messages, **variables) == text


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    PUBLISHERS["Qwen"].write(tmp_path)
    return tmp_path


CONFIG = Config(Path("config.json"), {"vocab_size": SIZE})


def test_the_normaliser_is_written_and_read(qwen: Path) -> None:
    metadata = tokenizer_metadata(qwen, CONFIG)
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"].value
    assert metadata[NORMALIZER] == "NFC"
    plain = {key: value for key, value in metadata.items() if key != NORMALIZER}
    # Without the key the architecture tells, for files of other converters.
    for architecture, composes in (("qwen3moe", True), ("olmoe", True), ("llama", False)):
        found = read_vocabulary(plain | {"general.architecture": architecture})
        assert found.composes == composes
    assert not read_vocabulary(
        metadata | {NORMALIZER: "", "general.architecture": "qwen3"}
    ).composes


@pytest.mark.parametrize("kind", ["NFKC", "Lowercase"])
def test_another_normaliser_is_refused(qwen: Path, kind: str) -> None:
    path = qwen / "tokenizer.json"
    description = json.loads(path.read_text())
    description["normalizer"] = {"type": "Sequence", "normalizers": [{"type": kind}]}
    path.write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=f"normalises text by {kind}"):
        tokenizer_metadata(qwen, CONFIG)
