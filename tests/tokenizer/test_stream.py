"""Streamed text never has half a character and adds up to the text of all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.tokenizer import Tokenizer

from .vocabularies import bpe_metadata, spm_metadata

TOKENIZERS = [Tokenizer.from_metadata(bpe_metadata()), Tokenizer.from_metadata(spm_metadata())]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bpe", "spm"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1)))
    for skip in (False, True):
        stream = tokenizer.stream(skip)
        parts = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(parts) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bpe", "spm"])
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", "")
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == text
    assert stream.flush() == ""


def test_an_unfinished_character_shows_at_the_end() -> None:
    tokenizer = TOKENIZERS[0]
    first, second, *_ = tokenizer.encode("😀")
    stream = tokenizer.stream()
    assert stream.push(first) + stream.push(second) == ""
    assert stream.flush() == "\ufffd"


def test_text_that_goes_on_keeps_its_space() -> None:
    tokenizer = TOKENIZERS[1]
    (word,) = tokenizer.encode("hello")
    assert tokenizer.stream(context=[word]).push(word) == " hello"
    assert tokenizer.stream(context=[1]).push(word) == "hello"
    assert tokenizer.stream().push(word) == "hello"
