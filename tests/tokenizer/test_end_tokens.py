"""Generation ends at the right tokens, known by text as well as by id."""

import pytest

from greenroom.tokenizer import Tokenizer

from .vocabularies import HARMONY, bpe_metadata, bpe_tokenizer, published


def texts(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.vocabulary.texts[token] for token in tokenizer.eog_ids}


def test_by_text_whatever_the_file_says() -> None:
    assert texts(bpe_tokenizer()) == {"<|endoftext|>", "<|im_end|>"}
    tokenizer = bpe_tokenizer(control=(), user_defined=["<|eot_id|>"])
    assert texts(tokenizer) == {"<|eot_id|>"}
    (token,) = tokenizer.eog_ids
    assert tokenizer.is_special(token)


def test_by_id() -> None:
    metadata = bpe_metadata(control=["<|im_end|>", "<odd>"])
    odd = metadata["tokenizer.ggml.tokens"].index("<odd>")
    for role in ("eos", "eot", "eom"):
        tokenizer = Tokenizer.from_metadata(metadata | {f"tokenizer.ggml.{role}_token_id": odd})
        assert texts(tokenizer) == {"<|im_end|>", "<odd>"}


def test_end_of_message_is_no_end_where_return_and_call_exist() -> None:
    assert texts(bpe_tokenizer(control=HARMONY)) == {"<|return|>", "<|call|>", "<|endoftext|>"}
    without_call = [text for text in HARMONY if text != "<|call|>"]
    assert "<|end|>" in texts(bpe_tokenizer(control=without_call))


def test_early_gpt_oss_files_name_another_end() -> None:
    metadata = bpe_metadata(control=HARMONY)
    end = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.eos_token_id": end})
    assert texts(tokenizer) == {"<|return|>", "<|call|>", "<|endoftext|>"}


def test_html_is_not_an_end() -> None:
    tokenizer = bpe_tokenizer(control=(), merges=["< /", "</ s", "</s >"])
    assert tokenizer.eog_ids == frozenset()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-4o", {"<|return|>", "<|call|>", "<|endoftext|>"}),
        ("phi-3", {"<|endoftext|>", "</s>", "<|end|>"}),
        ("llama-bpe", {"<|end_of_text|>", "<|eot_id|>"}),
        ("llama-spm", {"</s>"}),
    ],
)
def test_published(name: str, expected: set[str]) -> None:
    assert texts(published(name)) == expected
