"""Converted checkpoints in llama.cpp: it loads them, tokenizer and all, and gives HF's logits."""

import json
import logging
from pathlib import Path

import pytest

from greenroom.convert.convert import Conversion, convert
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model

from ..models.cases import CASES
from ..models.hf_export import VOCABULARY
from ..models.sessions import divergence, one_pass
from ..models.test_llama_cpp import TOKENS, peer, peer_logprobs
from . import checkpoints

logging.getLogger("transformers").setLevel(logging.ERROR)


def characters(folder: Path) -> None:
    """A tokenizer of single characters and an end token, as many as the tiny models know."""
    end = VOCABULARY - 1
    texts = [*(chr(33 + i) for i in range(end - 2)), "!!", "Ġ", "<e>"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description = {
        "added_tokens": [{"id": end, "content": "<e>", "special": True} | flags],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": [["!", "!"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"}))


CLASSES = [
    "gpt-oss",
    "phimoe-long",
    "deepseek",
    "mixtral",
    "llama",
    "olmoe",
    "qwen3moe",
    "qwen3",
    "qwen2moe",
    "qwen2",
    "granitemoe",
]
# llama.cpp rounds YaRN's bounds and has its own longrope magnitude: compare with its arithmetic.
OWN_MATH = {"gpt-oss", "phimoe-long"}
# It loads only OLMoE files with as many key heads as query heads.
SIZES = {"olmoe": {"kv_heads": 4}}


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("case", CLASSES)
def test_llama_cpp_gives_the_references_logits(tmp_path: Path, case: str, seed: int) -> None:
    tiny = CASES[case].make_wide(gain=1.0, seed=seed, **SIZES.get(case, {}))
    if case == "deepseek":
        _, folder = checkpoints.deepseek(seed, tmp_path / "checkpoint", tiny)
    else:
        folder = checkpoints.save(tiny, tmp_path / "checkpoint")
    characters(folder)
    out = tmp_path / "out.gguf"
    convert(Conversion(folder, "F16"), out)
    with peer(out) as server:
        found = peer_logprobs(server, TOKENS)
    expected = tiny.logits(TOKENS)
    if case in OWN_MATH:
        with GGUFFile(out) as file:
            options = LoadOptions(backend="reference", llama_cpp_math=True)
            expected = one_pass(load_model(file, options), TOKENS)
    assert divergence(found, expected) < 1e-3
