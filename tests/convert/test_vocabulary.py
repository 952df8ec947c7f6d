"""Tokenizers of checkpoints: the converted ones give the publishers' ids."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.convert.config import Config
from greenroom.convert.convert import Conversion, convert
from greenroom.convert.pre_tokenizers import CANDIDATES, recognise
from greenroom.convert.vocabulary import tokenizer_metadata
from greenroom.errors import TokenizerError
from greenroom.gguf import GGUFFile, write_gguf
from greenroom.tokenizer import Tokenizer
from greenroom.tokenizer.pretokenizers import pre_tokenizer

from ..models import families
from . import checkpoints

CONFIG = Config(Path("config.json"), {"vocab_size": checkpoints.VOCABULARY + 8})
TEXTS = [*checkpoints.LINES[:4], "  two  spaces\n\n and\ttabs 🙂 e\u0301", "x", ""]


def built(folder: Path, out: Path, config: Config = CONFIG) -> Tokenizer:
    metadata = {"general.architecture": "llama", **tokenizer_metadata(folder, config)}
    write_gguf(out, metadata, [])
    with GGUFFile(out) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    checkpoints.byte_level(folder)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    checkpoints.sentencepiece_model(folder)
    return folder


def test_byte_level_ids_are_the_publishers(byte_level: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Publisher

    ours = built(byte_level, tmp_path / "t.gguf")
    theirs = Publisher.from_file(str(byte_level / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.encode(text + "<|im_end|>", parse_special=True)[-1] == ours.eos_id
    assert theirs.token_to_id("<|im_end|>") == ours.eos_id


def test_sentencepiece_ids_are_the_publishers(pieces: Path, tmp_path: Path) -> None:
    import sentencepiece

    ours = built(pieces, tmp_path / "t.gguf")
    theirs = sentencepiece.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.EncodeAsIds(text)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.encode("x", add_special=True)[0] == 1
    assert ours.encode("a<|user|>", parse_special=True)[-1] == checkpoints.VOCABULARY - 2


def test_byte_fallback_in_a_tokenizer_json(pieces: Path, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    theirs = LlamaTokenizer.from_pretrained(pieces)
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink(missing_ok=True)
    description = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert description["model"]["byte_fallback"]
    ours = built(tmp_path / "hf", tmp_path / "t.gguf")
    for text in checkpoints.LINES[:4]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_templates_and_padding_come_along(byte_level: Path, pieces: Path) -> None:
    bpe, spm = (tokenizer_metadata(folder, CONFIG) for folder in (byte_level, pieces))
    assert bpe["tokenizer.chat_template"] == "{{ messages }}"
    assert spm["tokenizer.chat_template"] == "A"
    assert spm["tokenizer.chat_template.tool_use"] == "B"
    assert spm["tokenizer.ggml.tokens"][-1] == f"[PAD{checkpoints.VOCABULARY + 7}]"
    assert spm["tokenizer.ggml.token_type"].value[-8:] == [5] * 8
    assert spm["tokenizer.ggml.scores"].value[-1] == -1000.0


def test_the_template_file_wins(byte_level: Path, tmp_path: Path) -> None:
    for path in byte_level.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("file")
    found = tokenizer_metadata(tmp_path, CONFIG)
    assert found["tokenizer.chat_template"] == "file"


@pytest.mark.parametrize("name", CANDIDATES)
def test_pre_tokenizers_are_recognised_by_what_they_do(tmp_path: Path, name: str) -> None:
    checkpoints.byte_level(tmp_path, pre=name)
    found = recognise(_publisher(tmp_path), pre_tokenizer(name).ignore_merges)
    assert found == name


def test_the_order_of_other_spellings_does_not_matter(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    checkpoints.byte_level(tmp_path)
    publisher = _publisher(tmp_path)
    publisher.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert recognise(publisher) == "gpt-2"
    publisher.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    assert recognise(publisher) == "refact"
    publisher.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="has no name in GGUF files"):
        recognise(publisher)


def _publisher(folder: Path):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer as Publisher

    return Publisher.from_file(str(folder / "tokenizer.json"))


def test_a_vocabulary_larger_than_the_embedding_is_refused(byte_level: Path) -> None:
    small = Config(Path("config.json"), {"vocab_size": 100})
    with pytest.raises(TokenizerError, match="the model has 100 rows"):
        tokenizer_metadata(byte_level, small)


def test_a_whole_checkpoint_brings_its_tokenizer(pieces: Path, tmp_path: Path) -> None:
    tiny = families.mixtral(1)
    folder = checkpoints.save(tiny, tmp_path / "m", vocab_size=checkpoints.VOCABULARY)
    rows = checkpoints.VOCABULARY - tiny.model.config.vocab_size

    def grow(tensors: checkpoints.Tensors) -> checkpoints.Tensors:
        import torch

        wide = ("model.embed_tokens.weight", "lm_head.weight")
        more = {n: torch.cat([tensors[n], torch.zeros(rows, 48)]) for n in wide}
        return tensors | more

    checkpoints.rename(folder, grow)
    for path in pieces.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    convert(Conversion(folder), tmp_path / "m.gguf")
    tokenizer = Tokenizer.from_gguf(tmp_path / "m.gguf")
    assert tokenizer.vocabulary_size == checkpoints.VOCABULARY
    assert tokenizer.decode(tokenizer.encode("The quick fox")) == "The quick fox"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_random_text_gets_the_publishers_ids(byte_level: Path, text: str) -> None:
    if not hasattr(test_random_text_gets_the_publishers_ids, "ours"):
        out = byte_level / "t.gguf"
        test_random_text_gets_the_publishers_ids.ours = built(byte_level, out)  # type: ignore[attr-defined]
        test_random_text_gets_the_publishers_ids.theirs = _publisher(byte_level)  # type: ignore[attr-defined]
    ours = test_random_text_gets_the_publishers_ids.ours  # type: ignore[attr-defined]
    theirs = test_random_text_gets_the_publishers_ids.theirs  # type: ignore[attr-defined]
    if "<|" not in text:
        assert ours.encode(text) == theirs.encode(text).ids
