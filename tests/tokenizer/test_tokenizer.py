"""Ids equal the reference tokenizers'; text comes back; what cannot be right is refused."""

import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.errors import TokenizerError
from greenroom.gguf import GGUFFile
from greenroom.tokenizer import Tokenizer
from greenroom.tokenizer.pretokenizers import _ALIASES, _EXPRESSIONS, pre_tokenizer

from .vocabularies import bpe_metadata, bpe_tokenizer, published, published_path, spm_metadata

BYTE_LEVEL = ("gpt-2", "llama-bpe", "gpt-4o", "deepseek-llm")
SENTENCE_PIECE = ("llama-spm", "phi-3")
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.mark.parametrize("name", BYTE_LEVEL + SENTENCE_PIECE)
def test_ids_equal_the_reference(name: str) -> None:
    tokenizer = published(name)
    path = str(published_path(name))
    with open(path + ".inp", encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    with open(path + ".out") as file:
        lines = file.read().split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text) == [int(token) for token in line.split()], repr(text)


@pytest.mark.parametrize("name", BYTE_LEVEL + SENTENCE_PIECE)
@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_text_comes_back(name: str, text: str) -> None:
    tokenizer = published(name)
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocabulary_size for token in ids)
    # U+2581 is SentencePiece's own sign for a space.
    expected = text.replace("▁", " ") if name in SENTENCE_PIECE else text
    assert tokenizer.decode(ids) == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_text_comes_back_without_published_files(text: str) -> None:
    for metadata in (bpe_metadata(), spm_metadata()):
        tokenizer = Tokenizer.from_metadata(metadata)
        expected = text.replace("▁", " ") if tokenizer.vocabulary.model == "llama" else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_o200k_equals_tiktoken_on_random_text() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = published("gpt-4o")
    ranks = {
        tokenizer.token_bytes(token): token
        for token in range(tokenizer.vocabulary_size)
        if not tokenizer.is_special(token)
    }
    (pattern,) = _EXPRESSIONS["gpt-4o"]
    reference = tiktoken.Encoding(
        "o200k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    draw = random.Random(0)
    assigned = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    common = "  \n\r\t'sStTlLABCabcéÉß中ア한ا0123456789!?.,-/\u00a0\u0301\u200d"
    for _ in range(3000):
        letters = (
            chr(draw.choice(assigned)) if draw.random() < 0.2 else draw.choice(common)
            for _ in range(draw.randint(1, 30))
        )
        text = "".join(letters)
        assert tokenizer.encode(text) == reference.encode(text), ascii(text)


def test_the_largest_vocabulary_loads() -> None:
    tokenizer = Tokenizer.from_gguf(published_path("gpt-4o"))
    assert tokenizer.vocabulary_size == 201_088


def test_tokenising_needs_no_torch() -> None:
    code = "import greenroom.tokenizer, sys; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=False)
    assert result.returncode == 0


@pytest.mark.parametrize("name", sorted(_EXPRESSIONS | _ALIASES))
def test_every_pre_tokenizer_loses_no_text(name: str) -> None:
    tokenizer = bpe_tokenizer(tokenizer__ggml__pre=name)
    text = "It's 12345 o'clock,\n\n  naïve 中文かな 한국어 i̇ $x+=1; \t“ok”…\r\n ՀԱՅ հայ \u1c80 "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", [*_EXPRESSIONS, "llama"])
def test_long_runs_take_no_quadratic_time(name: str) -> None:
    metadata = spm_metadata() if name == "llama" else bpe_metadata(tokenizer__ggml__pre=name)
    tokenizer = Tokenizer.from_metadata(metadata)
    start = time.process_time()
    for run in (" ", "\n", "\t\r", "A", "Aa", "\u0301", "中", "'", "1", ".", "\u00a0", "$ "):
        tokenizer.encode(run * 200_000 + "中")  # quadratic: a hundred seconds and more each
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "a  b12 34!", ["a", " ", " b", "12", " 34", "!"]),
        ("refact", "x12 34", ["x", "1", "2", " ", "3", "4"]),
        ("llama-bpe", "We'LL see 12345", ["We", "'LL", " see", " ", "123", "45"]),
        ("qwen2", "x=12\n\ny", ["x", "=", "1", "2", "\n\n", "y"]),
        ("gpt-4o", "HTTPServer's 1234 a/\n", ["HTTPServer's", " ", "123", "4", " a", "/\n"]),
        ("tekken", "fooBar's 12", ["foo", "Bar", "'s", " ", "1", "2"]),
        ("deepseek-llm", "ab 12,中文\nc", ["ab", " ", "12", ",", "中文", "\n", "c"]),
        ("deepseek-coder", "ab12 c", ["ab", "1", "2", " c"]),
        ("deepseek-v3", "x1234 .foo", ["x", "123", "4", " .", "foo"]),
        ("default", "a 12345!", ["a", " ", "123", "45", "!"]),
        ("qwen35", "e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
    ],
)
def test_words(name: str, text: str, words: list[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    splits = [
        pre_tokenizers.Split(Regex(e), behavior="isolated") for e in pre_tokenizer(name).expressions
    ]
    found = pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
    assert [word for word, _ in found] == words


def test_special_tokens_are_read_only_on_request() -> None:
    tokenizer = bpe_tokenizer(user_defined=["<think>"])
    start, think = tokenizer.vocabulary.id_of("<|im_start|>"), tokenizer.vocabulary.id_of("<think>")
    ids = tokenizer.encode("<|im_start|>hello<think>", parse_special=True)
    assert (ids[0], ids[-1], len(ids)) == (start, think, 3)
    plain = tokenizer.encode("<|im_start|>hello<think>")
    assert start not in plain
    assert plain[-1] == think, "user-defined tokens are found either way"
    assert tokenizer.decode(ids) == tokenizer.decode(plain) == "<|im_start|>hello<think>"
    assert tokenizer.decode(ids, skip_special=True) == "hello<think>"


def test_longer_special_tokens_are_cut_out_first() -> None:
    tokenizer = bpe_tokenizer(control=["x<|", "<|a|>"])
    assert tokenizer.partition("x<|a|>", parse_special=True) == [
        "x",
        tokenizer.vocabulary.id_of("<|a|>"),
    ]


def test_bos_and_eos_follow_the_file() -> None:
    flags = {"tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2}
    tokenizer = bpe_tokenizer(**flags, tokenizer__ggml__add_eos_token=True)
    assert tokenizer.encode("h", add_special=True) == [*tokenizer.encode("h"), 2]
    spm = Tokenizer.from_metadata(spm_metadata())
    assert spm.encode("hello", add_special=True)[0] == 1
    quiet = Tokenizer.from_metadata(spm_metadata(tokenizer__ggml__add_bos_token=False))
    assert quiet.encode("hello", add_special=True) == quiet.encode("hello")


def test_space_before_sentencepiece_text() -> None:
    tokenizer = Tokenizer.from_metadata(spm_metadata())
    word = tokenizer.vocabulary.texts.index("▁hello")
    assert tokenizer.encode("hello") == [word]
    ids = tokenizer.encode("hello</s>hello", parse_special=True)
    assert ids == [word, 2, word]
    assert tokenizer.decode(ids) == "hello</s>hello"
    assert tokenizer.decode([word, word]) == "hello hello"
    bare = Tokenizer.from_metadata(spm_metadata(tokenizer__ggml__add_space_prefix=False))
    assert bare.decode(bare.encode("hello")) == "hello"
    assert bare.encode("hello") != [word]
    assert bare.decode([word]) == " hello"


def test_phi3_tokens_swallow_white_space() -> None:
    tokenizer = published("phi-3")
    user, end = (tokenizer.vocabulary.id_of(text) for text in ("<|user|>", "<|end|>"))
    ids = tokenizer.encode("<|user|>\nHello<|end|>\n", parse_special=True)
    assert ids == [user, *tokenizer.encode("Hello"), end]


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = bpe_tokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800b😀")) == "a\ufffdb😀"


def test_ids_outside_the_vocabulary_are_refused() -> None:
    tokenizer = bpe_tokenizer()
    for token in (-1, tokenizer.vocabulary_size):
        with pytest.raises(TokenizerError, match=f"token id {token} is outside"):
            tokenizer.decode([token])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "made-up"}, "pre-tokenizer 'made-up' is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, outside"),
        ({"tokenizer.ggml.model": "llama"}, "no tokenizer.ggml.scores"),
    ],
)
def test_unusable_vocabularies_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_metadata(bpe_metadata() | change)
    assert "\n" not in str(caught.value)


def test_merges_of_unknown_pieces_are_left_out() -> None:
    tokenizer = Tokenizer.from_metadata(
        bpe_metadata() | {"tokenizer.ggml.merges": ["h e", "no where", "broken"]}
    )
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_from_gguf_reads_a_file(tmp_path: Path) -> None:
    metadata = bpe_metadata()
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = Tokenizer.from_gguf(tmp_path / "vocabulary.gguf")
    assert tokenizer.encode("hello w") == Tokenizer.from_metadata(metadata).encode("hello w")
    with GGUFFile(tmp_path / "vocabulary.gguf") as file:
        assert Tokenizer.from_gguf(file).vocabulary_size == tokenizer.vocabulary_size
