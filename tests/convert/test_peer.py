"""Converted checkpoints in llama.cpp: it loads them, tokenizer and all, and gives HF's logits."""

import json
import logging
from pathlib import Path

import pytest
import torch

from greenroom.convert.convert import Conversion, convert
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model

from ..models.cases import CASES
from ..models.hf_export import VOCABULARY
from ..models.sessions import divergence, one_pass
from ..models.test_llama_cpp import TOKENS, peer, peer_logprobs
from . import checkpoints
from .checkpoints import Make

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
    "grin-moe",
    "deepseek",
    "mixtral",
    "llama",
    "olmoe",
    "qwen3moe",
    "qwen3",
    "qwen2moe",
    "qwen2",
    "granitemoe",
    "granitemoe-shared",
]
# llama.cpp rounds YaRN's bounds, and has RMS norms and another longrope magnitude in PhiMoE: these
OWN_MATH = {"gpt-oss", "phimoe-long", "grin-moe"}
# It loads only OLMoE files with as many key heads as query heads.
SIZES = {"olmoe": {"kv_heads": 4}}


def peers(folder: Path, out: Path, type: str = "F16") -> torch.Tensor:
    """Converts a checkpoint; llama.cpp's log-probabilities, (tokens, vocabulary)."""
    characters(folder)
    convert(Conversion(folder, type), out)
    with peer(out) as server:
        return peer_logprobs(server, TOKENS)


def own_math(out: Path) -> torch.Tensor:
    """Logits of the float32 path where it follows llama.cpp."""
    with GGUFFile(out) as file:
        options = LoadOptions(backend="reference", llama_cpp_math=True)
        return one_pass(load_model(file, options), TOKENS)


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("case", CLASSES)
def test_llama_cpp_gives_the_references_logits(tmp_path: Path, case: str, seed: int) -> None:
    tiny = CASES[case].make_wide(gain=1.0, seed=seed, **SIZES.get(case, {}))
    folder = tmp_path / "checkpoint"
    if case == "deepseek":
        checkpoints.deepseek(seed, folder, tiny)
    elif case == "grin-moe":
        checkpoints.grin(seed, folder, tiny)
    else:
        checkpoints.save(tiny, folder)
    found = peers(folder, tmp_path / "out.gguf")
    expected = tiny.logits(TOKENS)
    if case in OWN_MATH:
        expected = own_math(tmp_path / "out.gguf")
    assert divergence(found, expected) < 1e-3


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("make", [checkpoints.gpt_oss_mxfp4, checkpoints.gpt_oss_original])
def test_llama_cpp_takes_the_published_blocks(tmp_path: Path, make: Make, seed: int) -> None:
    _, folder = make(seed, tmp_path / "checkpoint")
    found = peers(folder, tmp_path / "out.gguf", "auto")
    # It rounds what is multiplied with blocks to eight bits.
    assert divergence(found, own_math(tmp_path / "out.gguf")) < 5e-3
